"""The best direction for the worst task in a cone around the mean."""

from collections.abc import Hashable
import math

import jax
import jax.numpy as jnp

from mtl_jax.transforms import _aggregator
from mtl_jax.transforms import _from_gram
from mtl_jax.transforms import _solvers

# A combination of gradients that is shorter than a thousandth of the shortest
# gradient is rounding; this is the inverse.
_LARGEST = 1e3
# Newton's result is taken below this residual; bisection halves the logarithm
# of the multiplier this often.
_CONVERGED = 1e-5
_HALVINGS = 22


def conicgrad(
  angle: float = 45.0,
  *,
  num_tasks: int | None = None,
  axis_name: Hashable | None = None,
  reduce: str = 'mean',
  shard_axis: Hashable | None = None,
) -> _aggregator.Aggregator:
  r"""ConicGrad: the worst task's best direction in a cone around the mean.

  With the mean :math:`g_0` of the task gradients and the cosine c of the angle

  .. math::
    \max_d \min_i \langle g_i, d \rangle \quad \text{s.t.} \quad
    |d| \le |g_0|, \; \langle g_0, d \rangle \ge c \, |g_0|^2

  and the solution is given the length :math:`|g_0|`. Such a d makes an angle
  of at most :math:`\arccos c` with the mean. It is MGDA's direction where that
  lies in the cone, and else on the surface of the cone.

  Scale: the length of the mean gradient. Degree of homogeneity: 1. A task with
  a zero gradient gains nothing whatever d is; it counts in the mean only.

  The paper asks for the largest worst gain in the cone and sets the length
  afterwards. In a cone alone that gain has no maximum where it can be positive;
  with the length bounded there is one direction, found exactly here.

  Args:
    angle: half the opening angle of the cone in degrees, between 0 (the mean)
      and 90 (MGDA's direction, where it helps all tasks).
    num_tasks: T, to have weights, Gram matrix and residual in the state.
    axis_name: see `from_gram`.
    reduce: see `from_gram`.
    shard_axis: see `from_gram`.

  Returns:
    An aggregator.

  Raises:
    ValueError: for an angle that is not between 0 and 90.

  Examples:
    >>> import jax.numpy as jnp, mtl_jax
    >>> task_grads = jnp.array([[7.0, 1.0], [-7.0, 1.0]])
    >>> tx = mtl_jax.conicgrad()
    >>> print(tx.update(task_grads, tx.init(jnp.zeros(2)))[0])
    [0. 1.]

  References:
    Hassanpour et al., `Fantastic Multi-Task Gradient Updates and How to Find
    Them In a Cone <https://arxiv.org/abs/2502.00217>`_, 2025
  """
  if not 0 < angle < 90:
    raise ValueError(f'angle must be between 0 and 90 degrees, got {angle}')
  along, across = math.cos(math.radians(angle)), math.sin(math.radians(angle))

  def weights_fn(gram, *, losses, active):
    del losses
    lengths, cos, usable = _solvers.cosines(gram, active)
    cos = jnp.where(usable[:, None] & usable[None, :], cos, 0)
    a = _solvers._relative(lengths, usable)
    # The cosine of each task with the mean, in units of the longest gradient.
    longest = jnp.max(jnp.where(usable, lengths, 0))
    share = jnp.where(usable, lengths / jnp.where(longest > 0, longest, 1), 0)
    mean = jnp.sqrt(jnp.maximum(share @ cos @ share, 0))
    tilt = cos @ share / jnp.where(mean > 0, mean, 1)
    v, of_v, of_mean, residual = _solve(cos, tilt, a, usable, along, across)
    count = jnp.maximum(jnp.sum(active), 1)
    mean_length = longest * mean / count
    weights = of_v * v * (mean_length / lengths) + of_mean / count
    return _from_gram.Solution(weights, residual)

  return _from_gram.from_gram(
    weights_fn,
    num_tasks=num_tasks,
    axis_name=axis_name,
    reduce=reduce,
    shard_axis=shard_axis,
  )


