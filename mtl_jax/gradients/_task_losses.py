"""The losses of T tasks on a batch, as the object that a joint update asks.

This module decides how the losses are evaluated: engine, slices, replicas and
layout on a mesh. It names no method.
"""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtl_jax import types
from mtl_jax.gradients import _aux
from mtl_jax.gradients import _features
from mtl_jax.gradients import _order
from mtl_jax.gradients import _replicas
from mtl_jax.gradients import _task_grad
from mtl_jax.gradients import _weighted
from mtl_jax.gradients import engines
from mtl_jax.gradients import linearization
from mtl_jax.gradients import slices
from mtl_jax.transforms.contract import arguments
from mtl_jax.transforms.contract import labels


class Objective(NamedTuple):
  """A loss function, and further forms of it that a model may offer.

  Attributes:
    loss_fn: `(params, batch, *args) -> losses` or `(losses, Aux)`, with losses
      `{task: scalar}` or [T].
    features_fn: `(params, batch, *args) -> features` or `(features, Aux)`, a
      tree of floating-point arrays. Heads depend on shared parameters only
      through it.
    head_loss_fn: `(params, features, batch, *args)` -> as `loss_fn`. With
      features from `features_fn` the losses equal those from `loss_fn`. Only
      one of the two functions may fill a field of `Aux`.
    dense_loss_fn: `(params, dense, batch, *args)` -> as `loss_fn`, with its
      dense layers passed to `dense(x, w)`; see `mtl_jax.ghost_update`.
  """

  loss_fn: Callable[..., Any]
  features_fn: Callable[..., Any] | None = None
  head_loss_fn: Callable[..., Any] | None = None
  dense_loss_fn: Callable[..., Any] | None = None


