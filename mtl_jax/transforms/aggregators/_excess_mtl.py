"""Weights from excess risks."""

from collections.abc import Hashable
import math
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtl_jax.transforms.aggregators import _tracked
from mtl_jax.transforms.contract import aggregation
from mtl_jax.transforms.contract import algebra
from mtl_jax.transforms.contract import arguments
from mtl_jax.transforms.contract import lifting

# A larger relative risk counts as this one. Otherwise the exponent in a single
# update, and with it the weights, would leave float32.
_LARGEST = 1e6


class ExcessMtlMemory(NamedTuple):
  """The memory of `excess_mtl`.

  Attributes:
    squares: tree of leaves [T, *shape], the sums of squared gradients.
    log_weights: [T], logarithms of weights on the simplex.
    baseline: [T], mean excess risk over the first updates with each task.
    updates: [T], number of updates with each task.
  """

  squares: Any
  log_weights: jax.Array
  baseline: jax.Array
  updates: jax.Array


def excess_mtl(
  *,
  step_size: float = 0.01,
  warmup: int = 1,
  num_tasks: int | None = None,
  axis_name: Hashable | None = None,
  reduce: str = 'mean',
  shard_axis: Hashable | None = None,
) -> aggregation.Aggregator:
  r"""Exponentiated weights from excess risks (ExcessMTL).

  The excess risk is the distance of a task's loss from its optimum, by a Taylor
  expansion with a diagonal Hessian as in AdaGrad. The weights use its ratio to
  the initial one:

  .. math::
    E_i = \sum_p \frac{g_{ip}^2}{\sqrt{S_{ip}}}, \quad
    S_{ip} = \sum_{s \le k} g_{ip}(s)^2, \qquad
    w_i \propto w_i \exp(\eta\, E_i / E_i^0), \qquad
    d = \sum_i w_i g_i

  Scale: weights on the simplex; the first update is the mean. Degree of
  homogeneity: 1 for gradients of this and the earlier updates together, because
  relative risks do not change then.

  Memory: one stack like the task gradients, in float32 at least.

  Args:
    step_size: :math:`\eta`, positive.
    warmup: number of first updates with a task over which :math:`E_i^0` is the
      mean, at least 1 (the authors' code; the paper takes three epochs). During
      them a task's risk counts as the baseline: tasks that begin together keep
      equal weights.
    num_tasks: T; needed at `init`, by hand or from a wrapper.
    axis_name: see `from_gram`.
    reduce: see `from_gram`.
    shard_axis: see `from_gram`.

  Returns:
    An aggregator whose memory is an `ExcessMtlMemory`. A coordinate without any
    gradient so far adds nothing to a task's risk; a task whose baseline is zero
    counts as if its risk stayed there.

  Raises:
    ValueError: for an argument outside its range.

  Examples:
    In the second update the risks are 2 / sqrt(5) times and 1 / sqrt(2) times
    those of the first.

    >>> import jax.numpy as jnp, mtl_jax
    >>> tx = mtl_jax.excess_mtl(step_size=1.0, num_tasks=2)
    >>> state = tx.init(jnp.zeros(2))
    >>> updates, state = tx.update(jnp.array([[1.0, 0.0], [0.0, 1.0]]), state)
    >>> print(updates)
    [0.5 0.5]
    >>> _, state = tx.update(jnp.array([[2.0, 0.0], [0.0, 1.0]]), state)
    >>> jnp.set_printoptions(precision=3)
    >>> print(state.task_weights)
    [0.747 0.253]

  References:
    He et al., `Robust Multi-Task Learning with Excess Risks
    <https://arxiv.org/abs/2402.02009>`_, 2024, eq. 6, 7 and 9
  """
  arguments.check_positive('step_size', step_size)
  arguments.check_count('warmup', warmup)

  def memory(size, params, dtype):
    return ExcessMtlMemory(
      squares=_tracked.start(size, params),
      log_weights=jnp.full(size, -math.log(size), dtype),
      baseline=jnp.zeros(size, dtype),
      updates=jnp.zeros(size, jnp.int32),
    )

  def combine(given: lifting.Given) -> lifting.Combined:
    old, active = given.memory, given.active
    dtype = old.baseline.dtype
    _tracked.check(old.squares, given.task_grads)
    squares = jax.tree.map(
      lambda s, g: s + jnp.square(g.astype(s.dtype)),
      old.squares,
      given.task_grads,
    )
    risk = given.axes.sum_shards(
      _excess_risk(given.task_grads, squares, jnp.zeros_like(old.baseline))
    )
    updates = _tracked.count_of(old.updates, active)
    # The running mean of the first updates.
    warm = updates <= warmup
    towards = (risk - old.baseline) / jnp.maximum(updates, 1).astype(dtype)
    baseline = jnp.where(active & warm, old.baseline + towards, old.baseline)
    compared = ~warm & (baseline > 0)
    relative = jnp.where(compared, risk / jnp.where(compared, baseline, 1), 1)
    moved = old.log_weights + step_size * jnp.minimum(relative, _LARGEST)
    # The exponent of an absent task is its weight of zero.
    log_weights = jax.nn.log_softmax(jnp.where(active, moved, -jnp.inf))
    # The share that absent tasks leave to the others; all sum to one.
    room = jax.nn.logsumexp(jnp.where(active, old.log_weights, -jnp.inf))
    room = jnp.where(jnp.all(active), 0, room)
    weights = jnp.where(active, jnp.exp(log_weights), 0)
    return lifting.Combined(
      updates=algebra.weighted_sum(weights, given.unmasked, given.active),
      weights=weights,
      memory=ExcessMtlMemory(
        squares,
        jnp.where(active, log_weights + room, old.log_weights).astype(dtype),
        baseline.astype(dtype),
        updates,
      ),
    )

  return lifting.lift(
    combine,
    memory=memory,
    num_tasks=num_tasks,
    axes=aggregation.Axes(axis_name, reduce, shard_axis),
  )


def _excess_risk(task_grads: Any, squares: Any, total: jax.Array) -> jax.Array:
  """Sum over coordinates of g^2 / sqrt(S), added to `total` [T]."""
  for g, s in zip(
    jax.tree.leaves(task_grads), jax.tree.leaves(squares), strict=True
  ):
    g = g.astype(s.dtype)
    terms = jnp.where(s > 0, g * (g / jnp.sqrt(jnp.where(s > 0, s, 1))), 0)
    total = total + jnp.sum(terms, axis=tuple(range(1, g.ndim))).astype(
      total.dtype
    )
  return total
