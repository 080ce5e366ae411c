"""The mean without the largest and smallest values."""

from collections.abc import Hashable

import jax
import jax.numpy as jnp

from mtl_jax.transforms.contract import aggregation
from mtl_jax.transforms.contract import algebra
from mtl_jax.transforms.contract import arguments
from mtl_jax.transforms.contract import lifting


def trimmed_mean(
  trim: int = 1,
  *,
  num_tasks: int | None = None,
  axis_name: Hashable | None = None,
  reduce: str = 'mean',
  shard_axis: Hashable | None = None,
) -> aggregation.Aggregator:
  r"""Coordinate-wise trimmed mean of the task gradients.

  With :math:`g_{(1)} \le \dots \le g_{(T)}` the values of one coordinate in
  order

  .. math:: d = \frac{1}{T - 2 b} \sum_{k = b + 1}^{T - b} g_{(k)}

  Scale: a mean. Degree of homogeneity: 1. With no more than 2 b active tasks it
  is their mean. It has no weights: every coordinate has others.

  Only finite values are trimmed. A coordinate in which an active task has NaN
  or an infinity is NaN, so that a diverging run fails visibly.

  Args:
    trim: b, how many values are dropped at each end.
    num_tasks: T, to have the Gram matrix in the state.
    axis_name: see `from_gram`.
    reduce: see `from_gram`.
    shard_axis: see `from_gram`.

  Returns:
    An aggregator.

  Raises:
    ValueError: for a negative `trim`, and for a `num_tasks` of at most twice
      `trim`.

  Examples:
    >>> import jax.numpy as jnp, mtl_jax
    >>> task_grads = jnp.array([[1.0, -9.0], [2.0, 3.0], [70.0, 4.0]])
    >>> tx = mtl_jax.trimmed_mean(trim=1)
    >>> print(tx.update(task_grads, tx.init(jnp.zeros(2)))[0])
    [2. 3.]

  References:
    Yin et al., `Byzantine-Robust Distributed Learning: Towards Optimal
    Statistical Rates <https://arxiv.org/abs/1803.01498>`_, 2018, definition 2
  """
  arguments.check_count('trim', trim, 0)

  def check(size):
    if 1 <= size <= 2 * trim:
      raise ValueError(
        f'num_tasks must be more than twice trim={trim}, got {size}'
      )

  if num_tasks is not None:
    check(num_tasks)

  def combine(given: lifting.Given) -> lifting.Combined:
    check(given.active.shape[0])
    return _combine(given, trim)

  return lifting.lift(
    combine,
    num_tasks=num_tasks,
    axes=aggregation.Axes(axis_name, reduce, shard_axis),
    weights='none',
  )


def _combine(given: lifting.Given, trim: int) -> lifting.Combined:
  """The update; the mean for too few active tasks."""
  size, count = given.active.shape[0], jnp.sum(given.active)
  cut = jnp.where(count > 2 * trim, trim, 0)
  rank = jnp.arange(size)
  kept = (rank >= cut) & (rank < count - cut)

  def of_leaf(leaf):
    wide = leaf.astype(algebra.wide(leaf.dtype))
    active = algebra.row(given.active, leaf)
    # Absent tasks come last, after all finite values.
    ordered = jnp.sort(jnp.where(active, wide, jnp.inf), axis=0)
    total = jnp.sum(jnp.where(algebra.row(kept, leaf), ordered, 0), axis=0)
    mean = total / jnp.maximum(count - 2 * cut, 1)
    finite = jnp.all(jnp.isfinite(wide) | ~active, axis=0)
    return jnp.where(finite, mean, jnp.nan).astype(leaf.dtype)

  return lifting.Combined(jax.tree.map(of_leaf, given.task_grads))
