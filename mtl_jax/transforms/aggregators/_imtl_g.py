"""Impartial multi-task learning, gradient part."""

from collections.abc import Hashable

import jax.numpy as jnp

from mtl_jax.transforms.contract import aggregation
from mtl_jax.transforms.contract import gram_based
from mtl_jax.transforms.solvers import simplex

# Eigenvalues of the matrix of cosines below this, times the number of tasks,
# are rounding of linearly dependent gradients. So are inner products of unit
# gradients with their sum if all of them are below this.
_RANK_TOLERANCE = 1e-5


def imtl_g(
  *,
  num_tasks: int | None = None,
  axis_name: Hashable | None = None,
  reduce: str = 'mean',
  shard_axis: Hashable | None = None,
) -> aggregation.Aggregator:
  r"""Impartial multi-task learning, the gradient-weighting part (IMTL-G).

  The combination whose projections on all task gradients are equally long:

  .. math::
    d = \sum_i w_i g_i, \quad \sum_i w_i = 1, \quad
    \langle d, g_i / |g_i| \rangle = \langle d, g_j / |g_j| \rangle

  that is :math:`w_i \propto (C^{+} \mathbf{1})_i / |g_i|` with the
  pseudo-inverse of the matrix C of cosines. It equals the paper's closed form
  for linearly independent gradients, and also handles dependent ones.

  Scale: weights sum to 1 and may be negative. Degree of homogeneity: 1. Tasks
  with a zero gradient have no direction and are ignored. If the weights cannot
  sum to 1, or the unit gradients sum to zero (tasks cancel), the update is
  zero.

  Args:
    num_tasks: T, to have weights and Gram matrix in the state.
    axis_name: see `from_gram`.
    reduce: see `from_gram`.
    shard_axis: see `from_gram`.

  Returns:
    An aggregator.

  Examples:
    >>> import jax.numpy as jnp, mtl_jax
    >>> task_grads = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
    >>> tx = mtl_jax.imtl_g()
    >>> jnp.set_printoptions(precision=3)
    >>> print(tx.update(task_grads, tx.init(jnp.zeros(3)))[0])
    [0.077 1.    1.   ]

  References:
    Liu et al., `Towards Impartial Multi-task Learning
    <https://openreview.net/forum?id=IMPnRXEWpvr>`_, 2021, section 3

    Quinton and Rey, `Jacobian Descent for Multi-Objective Optimization
    <https://arxiv.org/abs/2406.16232>`_, 2024 (a pseudo-inverse, of the Gram
    matrix, for dependent gradients)
  """

  def weights_fn(gram, *, losses, active):
    del losses
    lengths, cos, usable = simplex.cosines(gram, active)
    cos = jnp.where(usable[:, None] & usable[None, :], cos, 0)
    values, vectors = jnp.linalg.eigh(cos)
    kept = values > _RANK_TOLERANCE * gram.shape[0]
    inverse = jnp.where(kept, 1 / jnp.where(kept, values, 1), 0)
    ones = usable.astype(gram.dtype)
    equal = vectors @ (inverse * (vectors.T @ ones))
    unnormalised = jnp.where(usable, equal / lengths, 0)
    total = jnp.sum(unnormalised)
    largest = jnp.max(jnp.abs(unnormalised))
    there = jnp.abs(total) > _RANK_TOLERANCE * largest
    # If unit gradients cancel, ones are orthogonal to all kept directions.
    there &= jnp.max(jnp.abs(cos @ ones)) > _RANK_TOLERANCE
    return jnp.where(there, unnormalised / jnp.where(there, total, 1), 0)

  return gram_based.from_gram(
    weights_fn,
    num_tasks=num_tasks,
    axis_name=axis_name,
    reduce=reduce,
    shard_axis=shard_axis,
    residual=False,
  )
