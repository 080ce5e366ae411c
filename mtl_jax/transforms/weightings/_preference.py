"""Scalarizations along a preferred direction of the losses."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from mtl_jax.transforms.contract import arguments
from mtl_jax.transforms.contract import loss_weighting


def _preferred(
  preference: tuple[float, ...] | None, losses: jax.Array, active: jax.Array
) -> jax.Array:
  """The preferences of the active tasks [T], equal ones if None."""
  if preference is None:
    return active / loss_weighting.number(active)
  return jnp.where(active, jnp.asarray(preference, losses.dtype), 0)


def _unit(vector: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The direction of a vector, zero for the zero vector, and its length."""
  largest = jnp.max(jnp.abs(vector))
  # Scaled by the largest entry, so that squares neither over- nor underflow.
  scaled = vector / jnp.where(largest == 0, 1, largest)
  length = jnp.sqrt(jnp.sum(scaled**2))
  return scaled / jnp.where(length == 0, 1, length), length * largest


def cosmos(
  lambda_: float = 1.0, *, preference: Sequence[float] | None = None
) -> loss_weighting.LossWeighting:
  r"""COSMOS: a weighted sum less the cosine between losses and preferences.

  .. math::
    \min \sum_i r_i L_i - \lambda \cos(r, L), \qquad
    w_i = r_i - \frac{\lambda}{|L|} \Big(\frac{r_i}{|r|}
    - \cos(r, L) \frac{L_i}{|L|}\Big)

  Weights can be negative. The authors draw a new :math:`r` at every step and
  feed it to the model; here it is given.

  Scale: as the equation says, with :math:`r` as given; the preferences of the
  others stay when a task is absent. Losses that are all zero have no direction,
  and the weights are then :math:`r`.

  Args:
    lambda_: :math:`\lambda`, finite and not negative.
    preference: :math:`r` [T], non-negative and not all zero; None is 1 / T (of
      the active tasks).

  Returns:
    A `LossWeighting` without state.

  Raises:
    ValueError: for a negative or non-finite number, or preferences that are all
      zero; at `init` and `update` for another number of tasks.

  Examples:
    >>> import jax.numpy as jnp, mtl_jax
    >>> weighting = mtl_jax.cosmos(5.0, preference=(1.0, 0.0))
    >>> losses, state = jnp.array([3.0, 4.0]), weighting.init(2)
    >>> print(weighting.update(losses, state)[0])  # (1, 0) - (0.64, -0.48)
    [0.36 0.48]

  References:
    Ruchte and Grabocka, `Scalable Pareto Front Approximation for Deep
    Multi-Objective Learning <https://arxiv.org/abs/2103.13392>`_, 2021, eq. 5
  """
  arguments.check_not_negative('lambda_', lambda_)
  preference = arguments.as_preference(preference)

  def update(losses, active):
    preferred = _preferred(preference, losses, active)
    toward, _ = _unit(preferred)
    along, length = _unit(jnp.where(active, losses, 0))
    turn = toward - jnp.sum(toward * along) * along
    slope = jnp.where(length == 0, 0, turn / jnp.where(length == 0, 1, length))
    return preferred - lambda_ * slope

  return loss_weighting.stateless(update, ('preference', preference))


def pbi(
  theta: float = 5.0,
  *,
  preference: Sequence[float] | None = None,
  ideal: float | Sequence[float] = 0.0,
) -> loss_weighting.LossWeighting:
  r"""Penalty boundary intersection (PBI) for the ray of the preferences.

  With the direction :math:`u = r / |r|` of the preferences and an ideal point
  :math:`b`

  .. math::
    \min d_1 + \theta d_2, \quad d_1 = u^\top (L - b), \quad
    d_2 = |p|, \quad p = L - b - d_1 u, \qquad w = u + \theta\, p / |p|

  Weights can be negative. On the ray, up to rounding, :math:`d_2` has no
  gradient and the weights are :math:`u`.

  Scale: as the equation says; only the direction of the preferences counts.

  Args:
    theta: penalty of the distance to the ray, finite and not negative.
    preference: :math:`r` [T], non-negative and not all zero; None is the same
      for all.
    ideal: lower bound of the losses, one for all tasks or one each.

  Returns:
    A `LossWeighting` without state.

  Raises:
    ValueError: for a negative or non-finite number, or preferences that are all
      zero; at `init` and `update` for another number of tasks.

  Examples:
    >>> import jax.numpy as jnp, mtl_jax
    >>> weighting = mtl_jax.pbi(2.0, preference=(1.0, 0.0))
    >>> losses, state = jnp.array([1.0, 3.0]), weighting.init(2)
    >>> print(weighting.update(losses, state)[0])
    [1. 2.]

  References:
    Zhang and Li, `MOEA/D: A Multiobjective Evolutionary Algorithm Based on
    Decomposition <https://doi.org/10.1109/TEVC.2007.892759>`_, 2007
  """
  arguments.check_not_negative('theta', theta)
  preference = arguments.as_preference(preference)
  lowest = arguments.as_numbers('ideal', ideal)

  def update(losses, active):
    along, _ = _unit(_preferred(preference, losses, active))
    above = jnp.where(active, losses - jnp.asarray(lowest, losses.dtype), 0)
    off = above - jnp.sum(along * above) * along
    away, distance = _unit(off)
    # On the ray the remainder is rounding, so its direction has no meaning.
    rounding = jnp.finfo(losses.dtype).eps * losses.size
    near = distance <= rounding * jnp.max(jnp.abs(above))
    return along + theta * jnp.where(near, 0, away)

  return loss_weighting.stateless(
    update, ('preference', preference), ('ideal', lowest)
  )
