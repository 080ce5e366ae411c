"""Small convex problems over the simplex, solved on the device.

Every solver is a fixed number of iterations of `jax.lax` code, so that it lives
inside `jit` and `vmap` without a callback to the host. They work on the
*cosines* of the task gradients, not on their raw inner products: lengths that
differ by orders of magnitude then cost no accuracy.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from mtl_jax.transforms import _from_gram

_ITERATIONS = 30
# Relative ridge of the Newton matrix only. It keeps the factorisation alive for
# linearly dependent gradients and leaves the point of convergence alone.
_RIDGE = 1e-6
# A shorter sum of gradients, in units of the shortest of them, is rounding.
_SHORTEST = 1e-3
# Newton's result is taken below this residual; bisection halves the logarithm
# of the multiplier this often.
_CONVERGED = 1e-5
_HALVINGS = 22
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
  cos = jnp.where(jnp.eye(gram.shape[0], dtype=bool), 1, jnp.clip(cos, -1, 1))
  return lengths, cos, usable


def _relative(lengths: jax.Array, usable: jax.Array) -> jax.Array:
  """Shortest usable length over each length; 0 for a task that is out."""
  shortest = jnp.min(jnp.where(usable, lengths, jnp.inf))
  shortest = jnp.where(jnp.any(usable), shortest, 1)
  return jnp.where(usable, shortest / lengths, 0)


def _interior_point(
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
      entry is zero should have a positive definite Hessian of its own.
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
    matrix = hessian + jnp.diag(y / v)
    scale = jax.lax.rsqrt(jnp.diagonal(matrix))
    matrix = matrix * scale[:, None] * scale[None, :]
    matrix = matrix + _RIDGE * jnp.eye(size, dtype=a.dtype)
    right = jnp.stack([nu * a + tau / v - gradient, a], axis=1)
    factor = jax.scipy.linalg.cho_factor(matrix, lower=True)
    solved = jax.scipy.linalg.cho_solve(factor, right * scale[:, None])
    solved = solved * scale[:, None]
    free, along = solved[:, 0], solved[:, 1]
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


def _to_simplex(v: jax.Array, a: jax.Array) -> jax.Array:
  weights = v * a
  total = jnp.sum(weights)
  return jnp.where(total > 0, weights / jnp.where(total > 0, total, 1), 0)


def min_norm(gram: jax.Array, active: jax.Array) -> _from_gram.Solution:
  r"""Least-norm point of the convex hull of task gradients.

  .. math::
    \min_{w \in \Delta} \; w^\top G w

  Args:
    gram: [T, T], inner products of the task gradients.
    active: bool [T]; absent tasks get weight 0.

  Returns:
    weights on the simplex [T], and the residual: how far a task's inner
    product with the point falls short of the point's squared norm, relative to
    the task's length times the weighted sum of all lengths. In closed form for
    two tasks.
  """
  lengths, cos, usable = cosines(gram, active)
  size = gram.shape[0]
  zero = active & ~usable
  a = _relative(lengths, usable)
  if size == 1:
    weights = usable.astype(gram.dtype)
  elif size == 2:
    weights = jnp.where(
      jnp.all(usable), _two_tasks(gram, None, None), usable.astype(gram.dtype)
    )
  else:
    # Equal v, not equal weights: a gradient that is longer by orders of
    # magnitude would begin that far from its optimum. The largest a_i is 1.
    a = jnp.where(usable, a, 0)
    start = jnp.full_like(a, 1 / jnp.maximum(jnp.sum(a), 1))
    v = _interior_point(lambda v: (cos @ v, cos), a, start)
    weights = _to_simplex(v, a)
  # A task whose gradient is zero is a minimum by itself.
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
  return _from_gram.Solution(weights, residual)


def _two_tasks(gram, linear, radius) -> jax.Array:
  r"""Minimises linear . w + radius |g_w| (or |g_w| alone) for two tasks.

  With x the weight of the longer gradient, |g_w|^2 = A (x - m)^2 + h. Without a
  linear part x = m. With it, s = (linear_1 - linear_2) / (radius sqrt A)
  is minus the cosine at the optimum: x = m - s sqrt(h / (A (1 - s^2))).
  """
  # The longer gradient gets the small weight; solving for that one and not for
  # its complement keeps its digits.
  order = jnp.argsort(-jnp.diagonal(gram))
  sorted_gram = gram[order][:, order]
  longer, between, shorter = (
    sorted_gram[0, 0],
    sorted_gram[0, 1],
    sorted_gram[1, 1],
  )
  width = longer + shorter - 2 * between
  safe = jnp.where(width > 0, width, 1)
  x = jnp.where(width > 0, (shorter - between) / safe, 0.5)
  if linear is not None:
    slope = linear[order][0] - linear[order][1]
    # The squared distance of the line through both gradients from zero; the
    # quotient first, for a squared inner product can leave float32.
    nearest = (shorter - between) * ((shorter - between) / safe)
    height = jnp.maximum(shorter - nearest, 0)
    reach = radius * jnp.sqrt(safe)
    # Where the slope outweighs the norm the optimum is a corner.
    inside = (reach > jnp.abs(slope)) & (width > 0)
    s = jnp.where(inside, slope / jnp.where(inside, reach, 1), 0)
    curved = x - s * jnp.sqrt(height / (safe * (1 - s * s)))
    corner = jnp.where(slope > 0, 0.0, jnp.where(slope < 0, 1.0, x))
    x = jnp.where(inside, curved, corner)
  x = jnp.clip(x, 0, 1)
  return jnp.zeros_like(gram[0]).at[order].set(jnp.stack([x, 1 - x]))


def conflict_averse(
  gram: jax.Array, active: jax.Array, c: float
) -> tuple[_from_gram.Solution, jax.Array]:
  r"""The dual of the conflict-averse direction.

  .. math::
    \min_{w \in \Delta} \; \langle g_w, g_0 \rangle + c \, |g_0| \, |g_w|

  with :math:`g_0` the mean of the active task gradients. The direction is
  :math:`g_0 + \mu g_w` with :math:`\mu = c |g_0| / |g_w|`.

  Newton steps on this function converge in nearly all cases; where
  gradients conflict so much that the optimum is close to its kink
  :math:`g_w = 0` they may not. The same point also minimises
  :math:`\langle g_w, g_0 \rangle + \frac{\mu}{2} |g_w|^2`, a quadratic
  function, for one :math:`\mu`, and :math:`\mu |g_w|` grows with :math:`\mu`:
  bisection finds it then.

  Args:
    gram: [T, T].
    active: bool [T].
    c: radius of the ball around the mean gradient, relative to its length.

  Returns:
    weights on the simplex [T] with the residual (how far a task's derivative
    lies below the weighted mean of all derivatives, relative to |g_0| times the
    task's length times (1 + c)), and the multiplier. In closed form for two
    tasks. A :math:`g_w` shorter than a thousandth of the shortest gradient is
    rounding and counts as that long: the direction is then inside the ball.
  """
  lengths, cos, usable = cosines(gram, active)
  size = gram.shape[0]
  a = _relative(lengths, usable)
  shortest = jnp.min(jnp.where(usable, lengths, jnp.inf))
  shortest = jnp.where(jnp.any(usable), shortest, 1)
  # g_0 in units of the longest gradient, and the cosine of each task with it.
  longest = jnp.max(jnp.where(usable, lengths, 0))
  longest = jnp.where(longest > 0, longest, 1)
  share = jnp.where(usable, lengths / longest, 0)
  mean = jnp.sqrt(jnp.maximum(share @ cos @ share, 0))
  tilt = jnp.where(usable, cos @ share / jnp.where(mean > 0, mean, 1), 0)
  # A variable that is out has only a quadratic of its own.
  cos = jnp.where(usable[:, None] & usable[None, :], cos, 0)
  out = jnp.diag(jnp.where(usable, 0.0, 1.0)).astype(gram.dtype)

  # In v = w |g| / shortest: g_w has the squared length v' C v in units of the
  # shortest gradient, and the function is tilt . v + c sqrt(v' C v).
  def multiplier(v):
    total = jnp.maximum(jnp.sum(v), jnp.finfo(v.dtype).tiny)
    unit = v / total
    norm = total * jnp.sqrt(jnp.maximum(unit @ cos @ unit, 0))
    return c / jnp.maximum(norm, _SHORTEST)

  def residual(v):
    slopes = tilt + multiplier(v) * (cos @ v)
    total = jnp.maximum(jnp.sum(v), jnp.finfo(v.dtype).tiny)
    level = v @ slopes / total
    # a v = w: a task of length |g| may lie below the level by its share of it.
    shortfall = jnp.where(usable, level * total * a - slopes, 0)
    return jnp.maximum(jnp.max(shortfall), 0) / (1 + c)

  def on_simplex(v):
    return _to_simplex(v, a) * jnp.where(usable, lengths / shortest, 0)

  def newton():
    def derivatives(v):
      cv = cos @ v
      norm = jnp.sqrt(jnp.maximum(v @ cv, 0) + 1e-10)
      along = cv / norm
      hessian = c * (cos - jnp.outer(along, along)) / norm + out
      return tilt + c * along + out @ v, hessian

    return on_simplex(_interior_point(derivatives, a))

  def bisection():
    def quadratic(mu):
      matrix = mu * cos + out
      return on_simplex(
        _interior_point(lambda v: (tilt + matrix @ v, matrix), a)
      )

    def halve(bounds, _):
      low, high = bounds
      middle = jnp.sqrt(low) * jnp.sqrt(high)
      too_large = multiplier(quadratic(middle)) < middle
      return (
        jnp.where(too_large, low, middle),
        jnp.where(too_large, middle, high),
      ), None

    # g_w is never longer than the longest gradient.
    smallest = jnp.min(jnp.where(usable, a, 1))
    bounds = (c * smallest, jnp.asarray(c / _SHORTEST, gram.dtype))
    (low, high), _ = jax.lax.scan(halve, bounds, None, length=_HALVINGS)
    return quadratic(jnp.sqrt(low) * jnp.sqrt(high))

  def second_try(v):
    other = bisection()
    return jnp.where(residual(other) < residual(v), other, v)

  if size == 1:
    v = usable.astype(gram.dtype)
  elif size == 2:
    weights = _two_tasks(gram, tilt * lengths, c)
    weights = jnp.where(jnp.all(usable), weights, usable.astype(gram.dtype))
    v = weights * jnp.where(usable, lengths / shortest, 0)
  else:
    v = newton()
    v = jax.lax.cond(residual(v) <= _CONVERGED, lambda v: v, second_try, v)
  weights = (v * a).astype(gram.dtype)
  scale = longest * mean / jnp.maximum(jnp.sum(active), 1) / shortest
  return _from_gram.Solution(weights, residual(v)), multiplier(v) * scale
