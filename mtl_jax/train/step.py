"""The joint update: one pure function from a state and a batch to the next.

It names no method. Whatever the optimizer is, it is handed the task gradients,
the losses, which tasks are present, and a way to evaluate gradients elsewhere;
it takes what it needs of them, and `jit` drops the rest.
"""

from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtl_jax import losses
from mtl_jax import transforms
from mtl_jax import types
from mtl_jax import weighted_gradients
from mtl_jax.train import replicas as replication
from mtl_jax.train import sharding
from mtl_jax.train import step_gradients
from mtl_jax.train import step_metrics


class TrainState(NamedTuple):
  """All that changes from step to step.

  Attributes:
    step: number of updates so far, int32.
    params: parameters.
    model_state: what the model carries besides, such as running statistics.
    opt_state: the optimizer's state.
    weighting: the state of a loss weighting; empty without one.
  """

  step: jax.Array
  params: types.Params
  model_state: types.ModelState
  opt_state: Any
  weighting: Any = ()


def init_state(
  problem: types.Problem,
  model: types.Model,
  tx: optax.GradientTransformation,
  *,
  seed: int,
  batch: types.Batch,
  weighting: transforms.LossWeighting
  | transforms.BilevelWeighting
  | None = None,
) -> TrainState:
  """The state training starts from; a function of the seed.

  Args:
    problem: the problem.
    model: the model.
    tx: the optimizer; its first part is an aggregator unless there is a
      weighting.
    seed: decides the initial parameters.
    batch: any batch; its shapes are what matters.
    weighting: see `make_train_step`.

  Returns:
    A `TrainState` at step 0.
  """
  key = jax.random.fold_in(jax.random.key(seed), 0)
  params, model_state = model.init(key, problem.preprocess(batch))
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    model_state=model_state,
    opt_state=tx.init(params),
    weighting=_init_weighting(weighting, len(problem.tasks), params),
  )


def _init_weighting(weighting, num_tasks, params):
  if weighting is None:
    return ()
  if isinstance(weighting, transforms.BilevelWeighting):
    return weighting.init(num_tasks, params)
  return weighting.init(num_tasks)


def task_losses(
  problem: types.Problem, predictions: types.Predictions, batch: types.Batch
) -> dict[str, jax.Array]:
  """Mean loss of each task over its present labels, {task: scalar}."""
  return {
    task.name: losses.masked_loss(
      task.loss,
      predictions[task.name],
      batch['labels'][task.name],
      batch['mask'][task.name],
    )
    for task in problem.tasks
  }


