"""Conflict-free inverse gradients."""

from collections.abc import Hashable
from collections.abc import Sequence

import jax.numpy as jnp

from mtl_jax.transforms.contract import aggregation
from mtl_jax.transforms.contract import arguments
from mtl_jax.transforms.contract import gram_based
from mtl_jax.transforms.solvers import simplex

# Eigenvalues of the matrix of cosines below this, times the number of tasks,
# are rounding of linearly dependent gradients; so is what is left of the
# preference below this share of it.
_RANK_TOLERANCE = 1e-5


def con_fig(
  *,
  preference: Sequence[float] | None = None,
  num_tasks: int | None = None,
  axis_name: Hashable | None = None,
  reduce: str = 'mean',
  shard_axis: Hashable | None = None,
) -> aggregation.Aggregator:
  r"""Conflict-free inverse gradients (ConFIG).

  The direction whose cosines with all task gradients are equal (or in the
  proportion of a preference p), as long as the projections of all gradients on
  it together:

  .. math::
    d = \Big\langle \sum_i g_i, \hat u \Big\rangle \hat u, \qquad
    \hat u = \frac{u}{|u|}, \qquad
    u = U^{+} p = \sum_i (C^{+} p)_i \, g_i / |g_i|

  with the unit gradients as rows of U, and the matrix C of their cosines.

  Scale: T for identical tasks, a sum. Degree of homogeneity: 1. Tasks with a
  zero gradient have no direction and are left out. Where gradients are linearly
  dependent the cosines are equal as nearly as they can be; where no direction
  is left (tasks cancel) the update is zero.

  Args:
    preference: [T], non-negative and not all zero; None for equal cosines.
    num_tasks: T, to have weights and Gram matrix in the state.
    axis_name: see `from_gram`.
    reduce: see `from_gram`.
    shard_axis: see `from_gram`.

  Returns:
    An aggregator.

  Raises:
    ValueError: for a preference that is negative, non-finite, all zero or of
      another length than the tasks.

  Examples:
    >>> import jax.numpy as jnp, mtl_jax
    >>> task_grads = jnp.array([[4.0, 0.0], [0.0, 2.0]])
    >>> tx = mtl_jax.con_fig()
    >>> jnp.set_printoptions(precision=3)
    >>> print(tx.update(task_grads, tx.init(jnp.zeros(2)))[0])
    [3. 3.]

  References:
    Liu, Chu and Thuerey, `ConFIG: Towards Conflict-free Training of Physics
    Informed Neural Networks <https://arxiv.org/abs/2408.11104>`_, 2024, eq. 2
  """
  preference = arguments.as_preference(preference, num_tasks)

  def weights_fn(gram, *, losses, active):
    del losses
    lengths, cos, usable = simplex.cosines(gram, active)
    wanted = usable.astype(gram.dtype)
    if preference is not None:
      arguments.check_length('preference', preference, gram.shape[0])
      wanted = jnp.where(usable, jnp.asarray(preference, gram.dtype), 0)
    largest = jnp.max(wanted)
    wanted = wanted / jnp.where(largest > 0, largest, 1)
    cos = jnp.where(usable[:, None] & usable[None, :], cos, 0)
    values, vectors = jnp.linalg.eigh(cos)
    kept = values > _RANK_TOLERANCE * gram.shape[0]
    along = jnp.where(kept, vectors.T @ wanted, 0)
    along = jnp.where(
      jnp.abs(along) > _RANK_TOLERANCE * jnp.sqrt(wanted @ wanted), along, 0
    )
    safe = jnp.where(kept, values, 1)
    direction = vectors @ (along / safe)
    square = along @ (along / safe)
    # |u|^2 and the inner products of u with the unit gradients.
    projections = vectors @ along
    stretch = (
      (lengths * usable) @ projections / jnp.where(square > 0, square, 1)
    )
    # The quotient of lengths first; each alone may be far from 1.
    return jnp.where(usable, stretch / lengths * direction, 0)

  return gram_based.from_gram(
    weights_fn,
    num_tasks=num_tasks,
    axis_name=axis_name,
    reduce=reduce,
    shard_axis=shard_axis,
    residual=False,
  )
