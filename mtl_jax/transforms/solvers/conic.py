"""The direction in a cone around the mean that helps the worst task most."""

from collections.abc import Callable
import math
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtl_jax.transforms.solvers import simplex

# Newton's result is taken below this residual; bisection halves the logarithm
# of the multiplier this often.
_CONVERGED = 1e-5
_HALVINGS = 22
# The inverse of a hundredth: bisection treats a combination of gradients that
# is shorter than a hundredth of the shortest gradient as zero. A shorter one
# has fewer correct digits in float32 than this loses.
_LARGEST = 1e2
# Eigenvalues of the matrix of cosines below this, times the number of tasks,
# are rounding of linearly dependent gradients.
_RANK_TOLERANCE = 1e-6


class Direction(NamedTuple):
  """The unit direction p sum_i v_i g_i / |g_i| + q g_0 / |g_0|.

  Attributes:
    v: [T].
    p: scalar.
    q: scalar.
    residual: scalar, how much less a task gains than the mean gain over tasks
      with weights v / |g|, relative to the task's length.
  """

  v: jax.Array
  p: jax.Array
  q: jax.Array
  residual: jax.Array


class _Problem(NamedTuple):
  """The constants of the search.

  Attributes:
    a: [T], shortest length over each length; 0 for an excluded task.
    matrix: [T + 1, T + 1], cosines of the task gradients and of their mean.
    rows: [T + 1, T + 1], coordinates with those cosines. They give the length
      of a sum that nearly cancels to four digits; inner products give none.
    along: cosine of half the opening angle.
    across: its sine.
  """

  a: jax.Array
  matrix: jax.Array
  rows: jax.Array
  along: Any
  across: Any


def worst_gain(
  cos: jax.Array, tilt: jax.Array, a: jax.Array, angle: Any
) -> Direction:
  r"""Maximises the worst gain over |d| <= 1 with <g_0, d> >= c |g_0|.

  By the dual problem

  .. math::
    \min_{w \in \Delta, \, \nu \ge 0} |g_w + \nu \hat g_0| - c \nu

  and Newton's method in v = w |g| / shortest. This fails if the optimum is at
  or near the kink of the norm, as for more tasks than dimensions. Bisection is
  used then: the same point also minimises :math:`\frac{\mu}{2} |g_w + \nu \hat
  g_0|^2 - c \nu` for one :math:`\mu`, and the length of :math:`d = \mu (g_w + u
  \hat g_0)` grows with it.

  Args:
    cos: [T, T], cosines of the task gradients; rows of zeros where a is 0.
    tilt: [T], cosines with the mean gradient.
    a: [T], shortest length over each length; 0 for a task that is out.
    angle: half the opening angle of the cone in radians, with the cosine c.

  Returns:
    the direction, with length 1. It is in the cone for any residual.
  """
  size = a.shape[0]
  matrix = jnp.block(
    [[cos, tilt[:, None]], [tilt[None, :], jnp.ones((1, 1), cos.dtype)]]
  )
  values, vectors = jnp.linalg.eigh(matrix)
  kept = values > _RANK_TOLERANCE * size
  rows = vectors * jnp.sqrt(jnp.where(kept, values, 0))[None, :]
  # Numbers stay numbers where the angle is one; it may be traced.
  functions: Any = math if isinstance(angle, float) else jnp
  along, across = functions.cos(angle), functions.sin(angle)
  problem = _Problem(a, matrix, rows, along, across)
  still = _Problem(*jax.lax.stop_gradient(problem[:3]), along, across)
  first = _by_newton(still)
  converged = _direction(still, *first).residual <= _CONVERGED

  def second_try(first):
    second = _by_bisection(still)
    better = (
      _direction(still, *second).residual < _direction(still, *first).residual
    )
    return jax.tree.map(lambda x, y: jnp.where(better, x, y), second, first)

  v, longest = jax.lax.cond(converged, lambda x: x, second_try, first)
  # At a kink of the norm the weights have no derivative.
  v = jnp.where(converged, _last_step(problem, v), v)
  return _direction(problem, v, longest)


def _linear(problem: _Problem) -> jax.Array:
  """The linear term in (v, nu)."""
  size = problem.a.shape[0]
  return jnp.zeros(size + 1, problem.a.dtype).at[-1].set(-problem.along)


def _minimise(
  problem: _Problem,
  derivatives: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
  nu: jax.Array | float,
) -> jax.Array:
  """Minimises a function of (v, nu) less c nu; starts at equal weights."""
  a, linear = problem.a, _linear(problem)
  # An excluded variable has only a separate quadratic.
  out = jnp.append(jnp.where(a > 0, 0.0, 1.0), 0.0)

  def all_derivatives(z):
    slopes, hessian = derivatives(z)
    return slopes + linear + out * z, hessian + jnp.diag(out)

  v = jnp.where(a > 0, 1 / jnp.where(a > 0, a, 1), 1)
  start = jnp.append(v / jnp.maximum(jnp.sum(a > 0), 1), nu)
  return simplex.interior_point(all_derivatives, jnp.append(a, 0), start)


