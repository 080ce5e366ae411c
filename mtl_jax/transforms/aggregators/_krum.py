"""Krum: the task gradients with the closest neighbours."""

from collections.abc import Hashable

import jax
import jax.numpy as jnp

from mtl_jax.transforms.contract import aggregation
from mtl_jax.transforms.contract import arguments
from mtl_jax.transforms.contract import gram_based


def krum(
  num_byzantine: int = 1,
  num_selected: int = 1,
  *,
  num_tasks: int | None = None,
  axis_name: Hashable | None = None,
  reduce: str = 'mean',
  shard_axis: Hashable | None = None,
) -> aggregation.Aggregator:
  r"""Krum and Multi-Krum: the mean of the most central task gradients.

  .. math::
    d = \frac{1}{m} \sum_{i \in S} g_i, \qquad
    s_i = \sum_{j \to i} |g_i - g_j|^2

  where the sum is over the T - f - 2 task gradients closest to
  :math:`g_i`, and S are the m tasks with the smallest scores. Tasks with equal
  scores are taken in their order.

  Distances come from the Gram matrix: in float32 they lose most digits for
  gradients that differ by less than a thousandth of their length.

  Scale: a mean. Degree of homogeneity: 1. With fewer active tasks than 2 f + 3
  or m it is the mean of the active ones.

  Args:
    num_byzantine: f, how many task gradients may be arbitrarily wrong.
    num_selected: m; 1 is Krum, more is Multi-Krum.
    num_tasks: T, to have weights and Gram matrix in the state.
    axis_name: see `from_gram`.
    reduce: see `from_gram`.
    shard_axis: see `from_gram`.

  Returns:
    An aggregator.

  Raises:
    ValueError: for a negative `num_byzantine`, a `num_selected` below 1, and
      fewer tasks than m or, unless f is 0, than 2 f + 3.

  Examples:
    >>> import jax.numpy as jnp, mtl_jax
    >>> task_grads = jnp.array([[1.0], [3.0], [2.0], [2.0], [90.0]])
    >>> tx = mtl_jax.krum(num_byzantine=1, num_selected=4)
    >>> print(tx.update(task_grads, tx.init(jnp.zeros(1)))[0])
    [2.]

  References:
    Blanchard et al., `Machine Learning with Adversaries: Byzantine Tolerant
    Gradient Descent <https://arxiv.org/abs/1703.02757>`_, 2017, section 4
  """
  arguments.check_count('num_byzantine', num_byzantine, 0)
  arguments.check_count('num_selected', num_selected)
  # With nobody to outvote, a mean is as good.
  refused = num_selected
  if num_byzantine:
    refused = max(2 * num_byzantine + 3, num_selected)

  def check(size):
    if 1 <= size < refused:
      raise ValueError(
        f'num_tasks must be at least {refused} for num_byzantine='
        f'{num_byzantine} and num_selected={num_selected}, got {size}'
      )

  if num_tasks is not None:
    check(num_tasks)

  def weights_fn(gram, *, losses, active):
    del losses
    check(gram.shape[0])
    return _weights(gram, active, num_byzantine, num_selected)

  return gram_based.from_gram(
    weights_fn,
    num_tasks=num_tasks,
    axis_name=axis_name,
    reduce=reduce,
    shard_axis=shard_axis,
    residual=False,
  )


def _weights(
  gram: jax.Array, active: jax.Array, num_byzantine: int, num_selected: int
) -> jax.Array:
  """The weights [T]; the mean's weights for too few active tasks."""
  size, count = gram.shape[0], jnp.sum(active)
  squares = jnp.diagonal(gram)
  distances = squares[:, None] + squares[None, :] - 2 * gram
  # An absent task and the task itself do not count as neighbours.
  other = active[None, :] & ~jnp.eye(size, dtype=bool)
  closest = jnp.sort(jnp.where(other, distances, jnp.inf), axis=1)
  near = jnp.arange(size) < count - num_byzantine - 2
  scores = jnp.sum(jnp.where(near[None, :], closest, 0), axis=1)
  order = jnp.argsort(jnp.where(active, scores, jnp.inf), stable=True)
  selected = jnp.zeros(size, bool).at[order[:num_selected]].set(True)
  enough = count >= max(2 * num_byzantine + 3, num_selected)
  selected = jnp.where(enough, selected, active)
  return selected / jnp.maximum(jnp.sum(selected), 1).astype(gram.dtype)