def _solve(cos, tilt, a, usable, along, across):
  r"""The direction, from the dual problem.

  .. math::
    \min_{w \in \Delta, \, \nu \ge 0} |g_w + \nu \hat g_0| - c \nu

  by Newton's method in v = w |g| / shortest. Where the optimum is at or near
  the kink of the norm, as for more tasks than dimensions, that fails. The same
  point also minimises
  :math:`\frac{\mu}{2} |g_w + \nu \hat g_0|^2 - c \nu` for one
  :math:`\mu`, and the length of :math:`d = \mu (g_w + \nu \hat g_0)` grows
  with it: bisection then.

  Args:
    cos: [T, T], cosines of the task gradients; zero rows for those that are
      out.
    tilt: [T], cosines with the mean gradient.
    a: [T], shortest length over each length; 0 for those that are out.
    usable: bool [T].
    along: cosine of the angle.
    across: sine of the angle.

  Returns:
    v [T] and two numbers p, q, with the unit direction p g_w + q (the unit mean
    gradient); and how far a task gains less than the weighted mean of tasks,
    relative to its length.
  """
  size = cos.shape[0]
  out = jnp.diag(jnp.append(jnp.where(usable, 0.0, 1.0), 0.0))
  matrix = jnp.zeros((size + 1, size + 1), cos.dtype)
  matrix = matrix.at[:size, :size].set(cos)
  matrix = matrix.at[size, :size].set(tilt).at[:size, size].set(tilt)
  matrix = matrix.at[size, size].set(1)
  linear = jnp.zeros(size + 1, cos.dtype).at[size].set(-along)
  bounds = jnp.append(a, 0)
  equal = jnp.where(a > 0, 1 / jnp.where(a > 0, a, 1), 1)
  equal = equal / jnp.maximum(jnp.sum(a > 0), 1)

  def interior_point(derivatives, nu):
    start = jnp.append(equal, nu)
    return _solvers._interior_point(derivatives, bounds, start)

  def direction(z, multiplier):
    v = jnp.where(usable, z[:size], 0)
    total = jnp.sum(v * a)
    v = v / jnp.where(total > 0, total, 1)
    front = v @ tilt
    square = jnp.maximum(v @ cos @ v, 0)
    side = jnp.sqrt(jnp.maximum(square - front * front, 0))
    inside = (side * along <= front * across) & (square > 0)
    # On the cone, unless the best direction is inside for lack of a g_w across
    # the mean.
    across_side = across / jnp.where(side > 0, side, 1)
    turned = jnp.where(side > 0, jnp.minimum(across_side, multiplier), 0)
    length = jnp.hypot(along, turned * side)
    p = jnp.where(
      inside, 1 / jnp.sqrt(jnp.where(inside, square, 1)), turned / length
    )
    q = jnp.where(inside, 0, (along - turned * front) / length)
    gains = p * (cos @ v) + q * tilt
    short = jnp.where(usable, (v @ gains) * a - gains, 0)
    return v, p, q, jnp.maximum(jnp.max(short), 0)

  def newton():
    def derivatives(z):
      mz = matrix @ z
      norm = jnp.sqrt(jnp.maximum(z @ mz, 0) + 1e-10)
      unit = mz / norm
      hessian = (matrix - jnp.outer(unit, unit)) / norm + out
      return linear + unit + out @ z, hessian

    return direction(interior_point(derivatives, 1.0), _LARGEST)

  def bisection():
    def quadratic(mu):
      scaled = mu * matrix + out
      return interior_point(lambda z: (linear + scaled @ z, scaled), 1 / mu)

    def halve(bounds, _):
      low, high = bounds
      middle = jnp.sqrt(low) * jnp.sqrt(high)
      z = quadratic(middle)
      too_long = middle * jnp.sqrt(jnp.maximum(z @ matrix @ z, 0)) > 1
      return (
        jnp.where(too_long, low, middle),
        jnp.where(too_long, middle, high),
      ), None

    smallest = 0.1 * jnp.min(jnp.where(usable, a, 1))
    bounds = (smallest, jnp.asarray(_LARGEST, cos.dtype))
    (low, high), _ = jax.lax.scan(halve, bounds, None, length=_HALVINGS)
    mu = jnp.sqrt(low) * jnp.sqrt(high)
    return direction(quadratic(mu), mu)

  def second_try(first):
    second = bisection()
    better = second[-1] < first[-1]
    return jax.tree.map(lambda x, y: jnp.where(better, x, y), second, first)

  first = newton()
  return jax.lax.cond(first[-1] <= _CONVERGED, lambda x: x, second_try, first)
