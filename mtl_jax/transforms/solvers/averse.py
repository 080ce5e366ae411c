"""The dual problem of the conflict-averse direction, solved on the device."""

import jax
import jax.numpy as jnp

from mtl_jax.transforms.contract import gram_based
from mtl_jax.transforms.solvers import simplex

# A shorter sum of gradients, in units of the shortest of them, is rounding.
_SHORTEST = 1e-3
# The same for two opposed gradients from c = 1 on, times c. The worst gain
# falls short of the best one by up to a quarter of that, in units of the ball's
# radius and the shortest gradient. With less, rounding of the weights, which
# c / |g_w| enlarges, would leave residuals above 1e-4 in float32.
_SHORTEST_OF_TWO = 3e-3
# Newton's result is taken below this residual; bisection halves the logarithm
# of the multiplier this often.
_CONVERGED = 1e-5
_HALVINGS = 22


def _root(x: jax.Array) -> jax.Array:
  """Square root, 0 with derivative 0 where x is not positive."""
  return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1)), 0)


def _multiplier(
  v: jax.Array, cos: jax.Array, c: float, length: jax.Array | None = None
) -> jax.Array:
  """The quotient c / |g_w|, with g_w in units of the shortest gradient.

  Args:
    v: [T].
    cos: [T, T].
    c: scalar.
    length: |g_w| if it is known more exactly than from the product of v;
      otherwise NaN.

  Returns:
    Scalar, with the derivative of the product in either case.
  """
  total = jnp.maximum(jnp.sum(v), jnp.finfo(v.dtype).tiny)
  unit = v / total
  norm = jnp.maximum(total * _root(unit @ cos @ unit), _SHORTEST)
  if length is not None:
    better = length + (norm - jax.lax.stop_gradient(norm))
    norm = jnp.where(jnp.isnan(length), norm, better)
  return c / norm


def _residual(v, cos, tilt, a, c, length=None) -> jax.Array:
  """Distance of a slope below its share of the weighted mean of all slopes."""
  slopes = tilt + _multiplier(v, cos, c, length) * (cos @ v)
  # a v = w: a task of length |g| may lie below the level by its share of it.
  shortfall = jnp.where(a > 0, v @ slopes * a - slopes, 0)
  return jnp.maximum(jnp.max(shortfall), 0) / (1 + c)


def _minimiser(cos, tilt, a, c) -> jax.Array:
  """Minimises tilt . v + c sqrt(v' cos v) over v >= 0, a . v = 1.

  Args:
    cos: [T, T]; rows of zeros where a is 0.
    tilt: [T].
    a: [T]; 0 for a task that is out.
    c: scalar.

  Returns:
    v [T].
  """
  # An excluded variable has only a separate quadratic.
  out = jnp.diag(jnp.where(a > 0, 0.0, 1.0)).astype(cos.dtype)

  def on_simplex(v):
    return simplex.to_simplex(v, a) / jnp.where(a > 0, a, 1)

  def newton():
    def derivatives(v):
      cv = cos @ v
      # Smooths the kink by far less than a gradient's length.
      norm = jnp.sqrt(jnp.maximum(v @ cv, 0) + 1e-10)
      along = cv / norm
      hessian = c * (cos - jnp.outer(along, along)) / norm + out
      return tilt + c * along + out @ v, hessian

    return on_simplex(simplex.interior_point(derivatives, a))

  def bisection():
    def quadratic(mu):
      matrix = mu * cos + out
      return on_simplex(
        simplex.interior_point(lambda v: (tilt + matrix @ v, matrix), a)
      )

    def halve(bounds, _):
      low, high = bounds
      middle = jnp.sqrt(low) * jnp.sqrt(high)
      too_large = _multiplier(quadratic(middle), cos, c) < middle
      return (
        jnp.where(too_large, low, middle),
        jnp.where(too_large, middle, high),
      ), None

    # g_w is never longer than the longest gradient.
    smallest = jnp.min(jnp.where(a > 0, a, 1))
    bounds = (c * smallest, jnp.asarray(c / _SHORTEST, cos.dtype))
    (low, high), _ = jax.lax.scan(halve, bounds, None, length=_HALVINGS)
    return quadratic(jnp.sqrt(low) * jnp.sqrt(high))

  def second_try(v):
    other = bisection()
    better = _residual(other, cos, tilt, a, c) < _residual(v, cos, tilt, a, c)
    return jnp.where(better, other, v)

  v = newton()
  converged = _residual(v, cos, tilt, a, c) <= _CONVERGED
  return jax.lax.cond(converged, lambda v: v, second_try, v)


