"""Weightings from the logarithms of the losses."""

import jax.numpy as jnp

from mtl_jax.transforms.contract import loss_weighting


def gls() -> loss_weighting.LossWeighting:
  r"""Geometric loss strategy (GLS): the geometric mean of the losses.

  .. math::
    \min \Big(\prod_i L_i\Big)^{1/T}, \qquad
    w_i = \frac{1}{T L_i} \Big(\prod_j L_j\Big)^{1/T}

  Scale: the geometric mean's; equal losses have weights 1 / T. Losses must not
  be negative, otherwise the weights are NaN; a task whose loss is exactly 0 is
  solved and counts as absent.

  Returns:
    A `LossWeighting` without state.

  Examples:
    >>> import jax.numpy as jnp, mtl_jax
    >>> weighting = mtl_jax.gls()
    >>> losses, state = jnp.array([1.0, 4.0]), weighting.init(2)
    >>> print(weighting.update(losses, state)[0])
    [1.   0.25]

  References:
    Chennupati et al., `MultiNet++: Multi-Stream Feature Aggregation and
    Geometric Loss Strategy for Multi-Task Learning
    <https://arxiv.org/abs/1904.08492>`_, 2019
  """

  def update(losses, active):
    losses, left = loss_weighting.unsolved(losses, active)
    size = loss_weighting.number(left)
    # An absent task counts as 1, whose logarithm is 0. The mean of logarithms
    # does not overflow where the product would.
    logs = jnp.log(loss_weighting.positive(losses))
    weights = jnp.exp(jnp.sum(logs) / size - logs) / size
    return jnp.where(left, weights, 0)

  return loss_weighting.stateless(update)


def si() -> loss_weighting.LossWeighting:
  r"""Scale-invariant baseline (SI): the sum of the logarithms of the losses.

  .. math:: \min \sum_i \log L_i, \qquad w_i = 1 / L_i

  Scale: as the equation says; multiplying a loss by a constant changes nothing.
  Losses must not be negative, otherwise their weights are NaN; a task whose
  loss is exactly 0 is solved and has the weight 0.

  Returns:
    A `LossWeighting` without state.

  Examples:
    >>> import jax.numpy as jnp, mtl_jax
    >>> weighting = mtl_jax.si()
    >>> losses, state = jnp.array([1.0, 2.0]), weighting.init(2)
    >>> print(weighting.update(losses, state)[0])
    [1.  0.5]

  References:
    Navon et al., `Multi-Task Learning as a Bargaining Game
    <https://arxiv.org/abs/2202.01017>`_, 2022, section 5 (baseline)
  """

  def update(losses, active):
    losses, left = loss_weighting.unsolved(losses, active)
    return jnp.where(left, 1 / loss_weighting.positive(losses), 0)

  return loss_weighting.stateless(update)
