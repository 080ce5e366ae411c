"""Projection on the dual cone of task gradients, solved on the device."""

import jax
import jax.numpy as jnp

from mtl_jax.transforms.contract import gram_based
from mtl_jax.transforms.solvers import simplex

# Newton's method with a corrector gains a digit or more an iteration; float32
# has seven.
_ITERATIONS = 15
# Steps stop this far before the boundary of the positive orthant.
_TO_BOUNDARY = 0.99
# A sum that is shorter than this share of its terms is rounding.
_SHORTEST = 1e-3


def _nonnegative_quadratic(matrix: jax.Array, linear: jax.Array) -> jax.Array:
  r"""Minimises linear . z + z' matrix z / 2 over z >= 0.

  Mehrotra's predictor and corrector (Nocedal and Wright, Numerical
  Optimization, 2nd ed. 2006, chapter 16.6) for the optimality conditions
  :math:`y = M z + q, \; y_i z_i = 0, \; y, z \ge 0`.

  Args:
    matrix: [T, T], positive semidefinite with a diagonal of 1.
    linear: [T].

  Returns:
    z [T], and zero where y is the larger of the two.
  """
  z = jnp.ones_like(linear)
  y = jnp.maximum(jnp.abs(matrix @ z + linear), 1)

  def longest(share, x, dx):
    ratio = jnp.where(dx < 0, -x / jnp.where(dx < 0, dx, -1), jnp.inf)
    return jnp.minimum(1, share * jnp.min(ratio))

  def step(carry, _):
    z, y = carry
    infeasible = matrix @ z + linear - y
    solve = simplex.factorised(matrix + jnp.diag(y / z))

    def direction(products):
      dz = solve(products / z - infeasible)
      return dz, products / z - y / z * dz

    dz, dy = direction(-z * y)
    length = jnp.minimum(longest(1, z, dz), longest(1, y, dy))
    gap, left = z @ y, (z + length * dz) @ (y + length * dy)
    centre = gap / z.shape[0] * (left / gap) ** 3
    dz, dy = direction(centre - z * y - dz * dy)
    length = jnp.minimum(
      longest(_TO_BOUNDARY, z, dz), longest(_TO_BOUNDARY, y, dy)
    )
    moved = z + length * dz, y + length * dy
    # Past convergence the factorisation may break down; the last good point
    # is the answer then.
    good = [jnp.all(jnp.isfinite(x) & (x > 0)) for x in moved]
    good = good[0] & good[1]
    carry = jax.tree.map(
      lambda new, old: jnp.where(good, new, old), moved, carry
    )
    return carry, None

  (z, y), _ = jax.lax.scan(step, (z, y), None, length=_ITERATIONS)
  return jnp.where(z > y, z, 0)


def dual_cone(
  gram: jax.Array, active: jax.Array, coefficients: jax.Array
) -> gram_based.Solution:
  r"""Projects combinations on the dual cone of task gradients, and sums them.

  The dual cone holds the directions that conflict with no task. With
  coefficients u the combination :math:`\sum_i u_i g_i` has the projection
  :math:`\sum_i v_i g_i`, where

  .. math::
    v = \arg\min_{v \ge u} \; v^\top G v

  Args:
    gram: [T, T].
    active: bool [T]; absent tasks get weight 0 and bound nothing.
    coefficients: [K, T], non-negative; one combination a row.

  Returns:
    The sum of all v [T], and the residual. It is the largest, over the tasks,
    of the inner products by which the projections conflict with a task, or miss
    being perpendicular to a task that was added, relative to the lengths of the
    task and of the sum. A sum shorter than a thousandth of its terms is
    rounding and counts as having that length.
  """
  lengths, cos, usable = simplex.cosines(gram, active)
  # Gradients of length 1 and coefficients of up to 1 give every problem the
  # same scale; projection is homogeneous.
  terms = jnp.where(usable, lengths, 0)[None] * coefficients
  sizes = jax.lax.stop_gradient(jnp.max(terms, axis=1))
  units = terms / jnp.where(sizes > 0, sizes, 1)[:, None]
  # An excluded task adds nothing and meets no other.
  out = jnp.where(usable, 0, 1).astype(gram.dtype)

  def project(u):
    linear = cos @ u + out
    still, still_linear = jax.lax.stop_gradient((cos, linear))
    z = _nonnegative_quadratic(still, still_linear)
    # Perpendicular to the added tasks, and without any part of the others.
    added = z > 0
    keep = added.astype(z.dtype)
    matrix = still * keep[:, None] * keep[None, :] + jnp.diag(1 - keep)
    inner = cos @ z + linear
    z = simplex.last_step(z, jnp.where(added, inner, 0), matrix)
    wrong = jnp.where(added, jnp.abs(inner), jnp.maximum(-inner, 0))
    return u + z, wrong

  v, wrong = jax.vmap(project)(units)
  total = sizes @ v

  still = jax.lax.stop_gradient(total)
  length = jnp.sqrt(jnp.maximum(still @ cos @ still, 0))
  length = jnp.maximum(length, _SHORTEST * jnp.sum(still))
  residual = jnp.max(sizes @ wrong) / jnp.where(length > 0, length, 1)
  weights = jnp.where(usable, total / lengths, 0)
  return gram_based.Solution(weights, jax.lax.stop_gradient(residual))