def conflict_averse(
  gram: jax.Array, active: jax.Array, c: float
) -> tuple[gram_based.Solution, jax.Array]:
  r"""The dual of the conflict-averse direction.

  .. math::
    \min_{w \in \Delta} \; \langle g_w, g_0 \rangle + c \, |g_0| \, |g_w|

  with :math:`g_0` the mean of the active task gradients. The direction is
  :math:`g_0 + \mu g_w` with :math:`\mu = c |g_0| / |g_w|`.

  Newton steps on this function converge in nearly all cases. They may fail if
  gradients conflict so much that the optimum is close to the kink at :math:`g_w
  = 0`. Bisection is used then: the same point also minimises the quadratic
  function :math:`\langle g_w, g_0 \rangle + \frac{\mu}{2} |g_w|^2` for one
  :math:`\mu`, and :math:`\mu |g_w|` grows with :math:`\mu`.

  Args:
    gram: [T, T].
    active: bool [T].
    c: radius of the ball around the mean gradient, relative to its length.

  Returns:
    weights on the simplex [T] with the residual (how far a task's derivative
    lies below the weighted mean of all derivatives, relative to |g_0| times the
    task's length times (1 + c)), and the multiplier. In closed form for two
    tasks. A :math:`g_w` shorter than a thousandth of the shortest gradient is
    rounding and counts as having that length: the direction is then inside the
    ball. For two tasks and c from 1 on, instead the distance between zero and
    the line through both gradients counts as at least two thousandths.
  """
  lengths, cos, usable = simplex.cosines(gram, active)
  size = gram.shape[0]
  a = simplex.relative(lengths, usable)
  shortest = jnp.min(jnp.where(usable, lengths, jnp.inf))
  shortest = jnp.where(jnp.any(usable), shortest, 1)
  # g_0 in units of the longest gradient, and the cosine of each task with it.
  longest = jnp.max(jnp.where(usable, lengths, 0))
  longest = jnp.where(longest > 0, longest, 1)
  share = jnp.where(usable, lengths / longest, 0)
  mean = _root(share @ cos @ share)
  tilt = jnp.where(usable, cos @ share / jnp.where(mean > 0, mean, 1), 0)
  cos = jnp.where(usable[:, None] & usable[None, :], cos, 0)

  # In v = w |g| / shortest: g_w has the squared length v' C v in units of the
  # shortest gradient, and the function is tilt . v + c sqrt(v' C v).
  still = jax.lax.stop_gradient((cos, tilt, a))
  length = None
  if size == 1:
    v = usable.astype(gram.dtype)
  elif size == 2:
    # From c = 1 on the ball reaches zero, and g_w may vanish at the optimum of
    # opposed tasks. Its direction is then rounding, except for the part along
    # their difference. That part makes them gain the same and has to stay
    # exact.
    floor = jnp.where(c >= 1, c * _SHORTEST_OF_TWO * shortest, 0)
    weights, length = simplex.two_tasks(
      *jax.lax.stop_gradient((gram, tilt * lengths)), c, floor
    )
    length = jnp.where(jnp.all(usable) & (c >= 1), length / shortest, jnp.nan)
    length = jax.lax.stop_gradient(length)
    weights = jnp.where(jnp.all(usable), weights, usable.astype(gram.dtype))
    v = jnp.where(usable, weights / jnp.where(usable, still[2], 1), 0)
  else:
    v = _minimiser(*still, c)
  v = jax.lax.stop_gradient(v)
  residual = _residual(v, *still, c, length)

  mu = _multiplier(v, cos, c, length)
  slopes = tilt + mu * (cos @ v)
  # The slopes do not change along v, unless g_w is as short as rounding.
  along = jnp.where(mu < c / _SHORTEST, mu / c, 0) * (cos @ v)
  matrix = cos - along[:, None] * along[None, :]
  level = jax.lax.stop_gradient(v @ slopes)
  v = simplex.last_step_on_simplex(v, (slopes - level * a) / mu, matrix, a)
  weights = (v * a).astype(gram.dtype)
  scale = longest * mean / jnp.maximum(jnp.sum(active), 1) / shortest
  return (
    gram_based.Solution(weights, jax.lax.stop_gradient(residual)),
    _multiplier(v, cos, c, length) * scale,
  )
