"""The direction that helps the worst task while a constraint falls."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtl_jax.transforms.contract import gram_based
from mtl_jax.transforms.solvers import simplex


class Constraint(NamedTuple):
  """The constraint's gradient q, as the direction problem needs it.

  Attributes:
    inner: [T], inner products of q with the validation gradients.
    square: scalar, |q|^2.
    rho: rate at which the constraint should fall.
  """

  inner: jax.Array
  square: jax.Array
  rho: float

  def multiplier(self, weights: jax.Array) -> jax.Array:
    """The best non-negative multiplier of q for these weights."""
    safe = jnp.where(self.square > 0, self.square, 1)
    best = self.rho * jnp.sum(weights) - weights @ self.inner / safe
    return jnp.where(self.square > 0, jnp.maximum(best, 0), 0)


def least_worst(
  gram: jax.Array, constraint: Constraint, active: jax.Array
) -> gram_based.Solution:
  r"""The dual of a search for the direction that helps the worst task.

  .. math::
    \min_{w \in \Delta, \, \nu \ge 0} \; \tfrac{1}{2} \Big|\sum_k w_k F_k +
    \nu q\Big|^2 - \nu \rho |q|^2

  Args:
    gram: [T, T], inner products of the validation gradients.
    constraint: the constraint's gradient q.
    active: bool [T].

  Returns:
    weights [T], 0 for absent tasks, and the residual: how far the derivative by
    a weight falls below the weighted mean of all derivatives, relative to the
    length of the gradient times the length of all terms in the sum.
  """
  lengths, cos, usable = simplex.cosines(gram, active)
  # A gradient of length zero has no scale, so it takes the shortest one.
  shortest = jnp.min(jnp.where(usable, lengths, jnp.inf))
  shortest = jnp.where(jnp.any(usable), shortest, 1)
  lengths = jnp.where(usable, lengths, shortest)
  some = constraint.square > 0
  across = jnp.where(some, jnp.sqrt(jnp.where(some, constraint.square, 1)), 0)
  tilt = constraint.inner / lengths / jnp.where(across > 0, across, 1)
  reach = constraint.rho * across / shortest
  # The variables are w |F| / shortest and nu |q| / shortest. An absent task's
  # variable has a separate quadratic and no part in the sum of weights.
  both = usable[:, None] & usable[None, :]
  own = jnp.diag(jnp.where(active, 0.0, 1.0)).astype(gram.dtype)
  cos = jnp.where(both, cos, 0)
  matrix = jnp.block(
    [[cos + own, tilt[:, None]], [tilt[None], jnp.ones((1, 1), gram.dtype)]]
  )
  linear = jnp.zeros(tilt.shape[0] + 1, gram.dtype).at[-1].set(-reach)
  a = jnp.append(jnp.where(active, shortest / lengths, 0), 0)
  # Without any task the sum of weights still needs a variable.
  a = jnp.where(jnp.any(active), a, jnp.ones_like(a).at[-1].set(0))
  # The multiplier of q starts far above every value except those for an opposed
  # q: Newton's steps from below are too short there.
  start = jnp.full_like(a, 1 / jnp.sum(a)).at[-1].set(10 * (1 + reach))
  still = jax.lax.stop_gradient((matrix, linear, a, start))
  derivatives = lambda v: (still[0] @ v + still[1], still[0])
  v = simplex.interior_point(derivatives, still[2], still[3])
  slopes = matrix @ v + linear
  level = jax.lax.stop_gradient(v @ slopes)
  v = simplex.last_step_on_simplex(v, slopes - level * a, still[0], a)
  weights = jnp.where(active, v[:-1] * a[:-1], 0)
  total = jnp.sum(weights)
  weights = weights / jnp.where(total > 0, total, 1)

  v = weights * lengths / shortest
  across_v = constraint.multiplier(weights) * across / shortest
  slopes = cos @ v + across_v * tilt
  level = v @ slopes
  terms = jnp.sum(v) + across_v
  shortfall = jnp.where(usable, level * shortest / lengths - slopes, 0)
  residual = jnp.max(shortfall) / jnp.where(terms > 0, terms, 1)
  return gram_based.Solution(
    weights, jax.lax.stop_gradient(jnp.maximum(residual, 0))
  )
