"""Conflict-free inverse gradients."""

from collections.abc import Hashable
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from mtl_jax.transforms.contract import aggregation
from mtl_jax.transforms.contract import algebra
from mtl_jax.transforms.contract import arguments
from mtl_jax.transforms.contract import lifting
from mtl_jax.transforms.solvers import simplex

# Eigenvalues of the matrix of cosines below this, in units of the dtype's
# resolution times the number of tasks, are rounding of linearly dependent
# gradients.
_RANK_TOLERANCE = 8
# If all inner products of unit gradients with their weighted sum (weights up to
# 1) are below this, the gradients cancel and the rest is rounding.
_CANCELLED = 1e-5


def con_fig(
  *,
  preference: Sequence[float] | None = None,
  num_tasks: int | None = None,
  axis_name: Hashable | None = None,
  reduce: str = 'mean',
  shard_axis: Hashable | None = None,
) -> aggregation.Aggregator:
  r"""Conflict-free inverse gradients (ConFIG).

  The direction whose cosines with all task gradients are equal (or proportional
  to a preference p). Its length is the sum of the gradients' projections on it:

  .. math::
    d = \Big\langle \sum_i g_i, \hat u \Big\rangle \hat u, \qquad
    \hat u = \frac{u}{|u|}, \qquad
    u = U^{+} p = \sum_i (C^{+} p)_i \, g_i / |g_i|

  with the unit gradients as rows of U, and the matrix C of their cosines. The
  last digits come from the gradients, which takes two more combinations of
  them: from C alone the error grows with the square of their condition number.

  Scale: T for identical tasks, a sum. Degree of homogeneity: 1. Tasks with a
  zero gradient have no direction and are ignored. If gradients are linearly
  dependent, the cosines are as nearly equal as possible. If no direction
  remains (tasks cancel), the update is zero.

  Args:
    preference: [T], non-negative and not all zero; None for equal cosines.
    num_tasks: T, to have weights, Gram matrix and residual in the state. The
      residual is the distance of the cosines from those in the equation.
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

  def combine(given: lifting.Given) -> lifting.Combined:
    gram, size = given.gram, given.gram.shape[0]
    lengths, cos, usable = simplex.cosines(gram, given.active)
    wanted = usable.astype(gram.dtype)
    if preference is not None:
      arguments.check_length('preference', preference, size)
      wanted = jnp.where(usable, jnp.asarray(preference, gram.dtype), 0)
    largest = jnp.max(wanted)
    wanted = wanted / jnp.where(largest > 0, largest, 1)
    cos = jnp.where(usable[:, None] & usable[None, :], cos, 0)
    # Only the correction has a derivative, which is the solution's.
    values, vectors = jnp.linalg.eigh(jax.lax.stop_gradient(cos))
    kept = values > _RANK_TOLERANCE * jnp.finfo(gram.dtype).eps * size
    inverse = jnp.where(kept, 1 / jnp.where(kept, values, 1), 0)

    def combination(shares):
      """A sum of unit gradients, its inner products with them, its square."""
      weights = jnp.where(usable, shares / lengths, 0)
      if given.unmasked is None:  # The Gram matrix is all there is.
        inner = gram @ weights
        return None, jnp.where(usable, inner / lengths, 0), weights @ inner
      u = algebra.weighted_sum(
        weights, given.unmasked, given.active, keep_wide=True
      )
      inner, square = algebra.with_rows(u, given.unmasked, size, given.axes)
      return u, jnp.where(usable, inner / lengths, 0), square

    # Rounding of the cosines costs the square of the condition number. One
    # Newton step for the least-squares problem |U u - p|, with the slope from
    # the gradients, reduces that to the condition number.
    shares = vectors @ (inverse * (vectors.T @ wanted))
    shares = jax.lax.stop_gradient(shares)
    _, before, _ = combination(shares)
    _, slope, _ = combination(wanted - before)
    # The remainder of the preference, as far as unit gradients can supply it.
    missing = vectors @ (inverse * (vectors.T @ slope))
    shares += vectors @ (inverse * (vectors.T @ missing))
    u, inner, square = combination(shares)

    there = (square > 0) & (jnp.max(jnp.abs(cos @ wanted)) > _CANCELLED)
    square = jnp.where(there, square, 1)
    stretch = jnp.where(there, lengths @ inner / square, 0)
    off = jnp.where(there, missing - (inner - before), 0)
    return lifting.Combined(
      updates=jax.tree.map(
        lambda g, v: (stretch * v).astype(g.dtype), given.task_grads, u
      ),
      # The quotient of lengths first; each alone may be far from 1.
      weights=jnp.where(usable, stretch / lengths * shares, 0),
      residual=jax.lax.stop_gradient(jnp.sqrt((off @ off) / square)),
      update_inner=(stretch * lengths * inner, stretch * stretch * square),
    )

  return lifting.lift(
    combine,
    num_tasks=num_tasks,
    axes=aggregation.Axes(axis_name, reduce, shard_axis),
    residual=True,
    gram_only=True,
  )