def make_train_step(
  problem: types.Problem,
  model: types.Model,
  tx: optax.GradientTransformation,
  *,
  seed: int = 0,
  param_labels: transforms.ParamLabels = transforms.default_labels,
  engine: str = 'auto',
  micro_batches: int = 1,
  extra_batches: int = 0,
  weighting: transforms.LossWeighting
  | transforms.BilevelWeighting
  | None = None,
  lookahead: float = 0.0,
  after_step: Callable[..., Any] | None = None,
  axis_name: str | None = None,
  layout: sharding.Layout | None = None,
) -> Callable[
  [TrainState, types.Batch], tuple[TrainState, dict[str, jax.Array]]
]:
  """Makes the joint update of all tasks.

  Args:
    problem: the problem.
    model: the model.
    tx: the optimizer: an aggregator (in `shared_only`, or `flat_minima`), and
      whatever of optax comes after it. With `weighting` there is no aggregator:
      it is given the gradient of the weighted loss.
    seed: decides what dropout draws, together with the step.
    param_labels: see `mtl_jax.shared_only`; the same that `tx` was made with.
    engine: see `mtl_jax.task_grad`.
    micro_batches: see `mtl_jax.task_grad`. The statistics of BatchNorm are
      those of a slice, and the running ones move by their mean.
    extra_batches: how many further stacks of task gradients `tx` needs
      (`Aggregator.extra_batches`). The batch is then cut into
      `1 + extra_batches` independent batches of one size (a remainder of rows
      is left out), and a task is present if all of them have labels of it.
    weighting: a loss weighting; the step then costs one backward pass. A
      bilevel one learns its weights with a look-ahead step from one half of the
      batch to the other first, at its own cost.
    lookahead: learning rate of the look-ahead of a bilevel weighting.
    after_step: `(new_losses [T], opt_state, active) -> opt_state`, called with
      the losses of the batch at the new parameters, which costs a forward pass:
      for an aggregator made by `mtl_jax.weighted` of a weighting that looks at
      them. A `weighting` is told by itself.
    axis_name: for a step inside `shard_map` or `pmap`: the mapped axis whose
      replicas have the same state and a part of the batch each. `tx` must have
      been made with it (unless there is a weighting), and so BatchNorm if its
      statistics are to be those of the whole batch; otherwise they are a
      replica's, and the running ones move by their mean. Dropout draws another
      mask on every replica. Not with a bilevel weighting.
    layout: where parameters and task gradients live on a mesh, if they are not
      to be whole on every device.

  Returns:
    A pure function `(state, batch) -> (state, metrics)`, to be jitted with the
    state donated. Every quantity in it is that of the whole batch, so that
    under `jit` any sharding gives the same numbers, and so do replicas but for
    a perturbation, BatchNorm and dropout of their own, and slices of another
    choice of rows. `metrics` are scalars:
    `'loss'`, the mean over the tasks that have labels in this batch; per task
    `'<task>/loss'` and its metrics at the unperturbed parameters,
    `'<task>/present'`, 1 if it has labels in this batch and 0 if not, or if the
    optimizer left the step out (its other numbers mean nothing then); and what
    `mtl_jax.diagnostics` shows.
  """
  names = problem.task_names
  if weighting is not None and (extra_batches or after_step is not None):
    raise ValueError(
      'weighting goes without extra_batches and after_step, which are for '
      'aggregators'
    )
  if axis_name is not None and isinstance(
    weighting, transforms.BilevelWeighting
  ):
    raise ValueError(
      'a bilevel weighting goes without axis_name (in a config without '
      f"parallel.batch_norm='per_device'), got {axis_name!r}: its look-ahead "
      'differentiates the losses of the whole batch'
    )
  replicas = replication.Replicas(axis_name)
  if layout is not None:
    if weighting is not None and layout.task_devices > 1:
      raise ValueError(
        'parallel.task_devices shares out task gradients, which a loss '
        f'weighting has none of; it must be 1, got {layout.task_devices}'
      )
    engine = layout.engine(engine)

  def step(state: TrainState, batch: types.Batch):
    batch = problem.preprocess(batch)
    # The same key in both passes and for all tasks: the same dropout masks.
    key = jax.random.fold_in(jax.random.key(seed), state.step + 1)
    key = replicas.own_key(key)

    def loss_fn(params, batch):
      if layout is not None:
        params = layout.gather(params)
      predictions, model_state = model.apply(
        params, state.model_state, batch, train=True, key=key
      )
      sums = step_metrics.metric_sums(problem, predictions, batch)
      return task_losses(problem, predictions, batch), (model_state, sums)

    loss_fn = replicas.shares(loss_fn, names)
    args = replicas.arguments(batch, names, micro_batches)
    active = replicas.label_counts([batch], names)[0] > 0
    by_weights = weighted_gradients.weighted_grad(
      loss_fn, names, micro_batches=micro_batches, has_aux=True
    )
    losses_at = lambda params: replicas.mean(by_weights.losses(params, *args))
    weights = {}
    weighting_state = state.weighting
    if weighting is None:
      found = step_gradients.task_gradients(
        loss_fn,
        state.params,
        batch,
        names,
        replicas=replicas,
        extra_batches=extra_batches,
        param_labels=param_labels,
        engine=engine,
        micro_batches=micro_batches,
        layout=layout,
      )
      usable = active
      if extra_batches:
        usable = step_gradients.in_every_slice(
          batch, names, 1 + extra_batches, replicas
        )
      updates, opt_state = tx.update(
        found.task_grads,
        state.opt_state,
        state.params,
        losses=found.losses,
        active=usable,
        **found.keywords,
      )
      losses, aux = found.losses, found.aux
    else:
      weigh = step_gradients.weigh(
        weighting,
        by_weights.losses,
        state,
        batch,
        names,
        active,
        lookahead,
        replicas,
      )
      (losses, aux, (task_weights, weighting_state)), grads = by_weights.at(
        weigh, state.params, *args
      )
      aux = step_gradients.of_slices(aux, micro_batches)
      updates, opt_state = tx.update(
        replicas.mean_gradients(grads), state.opt_state, state.params
      )
      weights = {
        f'{task}/weight': task_weights[i] for i, task in enumerate(names)
      }
    params = optax.apply_updates(state.params, updates)
    losses, model_state = replicas.mean((losses, aux[0]))
    sums = replicas.sum(aux[1])
    # Where the optimizer left the step out it was as if without any task.
    left_out = transforms.left_out(opt_state)
    active &= ~left_out
    keep = lambda new, old: jnp.where(left_out, old, new)
    model_state, weighting_state = jax.tree.map(
      keep,
      (model_state, weighting_state),
      (state.model_state, state.weighting),
    )
    # Without the one and the other nothing is evaluated at the new parameters.
    if after_step is not None:
      opt_state = after_step(losses_at(params), opt_state, active)
    if getattr(weighting, 'after_step', None) is not None:
      weighting_state = weighting.after_step(
        losses_at(params), weighting_state, active=active
      )
    present = active.astype(losses.dtype)
    total = jnp.sum(jnp.where(active, losses, 0))
    metrics = {
      'loss': total / jnp.maximum(jnp.sum(present), 1),
      **{f'{task}/loss': losses[i] for i, task in enumerate(names)},
      **{f'{task}/present': present[i] for i, task in enumerate(names)},
      **step_metrics.finish(problem, sums),
      **step_metrics.shown(
        opt_state, names, left_out, param_labels, state.params
      ),
      **weights,
    }
    state = TrainState(
      step=state.step + 1,
      params=params,
      model_state=model_state,
      opt_state=opt_state,
      weighting=weighting_state,
    )
    return state, metrics

  return step


def make_eval_step(
  problem: types.Problem, model: types.Model
) -> Callable[..., Any]:
  """Makes the evaluation of one batch.

  Args:
    problem: the problem.
    model: the model.

  Returns:
    A pure function `(params, model_state, batch) -> sums`; a tree of arrays to
    be added up over the batches of a split and given to `finish_eval`.
  """
  with_loss = step_metrics.with_loss(problem)

  def step(params, model_state, batch):
    batch = problem.preprocess(batch)
    predictions, _ = model.apply(params, model_state, batch, train=False)
    return step_metrics.metric_sums(with_loss, predictions, batch)

  return step


def finish_eval(problem: types.Problem, sums: Any) -> dict[str, float]:
  """The numbers of a split from its sums.

  Args:
    problem: the problem.
    sums: what the evaluation step returned, added up over all batches.

  Returns:
    `{'<task>/loss': mean loss, '<task>/<metric>': value}`; NaN for a task
    without a label in the split.
  """
  values = step_metrics.finish(step_metrics.with_loss(problem), sums)
  return {name: float(value) for name, value in values.items()}
