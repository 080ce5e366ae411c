"""Gradients of each task, and of a weighted loss, as functions.

`TaskLosses` calls these. They are also for users who want task gradients for
their own optax chain.
"""

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import jax

from mtl_jax import types
from mtl_jax.gradients import _micro_batches
from mtl_jax.gradients import _order
from mtl_jax.gradients import _weighted
from mtl_jax.gradients import engines
from mtl_jax.transforms.contract import arguments
from mtl_jax.transforms.contract import labels


class TaskGrad(NamedTuple):
  """The result of `task_grad`.

  Attributes:
    at: `(params, *args) -> ((losses [T], aux), task_grads)`: all tasks at the
      same parameters; one forward pass, T pull-backs. aux is None without
      `has_aux`.
    at_each: `(task_params, *args) -> (losses [T], task_grads)`: task i at its
      own parameters, row i of shared leaves [T, *shape]; all other leaves
      [*shape].
  """

  at: Callable[..., tuple[tuple[jax.Array, Any], types.TaskGrads]]
  at_each: Callable[..., tuple[jax.Array, types.TaskGrads]]


def evaluations(
  loss_fn: _order.LossFn,
  names: tuple[str, ...],
  param_labels: labels.ParamLabels,
  engine: str,
  micro_batches: int,
  weigh_slices: bool = True,
) -> TaskGrad:
  """The two evaluations of a function that returns losses and aux."""
  given = loss_fn, names, param_labels, engine

  def at(*args):
    (losses, aux), grads = engines.at(*given, *args)
    return losses, aux, grads

  def at_each(*args):
    losses, grads = engines.at_each(*given, *args)
    return losses, (), grads

  if micro_batches > 1:
    at, at_each = (
      _micro_batches.accumulated(
        fn, names, param_labels, micro_batches, weigh_slices
      )
      for fn in (at, at_each)
    )

  def pair_at(*args):
    losses, aux, grads = at(*args)
    return (losses, aux), grads

  def pair_at_each(*args):
    losses, _, grads = at_each(*args)
    return losses, grads

  return TaskGrad(pair_at, pair_at_each)


def task_grad(
  loss_fn: Callable[..., Any],
  task_names: Sequence[str],
  *,
  param_labels: labels.ParamLabels = labels.default_labels,
  engine: str = 'auto',
  micro_batches: int = 1,
  has_aux: bool = False,
) -> TaskGrad:
  """Task gradients of a function that gives one loss per task.

  Args:
    loss_fn: `(params, *args) -> {task: scalar}`, or `(losses, aux)` with
      `has_aux`. An array [T] is accepted instead of the dictionary; the work
      for other tasks' heads is then not always skipped.
    task_names: the tasks, in the order of every task axis.
    param_labels: see `mtl_jax.shared_only`. A leaf used by more than one task
      is shared; a task's own leaf must not influence another task's loss.
    engine: how T tasks are evaluated; the numbers are the same. `'unroll'`: one
      after the other in one program. Each task's scalar is differentiated
      separately, so that other heads cost nothing. `'vmap'`: batched over
      tasks; every head is evaluated for every task. `'scan'`: a loop over
      tasks, each with only its own head, that writes results into the stack in
      place. A flat update then needs two stacks of temporary memory instead of
      three. `'auto'`: `'scan'` on CPU, where it also takes less time for LeNet
      and for a perceptron with ten tasks, and 4 % more for ResNet-18
      (results/benchmarks/joint_update.json); `'unroll'` elsewhere.
    micro_batches: n; the batch is cut into n slices, and their task gradients
      are averaged by label counts before they are returned. The first of
      `*args` is the batch: all its leaves [B, ...] are cut, and row r goes to
      slice r mod n. If there is a `batch['mask'][task]`, the labels are counted
      in it. Other arguments (a key, say) are passed unchanged to each slice.
      Leaves of aux get a leading axis n.
    has_aux: whether `loss_fn` returns `(losses, aux)`. `at_each` drops aux.

  Returns:
    `TaskGrad(at, at_each)`. In task gradients a shared leaf is [T, *shape], a
    head's leaf [*shape] holds the gradient of its own task's loss, and a frozen
    leaf is zero.

  Raises:
    ValueError: for another engine, `micro_batches` below 1 or that does not
      divide the batch, and for losses that are not one scalar per task.

  Examples:
    >>> import jax.numpy as jnp, mtl_jax
    >>> params = {'shared': jnp.array(2.0), 'heads': {'a': jnp.array(3.0),
    ...           'b': jnp.array(5.0)}}
    >>> def loss_fn(params, x):
    ...   return {task: params['shared'] * head * x
    ...           for task, head in params['heads'].items()}
    >>> at, at_each = mtl_jax.task_grad(loss_fn, ('a', 'b'))
    >>> (losses, _), grads = at(params, 1.0)
    >>> print(losses, grads['shared'], grads['heads']['b'])
    [ 6. 10.] [3. 5.] 2.0
    >>> own = {'shared': jnp.array([2.0, 4.0]), 'heads': params['heads']}
    >>> losses, grads = at_each(own, 1.0)
    >>> print(losses, grads['shared'], grads['heads']['b'])
    [ 6. 20.] [3. 5.] 4.0
  """
  names = _checked(task_names, micro_batches)
  arguments.one_of('engine', engine, engines.ENGINES)
  return evaluations(
    _with_aux(loss_fn, has_aux), names, param_labels, engine, micro_batches
  )