@dataclasses.dataclass(frozen=True)
class TaskLosses:
  """The T losses, with a method for every question of a joint update.

  Made by `task_losses`; `on` binds it to a batch, which all questions need.

  With `axis_name` `gradients` and `gradients_each` return the replica's own
  shares. An aggregator made with that axis averages them, and `over_replicas`
  completes the pass. `values` and `weighted_gradient` return complete results.

  Attributes:
    objective: the loss function and its other forms.
    task_names: the tasks, in the order of every task axis.
    param_labels: see `mtl_jax.shared_only`.
    engine: see `mtl_jax.task_grad`.
    micro_batches: the number of slices in which a batch is evaluated.
    axis_name: the mapped axis of replicas inside `pmap` or `shard_map`.
    place: `TaskGrad -> TaskGrad` that lays task gradients out on a mesh.
    task_devices: number of devices among which the tasks are divided.
    batch: the batch; None before `on`.
    args: further arguments of the loss function.
    label_counts: [T], number of labels for each task in the batch, over all
      devices.
  """

  objective: Objective
  task_names: tuple[str, ...]
  param_labels: labels.ParamLabels = labels.default_labels
  engine: str = 'auto'
  micro_batches: int = 1
  axis_name: str | None = None
  place: Callable[[_task_grad.TaskGrad], _task_grad.TaskGrad] | None = None
  task_devices: int = 1
  batch: Any = None
  args: tuple[Any, ...] = ()
  label_counts: jax.Array | None = None

  def on(self, batch: Any, *args: Any) -> 'TaskLosses':
    """The losses on a batch.

    Args:
      batch: tree of leaves [B, ...]. `batch['mask'][task]` is optional. It is 1
        for a present label and 0 for a missing one.
      *args: further arguments of the loss function, such as a key.
    """
    counts = slices.label_counts(batch, self.task_names)
    return dataclasses.replace(
      self,
      batch=batch,
      args=args,
      label_counts=self._replicas.sum(counts),
    )

  @property
  def counts(self) -> jax.Array:
    """`label_counts`; raises before `on`."""
    return self._bound()

  def _bound(self):
    if self.label_counts is None:
      raise ValueError('these losses have no batch yet: call on(batch) first')
    return self.label_counts

  @property
  def active(self) -> jax.Array:
    """Bool [T]: the tasks with labels in the batch, over all devices."""
    return self.counts > 0

  def split(self, number: int) -> tuple['TaskLosses', ...]:
    """The losses on independent batches of one size, cut from the batch.

    Args:
      number: the number of batches. A remainder of rows is dropped. 1 gives the
        batch itself.
    """
    self._bound()
    if number == 1:
      return (self,)
    return tuple(
      self.on(piece, *self.args)
      for piece in slices.independent(self.batch, number)
    )

  def values(self, params: types.Params) -> jax.Array:
    """Losses [T] from a forward pass; their derivatives skip absent tasks."""
    self._bound()
    active = self.active if slices.masks(self.batch, self.task_names) else None
    if self.micro_batches == 1:
      losses = _weighted.values(
        self._loss_fn, self.task_names, active, params, self.batch, *self.args
      )
    else:
      losses = _weighted.sliced_values(
        *(self._loss_fn, self.task_names, *self._slices),
        *(params, self.batch, *self.args),
      )
    return self._replicas.mean(losses)

  def gradients(
    self, params: types.Params
  ) -> tuple[_aux.Pass, types.TaskGrads]:
    """Losses and task gradients: one forward pass, T pull-backs.

    Those of this replica; see the class.
    """
    (losses, aux), grads = self._task_grad.at(params, self.batch, *self.args)
    return _aux.Pass(losses, self._of_slices(aux)), grads

  def gradients_each(
    self, task_params: types.TaskGrads
  ) -> tuple[jax.Array, types.TaskGrads]:
    """Losses [T] and task gradients, with every task at its own parameters.

    Args:
      task_params: laid out like task gradients: shared leaves [T, *shape].
    """
    return self._task_grad.at_each(task_params, self.batch, *self.args)

  def weighted_gradient(
    self,
    weigh: Callable[[jax.Array], tuple[jax.Array, Any]],
    params: types.Params,
  ) -> tuple[_aux.Pass, Any, types.Params]:
    """The gradient of a weighted sum of losses: one backward pass.

    Args:
      weigh: `losses [T] -> (weights [T], anything)`. A loss with weight 0 has
        no part in the gradient, even if it is NaN.
      params: parameters.

    Returns:
      The pass, the result of `weigh`, and the gradient.
    """
    self.require(
      'a weighted loss', 'the gradient of one loss', task_devices=False
    )
    weigh_global = lambda losses: weigh(self._replicas.mean(losses))
    given = (self._loss_fn, self.task_names)
    if self.micro_batches == 1:
      (losses, aux, weighed), grads = _weighted.weighted(
        *given, weigh_global, params, self.batch, *self.args
      )
    else:
      (losses, aux, weighed), grads = _weighted.sliced_weighted(
        *given, *self._slices, weigh_global, params, self.batch, *self.args
      )
    found = self.over_replicas(_aux.Pass(losses, self._of_slices(aux)))
    return found, weighed, self._replicas.mean_gradients(grads)

  def over_replicas(self, found: _aux.Pass) -> _aux.Pass:
    """The pass over all replicas, from this replica's pass."""
    mean, add = self._replicas.mean, self._replicas.sum
    losses, (of_mean, of_sum) = found
    return _aux.Pass(mean(losses), _aux.Aux(mean(of_mean), add(of_sum)))

  def pull_backs(
    self,
    params: types.Params,
    *,
    asker: str = 'a joint update',
    elsewhere: bool = False,
  ) -> linearization.PullBacks:
    """One forward pass, from which one task is pulled back at a time.

    Args:
      params: parameters.
      asker: who asks, for an error.
      elsewhere: whether single tasks are to be evaluated at other parameters.
    """
    self.require(
      asker,
      'single pull-backs',
      micro_batches=False,
      replicas=False,
      task_devices=False,
    )
    return linearization.pull_backs(
      self._loss_fn,
      self.task_names,
      self.param_labels,
      params,
      self.batch,
      *self.args,
      elsewhere=elsewhere,
    )

  def at_features(
    self, params: types.Params, *, asker: str = 'a joint update'
  ) -> 'Boundary':
    """The boundary between the shared part and the heads; see `Boundary`.

    Args:
      params: parameters.
      asker: who asks, for an error.
    """
    self.require(
      asker,
      'gradients of features',
      micro_batches=False,
      replicas=False,
      task_devices=False,
      form='features_fn',
    )
    found = _features.at_features(
      _aux.pair_of(self.objective.features_fn, 'features'),
      _aux.pair_of(self.objective.head_loss_fn),
      self.task_names,
      self.param_labels,
      params,
      self.batch,
      *self.args,
    )

    def loss_fn(boundary, *unused):
      losses, aux = found.losses_of(boundary)
      return losses, _aux.merged(found.aux, aux)

    losses = dataclasses.replace(
      self,
      objective=Objective(loss_fn),
      param_labels=labels.default_labels,
      # Heads are small: a loop over them would save no memory worth its time.
      engine='unroll',
      place=None,
    )
    return Boundary(losses, found.params, found.pull)

  def dense_losses(
    self,
    params: types.Params,
    dense: Callable[..., jax.Array],
    *,
    asker: str = 'a joint update',
  ) -> tuple[tuple[jax.Array, ...], Any]:
    """Losses as T scalars, and aux, with dense layers passed to `dense`.

    Args:
      params: parameters.
      dense: `(x [..., in], w [in, out]) -> [..., out]`.
      asker: who asks, for an error.
    """
    self.require(
      asker,
      'dense layers',
      micro_batches=False,
      replicas=False,
      task_devices=False,
      form='dense_loss_fn',
    )
    run = _aux.pair_of(self.objective.dense_loss_fn)
    losses, aux = run(params, dense, self.batch, *self.args)
    return _order.as_scalars(losses, self.task_names), aux

  def require(
    self,
    asker: str,
    question: str,
    *,
    micro_batches: bool = True,
    replicas: bool = True,
    task_devices: bool = True,
    form: str | None = None,
  ) -> None:
    """Raises if this evaluation cannot answer a question.

    Args:
      asker: who asks.
      question: the result that it asks for.
      micro_batches: whether slices can answer it.
      replicas: whether replicas can answer it.
      task_devices: whether it can be answered with tasks divided among devices.
      form: the form of the objective that it needs besides `loss_fn`.

    Raises:
      ValueError: naming both sides.
    """
    self._bound()
    refused = []
    if not micro_batches and self.micro_batches > 1:
      refused.append(f'micro_batches={self.micro_batches}')
    if not replicas and self.axis_name is not None:
      refused.append(
        f'axis_name={self.axis_name!r} (in a config perturbation or '
        "parallel.batch_norm='per_device')"
      )
    if not task_devices and self.task_devices > 1:
      refused.append(f'parallel.task_devices={self.task_devices}')
    if refused:
      raise ValueError(
        f'{asker} needs {question}, which an evaluation with '
        f'{" and ".join(refused)} does not give'
      )
    if form is not None and getattr(self.objective, form) is None:
      raise ValueError(
        f'{asker} needs {question}, but the objective has no {form}: pass '
        f'task_losses an Objective with it, or choose a model that has it '
        "(none has dense layers with parallel.parameters='sharded')"
      )

  @property
  def _replicas(self):
    return _replicas.Replicas(self.axis_name)

  @property
  def _slices(self):
    """The number of slices, and whether their labels are counted."""
    return self.micro_batches, self.axis_name is None

  @property
  def _loss_fn(self):
    return self._replicas.shares(
      _aux.pair_of(self.objective.loss_fn),
      self.task_names,
      self.counts,
      self.micro_batches,
    )

  @property
  def _task_grad(self):
    fns = _task_grad.evaluations(
      self._loss_fn,
      self.task_names,
      self.param_labels,
      self.engine,
      *self._slices,
    )
    return fns if self.place is None else self.place(fns)

  def _of_slices(self, aux):
    """Aux over all slices."""
    if self.micro_batches == 1:
      return aux
    return _aux.together(aux)


