"""Small convex problems over the simplex, solved on the device.

Every solver in this package runs a fixed number of `jax.lax` iterations, so
that it works inside `jit`, `vmap` and `grad` without a callback to the host.
The solvers use the *cosines* of the task gradients instead of their inner
products: lengths that differ by orders of magnitude then cost no accuracy.

Their derivatives are the solution's, not the iterations' (`last_step`): past
convergence an iteration has no useful derivative. A residual has no derivative,
because it is only a diagnostic. (`aligned_mtl` uses rotations instead of a
solver and is differentiated through them.)
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from mtl_jax.transforms.contract import gram_based

_ITERATIONS = 30
# Relative ridge of Newton matrices only, in units of the dtype's resolution. It
# keeps the factorisation alive for linearly dependent gradients and leaves the
# point of convergence alone.
_RIDGE = 8
# Steps stop this far before the boundary of the positive orthant.
_TO_BOUNDARY = 0.95
_CENTRING = 0.15


def cosines(gram: jax.Array, active: jax.Array):
  """Splits a Gram matrix into lengths and cosines.

  Args:
    gram: [T, T].
    active: bool [T].

  Returns:
    lengths [T], 1 where a task is absent or its gradient zero; cosines [T, T]
    with a diagonal of 1, 0 elsewhere in such rows; and which tasks are usable,
    bool [T].
  """
  squares = jnp.diagonal(gram)
  usable = active & (squares > 0)
  lengths = jnp.sqrt(jnp.where(usable, squares, 1))
  both = usable[:, None] & usable[None, :]
  cos = jnp.where(both, gram / lengths[:, None] / lengths[None, :], 0)
  # Rounding is clipped, but a cosine of 1 keeps its derivative.
  cos = cos + jax.lax.stop_gradient(jnp.clip(cos, -1, 1) - cos)
  cos = jnp.where(jnp.eye(gram.shape[0], dtype=bool), 1, cos)
  return lengths, cos, usable


def factorised(matrix: jax.Array) -> Callable[[jax.Array], jax.Array]:
  """Solves linear equations with one positive semidefinite matrix [T, T].

  The matrix is scaled to a diagonal of 1 and gets a ridge of rounding size.
  """
  scale = jax.lax.rsqrt(jnp.diagonal(matrix))
  matrix = matrix * scale[:, None] * scale[None, :]
  ridge = _RIDGE * jnp.finfo(matrix.dtype).eps
  matrix = matrix + ridge * jnp.eye(matrix.shape[0], dtype=matrix.dtype)
  lower = jnp.linalg.cholesky(matrix)

  def solve(right):
    return scale * jax.scipy.linalg.cho_solve((lower, True), scale * right)

  return solve


def last_step(
  v: jax.Array,
  conditions: jax.Array,
  matrix: jax.Array,
  a: jax.Array | None = None,
) -> jax.Array:
  """The solution v, with its derivative by the arguments of the conditions.

  The last Newton step from v has the solution's derivative (the implicit
  function theorem). Only this derivative is kept.

  Args:
    v: [T], a solution of the conditions.
    conditions: [T], zero at the solution; its derivative at a fixed v counts.
    matrix: [T, T], derivative of the conditions by v.
    a: [T]; with it the conditions hold up to a multiple of a, on a . v = 1.

  Returns:
    v [T].
  """
  a = jnp.zeros_like(v) if a is None else a
  v, still = jax.lax.stop_gradient((v, a))
  # On the plane this changes nothing; off the plane the matrix may be singular.
  matrix = matrix + still[:, None] * still[None, :]
  solve = factorised(jax.lax.stop_gradient(matrix))
  # If gradients are so dependent that this fails, there is no derivative.
  works = jnp.all(jnp.isfinite(solve(jnp.ones_like(v))))
  off = jnp.where(works, a @ v - still @ v, 0)
  conditions = jnp.where(works, conditions, 0)
  free, along = solve(conditions + still * off), solve(still)
  turn = still @ along
  step = free + along * ((off - still @ free) / jnp.where(turn > 0, turn, 1))
  works &= jnp.all(jnp.isfinite(step))
  return v - jnp.where(works, step - jax.lax.stop_gradient(step), 0)


def simplex_projection(x: jax.Array, active: jax.Array) -> gram_based.Solution:
  r"""The point on the simplex that is nearest to x.

  .. math::
    w_i = \max(x_i - \theta, 0), \quad \sum_i w_i = 1

  Args:
    x: [T].
    active: bool [T]; absent tasks get weight 0.

  Returns:
    weights [T], and how far their sum is from 1.
  """
  # Relative to the largest entry, theta is between -1 and 0 and not lost in
  # rounding. Entries below that range never have a weight.
  x = jnp.where(active, x, -jnp.inf)
  largest = jnp.max(x)
  x = x - jnp.where(jnp.isfinite(largest), largest, 0)
  x = jnp.where(active, x, -2)
  ordered = -jnp.sort(-x)
  counts = jnp.arange(1, x.shape[0] + 1)
  inside = ordered * counts > jnp.cumsum(ordered) - 1
  smallest = jnp.min(jnp.where(inside, ordered, 0))
  on = active & (x >= jax.lax.stop_gradient(smallest))
  total = jnp.sum(jnp.where(on, x, 0))
  theta = (total - 1) / jnp.maximum(jnp.sum(on), 1)
  weights = jnp.where(on, jnp.maximum(x - theta, 0), 0)
  residual = jnp.where(jnp.any(active), jnp.abs(jnp.sum(weights) - 1), 0)
  return gram_based.Solution(weights, jax.lax.stop_gradient(residual))


def project_simplex(x: jax.Array, active: jax.Array) -> jax.Array:
  """The weights [T] of `simplex_projection`."""
  return simplex_projection(x, active).weights


def relative(lengths: jax.Array, usable: jax.Array) -> jax.Array:
  """Shortest usable length over each length; 0 for an excluded task."""
  shortest = jnp.min(jnp.where(usable, lengths, jnp.inf))
  shortest = jnp.where(jnp.any(usable), shortest, 1)
  return jnp.where(usable, shortest / lengths, 0)


def interior_point(
  derivatives: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
  a: jax.Array,
  start: jax.Array | None = None,
) -> jax.Array:
  r"""Minimises a convex function over {v >= 0, a . v = 1}.

  A primal-dual path-following method (Nocedal and Wright, Numerical
  Optimization, 2nd ed. 2006, chapters 16.6 and 19.2): Newton steps on the
  optimality conditions, whose products v_i y_i are driven to zero.

  Args:
    derivatives: `v [T] -> gradient [T], Hessian [T, T]`.
    a: [T], non-negative with at least one positive entry. A variable whose
      entry is zero should have a separate positive definite Hessian.
    start: v [T] to begin at, positive with a . v = 1; one with equal a_i v_i if
      None.

  Returns:
    v [T], positive.
  """
  size = a.shape[0]
  count = jnp.maximum(jnp.sum(a > 0), 1)
  v = jnp.where(a > 0, 1 / jnp.where(a > 0, a, 1), 1) / count
  v = v if start is None else start
  gradient, _ = derivatives(v)
  y = jnp.full_like(v, jnp.max(jnp.abs(gradient)) + 1e-3)

  def step(carry, _):
    v, y, nu = carry
    gradient, hessian = derivatives(v)
    tau = _CENTRING * (v @ y) / size
    solve = factorised(hessian + jnp.diag(y / v))
    free, along = solve(nu * a + tau / v - gradient), solve(a)
    dnu = (1 - a @ v - a @ free) / (a @ along)
    dv = free + dnu * along
    dy = tau / v - y - y / v * dv

    def longest(x, dx):
      ratio = jnp.where(dx < 0, -x / jnp.where(dx < 0, dx, -1), jnp.inf)
      return jnp.minimum(1, _TO_BOUNDARY * jnp.min(ratio))

    length = jnp.minimum(longest(v, dv), longest(y, dy))
    moved = (v + length * dv, y + length * dy, nu + length * dnu)
    # Past convergence the factorisation may break down; the last good point
    # is the answer then.
    good = jnp.all(jnp.isfinite(dv)) & jnp.all(jnp.isfinite(dy))
    carry = jax.tree.map(
      lambda new, old: jnp.where(good, new, old), moved, (v, y, nu)
    )
    return carry, None

  first = (v, y, jnp.zeros((), a.dtype))
  (v, _, _), _ = jax.lax.scan(step, first, None, length=_ITERATIONS)
  return v


def to_simplex(v: jax.Array, a: jax.Array) -> jax.Array:
  weights = v * a
  total = jnp.sum(weights)
  return jnp.where(total > 0, weights / jnp.where(total > 0, total, 1), 0)


def last_step_on_simplex(v, slopes, matrix, a):
  """`last_step` for the variables that are not zero.

  Args:
    v: [T], with a . v = 1.
    slopes: [T], derivatives minus their common multiple of a.
    matrix: [T, T], second derivatives.
    a: [T].

  Returns:
    v [T].
  """
  # Of a variable and its slope only the larger one is positive.
  on = v > slopes
  keep = on.astype(v.dtype)
  matrix = matrix * keep[:, None] * keep[None, :] + jnp.diag(1 - keep)
  return last_step(v, jnp.where(on, slopes, 0), matrix, jnp.where(on, a, 0))


def min_norm(gram: jax.Array, active: jax.Array) -> gram_based.Solution:
  r"""Least-norm point of the convex hull of task gradients.

  .. math::
    \min_{w \in \Delta} \; w^\top G w

  Args:
    gram: [T, T], inner products of the task gradients.
    active: bool [T]; absent tasks get weight 0.

  Returns:
    weights on the simplex [T], and the residual: how far a task's inner product
    with the point falls short of the point's squared norm, relative to the
    task's length times the weighted sum of all lengths. In closed form for two
    tasks.
  """
  lengths, cos, usable = cosines(gram, active)
  size = gram.shape[0]
  zero = active & ~usable
  a = relative(lengths, usable)
  still_a, still_cos = jax.lax.stop_gradient((a, cos))
  if size == 1:
    v = usable.astype(gram.dtype)
  elif size == 2:
    found, _ = two_tasks(jax.lax.stop_gradient(gram), None, None)
    found = jnp.where(jnp.all(usable), found, usable.astype(gram.dtype))
    v = jnp.where(usable, found / jnp.where(usable, still_a, 1), 0)
  else:
    # Equal v instead of equal weights: a gradient that is longer by orders of
    # magnitude would start that far from its optimum. The largest a_i is 1.
    start = jnp.full_like(a, 1 / jnp.maximum(jnp.sum(still_a), 1))
    v = interior_point(lambda v: (still_cos @ v, still_cos), still_a, start)
    total = v @ still_a
    v = jnp.where(usable, v / jnp.where(total > 0, total, 1), 0)
  slopes = cos @ v
  level = jax.lax.stop_gradient(v @ slopes)
  v = last_step_on_simplex(v, slopes - level * a, still_cos, a)
  weights = to_simplex(v, a)
  # A task with a zero gradient is already a minimum.
  some_zero = jnp.any(zero)
  weights = jnp.where(
    some_zero, zero / jnp.maximum(jnp.sum(zero), 1), weights
  ).astype(gram.dtype)

  v = weights * lengths
  total = jnp.maximum(jnp.sum(v), jnp.finfo(v.dtype).tiny)
  unit = v / total
  inner = cos @ unit
  norm = unit @ inner
  # |g_w|^2 - g_i.g_w, divided by |g_i| sum_j w_j |g_j|.
  shortfall = jnp.where(usable, norm * total / lengths - inner, 0)
  residual = jnp.where(some_zero, 0, jnp.maximum(jnp.max(shortfall), 0))
  return gram_based.Solution(weights, jax.lax.stop_gradient(residual))


def two_tasks(gram, linear, radius, floor=0.0) -> tuple[jax.Array, jax.Array]:
  r"""Minimises linear . w + radius |g_w| (or |g_w| alone) for two tasks.

  With x the weight of the longer gradient, |g_w|^2 = A (x - m)^2 + h. Without a
  linear part x = m. With it, s = (linear_1 - linear_2) / (radius sqrt A)
  is minus the cosine at the optimum: x = m - s sqrt(h / (A (1 - s^2))).

  Args:
    gram: [2, 2].
    linear: [2], or None.
    radius: scalar, with `linear`.
    floor: h counts as at least the square of this.

  Returns:
    w [2] on the simplex, and |g_w| with that h. This form never divides by
    rounding, however short |g_w| is.
  """
  # The longer gradient gets the small weight; solving for that weight instead
  # of its complement keeps its digits.
  order = jnp.argsort(-jnp.diagonal(gram))
  sorted_gram = gram[order][:, order]
  longer, between, shorter = (
    sorted_gram[0, 0],
    sorted_gram[0, 1],
    sorted_gram[1, 1],
  )
  width = longer + shorter - 2 * between
  safe = jnp.where(width > 0, width, 1)
  x = middle = jnp.where(width > 0, (shorter - between) / safe, 0.5)
  # The squared distance between zero and the line through both gradients. The
  # quotient comes first because a squared inner product can leave float32.
  nearest = (shorter - between) * ((shorter - between) / safe)
  height = jnp.maximum(shorter - nearest, 0)
  height = jnp.maximum(height, floor * floor)
  if linear is not None:
    slope = linear[order][0] - linear[order][1]
    reach = radius * jnp.sqrt(safe)
    # If the slope outweighs the norm, the optimum is a corner.
    inside = (reach > jnp.abs(slope)) & (width > 0)
    s = jnp.where(inside, slope / jnp.where(inside, reach, 1), 0)
    curved = x - s * jnp.sqrt(height / (safe * (1 - s * s)))
    corner = jnp.where(slope > 0, 0.0, jnp.where(slope < 0, 1.0, x))
    x = jnp.where(inside, curved, corner)
  x = jnp.clip(x, 0, 1)
  weights = jnp.zeros_like(gram[0]).at[order].set(jnp.stack([x, 1 - x]))
  return weights, jnp.sqrt(height + width * (x - middle) ** 2)