def _of_norm(problem: _Problem, z: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Gradient and Hessian of the norm in (v, nu)."""
  mz = problem.matrix @ z
  # Smooths the kink by far less than a gradient's length.
  norm = jnp.sqrt(jnp.maximum(z @ mz, 0) + 1e-10)
  unit = mz / norm
  return unit, (problem.matrix - jnp.outer(unit, unit)) / norm


def _last_step(problem: _Problem, z: jax.Array) -> jax.Array:
  """(v, nu) with the derivative of the solution."""
  a = jnp.append(problem.a, 0)
  z = jnp.where(jnp.append(problem.a > 0, True), z, 0)
  slopes, hessian = _of_norm(problem, z)
  slopes = slopes + _linear(problem)
  level = jax.lax.stop_gradient(z @ slopes)
  hessian = jax.lax.stop_gradient(hessian)
  return simplex.last_step_on_simplex(z, slopes - level * a, hessian, a)


def _by_newton(problem: _Problem) -> tuple[jax.Array, jax.Array]:
  """(v, nu), and an upper bound for the norm's multiplier."""
  z = _minimise(problem, lambda z: _of_norm(problem, z), 1.0)
  return z, jnp.asarray(jnp.inf, z.dtype)


def _by_bisection(problem: _Problem) -> tuple[jax.Array, jax.Array]:
  """The same, for a minimum at a kink of the norm."""

  def quadratic(mu):
    matrix = mu * problem.matrix
    return _minimise(problem, lambda z: (matrix @ z, matrix), 1 / mu)

  def halve(bounds, _):
    low, high = bounds
    middle = jnp.sqrt(low) * jnp.sqrt(high)
    too_long = middle * jnp.linalg.norm(quadratic(middle) @ problem.rows) > 1
    return (
      jnp.where(too_long, low, middle),
      jnp.where(too_long, middle, high),
    ), None

  # No combination is much longer than the longest gradient.
  smallest = 0.1 * jnp.min(jnp.where(problem.a > 0, problem.a, 1))
  bounds = (smallest, jnp.asarray(_LARGEST, smallest.dtype))
  (low, high), _ = jax.lax.scan(halve, bounds, None, length=_HALVINGS)
  mu = jnp.sqrt(low) * jnp.sqrt(high)
  return quadratic(mu), mu


def _length(matrix: jax.Array, rows: jax.Array, v: jax.Array) -> jax.Array:
  """A sum's length: digits from coordinates, derivative from inner products."""
  length = jax.lax.stop_gradient(jnp.linalg.norm(v @ rows))
  square = v @ matrix @ v
  change = square - jax.lax.stop_gradient(square)
  return length + jnp.where(
    length > 0, change / (2 * jnp.where(length > 0, length, 1)), 0
  )


def _direction(
  problem: _Problem, z: jax.Array, multiplier: jax.Array | float
) -> Direction:
  """The best direction for the weights, with a bounded multiplier."""
  along, across = problem.along, problem.across
  rows = jax.lax.stop_gradient(problem.rows)
  a, units, mean = problem.a, rows[:-1], rows[-1]
  cos, tilt = problem.matrix[:-1, :-1], problem.matrix[-1, :-1]
  v = jnp.where(a > 0, z[:-1], 0)
  total = jnp.sum(v * a)
  v = v / jnp.where(total > 0, total, 1)

  # g_w, and its parts along and across the mean.
  length = _length(cos, units, v)
  front = v @ tilt
  beside = units - tilt[:, None] * mean[None, :]
  side = _length(cos - jnp.outer(tilt, tilt), beside, v)
  inside = (side * along <= front * across) & (length > 0)
  # If g_w is outside the cone, the direction is on its surface, or inside if
  # g_w hardly leaves the mean.
  turned = jnp.minimum(across / jnp.where(side > 0, side, 1), multiplier)
  turned = jnp.where(side > 0, turned, 0)
  one = jnp.hypot(along, turned * side)
  p = jnp.where(inside, 1 / jnp.where(inside, length, 1), turned / one)
  q = jnp.where(inside, 0, (along - turned * front) / one)

  gains = units @ (p * (v @ units) + q * mean)
  short = jnp.where(a > 0, (v @ gains) * a - gains, 0)
  residual = jax.lax.stop_gradient(jnp.maximum(jnp.max(short), 0))
  return Direction(v, p, q, residual)