class Boundary(NamedTuple):
  """The boundary between a model's shared part and its heads.

  Attributes:
    losses: the same losses as a function of `params`.
    params: `{'shared': features, 'heads': {task: leaves of its head}}`.
    pull: a gradient laid out as `params` -> a gradient laid out as the model's
      parameters.
  """

  losses: TaskLosses
  params: types.Params
  pull: Callable[[types.Params], types.Params]


def task_losses(
  loss_fn: Callable[..., Any] | Objective,
  task_names: Sequence[str],
  *,
  param_labels: labels.ParamLabels = labels.default_labels,
  engine: str = 'auto',
  micro_batches: int = 1,
  axis_name: str | None = None,
) -> TaskLosses:
  """The losses of T tasks, for joint updates.

  Args:
    loss_fn: `(params, batch, *args) -> {task: scalar}` (or an array [T]), each
      the mean over the task's labels in the batch; or `(losses, Aux(mean=...,
      sum=...))`. An `Objective` if the model offers further forms.
    task_names: the tasks, in the order of every task axis.
    param_labels: see `mtl_jax.shared_only`. A leaf that more than one task uses
      is shared.
    engine: see `mtl_jax.task_grad`.
    micro_batches: see `mtl_jax.task_grad`.
    axis_name: the mapped axis inside `pmap` or `shard_map`. Its replicas have
      the same parameters and a part of the batch each.

  Returns:
    A `TaskLosses`; pass `losses.on(batch)` to a joint update.

  Raises:
    ValueError: for another engine or `micro_batches` below 1, at a question for
      losses that are not one scalar a task, and for a batch that cannot be cut.

  Examples:
    >>> import jax.numpy as jnp, mtl_jax
    >>> def loss_fn(params, batch):
    ...   return {'a': params[0] * batch['x'].mean(), 'b': params[1] ** 2}
    >>> losses = mtl_jax.task_losses(loss_fn, ('a', 'b'))
    >>> here = losses.on({'x': jnp.array([1.0, 3.0])})
    >>> (values, _), task_grads = here.gradients(jnp.array([1.0, 3.0]))
    >>> print(values, task_grads[0], task_grads[1])
    [2. 9.] [2. 0.] [0. 6.]
  """
  names = labels.check_task_names(task_names)
  arguments.one_of('engine', engine, engines.ENGINES)
  if micro_batches < 1:
    raise ValueError(f'micro_batches must be at least 1, got {micro_batches}')
  if not isinstance(loss_fn, Objective):
    loss_fn = Objective(loss_fn)
  return TaskLosses(
    loss_fn, names, param_labels, engine, micro_batches, axis_name
  )


def combined(
  parts: Sequence[TaskLosses], passes: Sequence[_aux.Pass]
) -> _aux.Pass:
  """Losses and aux on a batch, from those on independent parts.

  Args:
    parts: the result of `TaskLosses.split`.
    passes: the pass of each part.

  Returns:
    Losses weighted by the labels in the parts, and their combined aux. They are
    local to the replica, like the passes.
  """
  if len(parts) == 1:
    return passes[0]
  counts = jnp.stack([part.counts for part in parts])
  shares = counts / jnp.maximum(jnp.sum(counts, axis=0, keepdims=True), 1)
  stacked = jnp.stack([x.losses for x in passes])
  # The loss of a part without labels may be anything.
  losses = jnp.sum(jnp.where(shares > 0, shares * stacked, 0), axis=0)
  aux = jax.tree.map(lambda *x: jnp.stack(x), *(x.aux for x in passes))
  return _aux.Pass(losses, _aux.together(aux))
