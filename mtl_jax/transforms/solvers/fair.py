"""Nash bargaining and alpha-fairness over task gradients, on the device."""

import jax
import jax.numpy as jnp

from mtl_jax.transforms.contract import gram_based
from mtl_jax.transforms.solvers import simplex

SCALES = ('norm', 'paper')
_ITERATIONS = 30
# The line search tries a Newton step and its halves.
_HALVINGS = 12
# A weight falls at most by this factor of e in one step.
_SHRINK = 3.0
# A sum that is shorter than this share of its terms is rounding.
_SHORTEST = 1e-3
# The error of an inner product is relative to its target, or to this share of
# the update's length if that is larger.
_COSINE = 1e-2


def alpha_fair(
  gram: jax.Array, active: jax.Array, alpha: float, scale: str = 'norm'
) -> gram_based.Solution:
  r"""The weights of an alpha-fair share of the update.

  .. math:: (G a)_i = a_i^{-1 / \alpha}

  which for alpha = 1 is the Nash bargaining solution. With
  :math:`s = 1 / \alpha` these are the optimality conditions of one convex
  problem,

  .. math::
    \min_{a > 0} \; \tfrac{1}{2} a^\top G a - \sum_i \int a_i^{-s} da_i

  solved by Newton steps with a line search. It has a solution unless zero is in
  the convex hull of the gradients; then the weights stop growing when their sum
  is rounding, and the residual is large.

  Args:
    gram: [T, T].
    active: bool [T]; absent tasks and tasks with a zero gradient get weight 0
      and have no influence.
    alpha: positive.
    scale: `'norm'` solves for the Gram matrix divided by its Frobenius norm,
      `'paper'` for the undivided Gram matrix.

  Returns:
    weights [T], positive, and the residual. A task has two errors: the distance
    of its inner product with the update from the target, relative to the target
    or to a hundredth of the update's length; and the distance of its weight
    from the one that its inner product implies, relative to the update's
    length. The smaller error counts for each task, and the residual is the
    largest of these.
  """
  lengths, cos, usable = simplex.cosines(gram, active)
  s = 1 / alpha
  # The norm through lengths: squares of squares would leave float32.
  longest = jnp.max(jnp.where(usable, lengths, 0))
  longest = jnp.where(longest > 0, longest, 1)
  share = jnp.where(usable, lengths / longest, 0)
  squares = (share[:, None] * share[None, :] * cos) ** 2
  frobenius = jnp.sqrt(jnp.where(jnp.any(usable), jnp.sum(squares), 1))
  root = longest * jnp.sqrt(frobenius)
  # One for an excluded task; its variable is separate and stays at one.
  lengths = jnp.where(usable, lengths / root, 1)

  # In b = length a: the update is a sum of b times unit gradients.
  still, still_lengths, still_root = jax.lax.stop_gradient((cos, lengths, root))
  b = _fair_lengths(still, still_lengths, usable, s, still_root)
  inner, target = cos @ b, _target(b, lengths, s)
  matrix = still + jnp.diag(s * _target(b, still_lengths, s) / b)
  residual = _residual(b, inner, target, lengths, usable, s)
  b = simplex.last_step(b, inner - target, matrix)
  weights = jnp.where(usable, b / lengths, 0)
  if scale == 'paper':
    weights = weights * root ** (-2 * alpha / (1 + alpha))
  return gram_based.Solution(weights, jax.lax.stop_gradient(residual))


def _target(b, lengths, s):
  """The target for the inner product with a unit gradient."""
  return jnp.exp(-s * (jnp.log(b) - jnp.log(lengths))) / lengths


def _residual(b, inner, target, lengths, usable, s):
  """See `alpha_fair`."""
  norm = jnp.sqrt(jnp.sum(jnp.where(usable, b * target, 0)))
  norm = jnp.where(norm > 0, norm, 1)
  missing = jnp.abs(inner - target) / jnp.maximum(target, _COSINE * norm)
  # The same equation solved for the weight: a weight near zero may have a large
  # relative error.
  gain = jnp.where(inner > 0, inner * lengths, 1)
  right = jnp.where(inner > 0, lengths * jnp.exp(-jnp.log(gain) / s), jnp.inf)
  missing = jnp.minimum(missing, jnp.abs(b - right) / norm)
  return jnp.max(jnp.where(usable, missing, 0))


def _fair_lengths(cos, lengths, usable, s, root):
  """Solves cos b = target(b) for b.

  Args:
    cos: [T, T].
    lengths: [T], of the task gradients, up to 1.
    usable: bool [T]; the others have a row of the identity and length 1.
    s: scalar.
    root: the divisor of the lengths.

  Returns:
    b [T], positive.
  """
  info = jnp.finfo(cos.dtype)
  # The update's squared length, and the weights, must not leave the dtype.
  most = jnp.minimum(
    0.01 * jnp.sqrt(info.max) / (cos.shape[0] * jnp.maximum(root, 1)),
    1e-8 * info.max * lengths,
  )
  # The solution for perpendicular gradients, times the factor at which the sum
  # of all conditions holds.
  alone = lengths ** ((s - 1) / (s + 1))
  unit = alone / jnp.max(alone)
  square = jnp.maximum(unit @ cos @ unit, 1e-3 * (unit @ unit))
  b = jnp.minimum(alone * (unit @ unit / square) ** (1 / (1 + s)), most)

  def step(b, _):
    target = _target(b, lengths, s)
    slope = cos @ b - target
    move = -simplex.factorised(cos + jnp.diag(s * target / b))(slope) / b

    # Along this arc b stays positive, and falls to zero as fast as a large
    # alpha requires.
    def moved(share):
      x = share * move
      factor = jnp.where(x < 0, jnp.exp(jnp.maximum(x, -_SHRINK)), 1 + x)
      return jnp.clip(b * factor, 1e8 * info.tiny, most)

    def rises(new):
      change = new - b
      after = change @ (cos @ new - _target(new, lengths, s))
      return after > 0.3 * jnp.abs(change @ slope)

    tries = jax.vmap(moved)(0.5 ** jnp.arange(_HALVINGS, dtype=b.dtype))
    # The first step at which the function still falls, or hardly rises: it is
    # convex and so has fallen on the way there.
    too_far = jax.vmap(rises)(tries).at[-1].set(False)
    new = tries[jnp.argmin(too_far)]
    # The squared length of the update is b . target at the solution.
    square = jnp.sum(jnp.where(usable, new * _target(new, lengths, s), 0))
    terms = jnp.sum(jnp.where(usable, new, 0))
    good = jnp.all(jnp.isfinite(new)) & (square > (_SHORTEST * terms) ** 2)
    return jnp.where(good, new, b), None

  return jax.lax.scan(step, b, None, length=_ITERATIONS)[0]
