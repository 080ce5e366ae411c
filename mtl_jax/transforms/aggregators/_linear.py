"""Linear scalarization."""

from collections.abc import Hashable
from collections.abc import Sequence

import jax.numpy as jnp

from mtl_jax.transforms.contract import aggregation
from mtl_jax.transforms.contract import arguments
from mtl_jax.transforms.contract import gram_based


def linear(
  weights: Sequence[float] | None = None,
  *,
  num_tasks: int | None = None,
  axis_name: Hashable | None = None,
  reduce: str = 'mean',
  shard_axis: Hashable | None = None,
) -> aggregation.Aggregator:
  r"""Weighted sum of task gradients; their mean by default.

  .. math:: d = \sum_i w_i g_i

  Scale: the mean of the task gradients, or the given weighted sum. Degree of
  homogeneity: 1. Absent tasks drop out of the mean; given weights of the others
  do not change.

  Args:
    weights: [T], non-negative and not all zero; None for the mean.
    num_tasks: T, to have weights and Gram matrix in the state.
    axis_name: see `from_gram`.
    reduce: see `from_gram`.
    shard_axis: see `from_gram`.

  Returns:
    An aggregator. `shared_only` also multiplies heads by the task's weight, so
    that equal weights give the gradient of the mean loss.

  Raises:
    ValueError: for negative, non-finite or all-zero weights, or of a length
      other than `num_tasks`.

  Examples:
    >>> import jax.numpy as jnp, mtl_jax
    >>> task_grads = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
    >>> tx = mtl_jax.linear()
    >>> print(tx.update(task_grads, tx.init(jnp.zeros(3)))[0])
    [1. 1. 1.]
    >>> tx = mtl_jax.linear(weights=(0.5, 1.0))
    >>> print(tx.update(task_grads, tx.init(jnp.zeros(3)))[0])
    [4.  1.5 1.5]

  References:
    Kurin et al., `In Defense of the Unitary Scalarization for Deep Multi-Task
    Learning <https://arxiv.org/abs/2201.04122>`_, 2022
  """
  if weights is not None:
    weights = arguments.as_weights('weights', weights)
    arguments.check_length('weights', weights, num_tasks)

  def weights_fn(gram, *, losses, active):
    del losses
    if weights is None:
      return active / jnp.maximum(jnp.sum(active), 1).astype(gram.dtype)
    arguments.check_length('weights', weights, gram.shape[0])
    return jnp.asarray(weights, gram.dtype)

  return gram_based.from_gram(
    weights_fn,
    num_tasks=num_tasks,
    axis_name=axis_name,
    reduce=reduce,
    shard_axis=shard_axis,
    residual=False,
    head_scale='weights',
  )