class WeightedGrad(NamedTuple):
  """The result of `weighted_grad`.

  Attributes:
    losses: `(params, batch, *args) -> losses [T]`; only forward passes.
    at: `(weigh, params, batch, *args) -> ((losses [T], aux, weighed), grads)`
      with `weigh(losses [T]) -> (weights [T], anything)`. `weighed` is the
      result of `weigh`; aux is None without `has_aux`. grads, laid out as the
      parameters, is the gradient of the sum of weights times losses.
  """

  losses: Callable[..., jax.Array]
  at: Callable[..., tuple[tuple[jax.Array, Any, Any], types.Params]]


def weighted_grad(
  loss_fn: Callable[..., Any],
  task_names: Sequence[str],
  *,
  micro_batches: int = 1,
  has_aux: bool = False,
) -> WeightedGrad:
  r"""The gradient of a weighted sum of task losses.

  .. math:: \nabla_\theta \sum_i w_i(L)\, L_i(\theta)

  One forward and one backward pass; with micro-batches one more forward pass,
  because weights need the losses on the whole batch before they scale any
  gradient.

  Args:
    loss_fn: `(params, batch, *args) -> {task: scalar}` (or an array [T]), or
      `(losses, aux)` with `has_aux`.
    task_names: the tasks, in the order of every task axis.
    micro_batches: see `mtl_jax.task_grad`.
    has_aux: whether `loss_fn` returns `(losses, aux)`.

  Returns:
    `WeightedGrad(losses, at)`. The loss of a task whose weight is exactly 0 has
    no part in the gradient, even if it is NaN, unless one operation (a loop, a
    `jax.checkpoint`) makes it together with other losses. A weight that is NaN
    makes the gradient NaN.

  Raises:
    ValueError: for `micro_batches` below 1 or that does not divide the batch,
      and for losses that are not one scalar per task.

  Examples:
    >>> import jax.numpy as jnp, mtl_jax
    >>> loss_fn = lambda params, batch: {'a': params**2, 'b': 3 * params}
    >>> weighting = mtl_jax.si()
    >>> grad = mtl_jax.weighted_grad(loss_fn, ('a', 'b'))
    >>> (losses, _, (weights, _)), grads = grad.at(
    ...   lambda losses: weighting.update(losses, weighting.init(2)),
    ...   jnp.array(2.0), None)
    >>> print(losses, grads)  # d/dx [log x^2 + log 3x] = 3 / x
    [4. 6.] 1.5
  """
  names = _checked(task_names, micro_batches)
  with_aux = _with_aux(loss_fn, has_aux)
  if micro_batches == 1:
    return WeightedGrad(
      lambda *args: _weighted.values(with_aux, names, None, *args),
      lambda *args: _weighted.weighted(with_aux, names, *args),
    )
  given = with_aux, names, micro_batches, True
  return WeightedGrad(
    lambda *args: _weighted.sliced_values(*given, *args),
    lambda *args: _weighted.sliced_weighted(*given, *args),
  )


def _checked(task_names, micro_batches):
  names = labels.check_task_names(task_names)
  if micro_batches < 1:
    raise ValueError(f'micro_batches must be at least 1, got {micro_batches}')
  return names


def _with_aux(loss_fn, has_aux):
  """The function with an aux result, which is None without `has_aux`."""

  def pair(*args):
    out = loss_fn(*args)
    if not has_aux and isinstance(out, tuple):
      raise ValueError(
        'loss_fn returned a tuple; pass has_aux=True if it returns (losses, '
        'aux)'
      )
    if has_aux and not (isinstance(out, tuple) and len(out) == 2):
      raise ValueError(
        'has_aux is True, so loss_fn must return a pair (losses, aux), got '
        f'{type(out).__name__}'
      )
    return out if has_aux else (out, None)

  return pair
