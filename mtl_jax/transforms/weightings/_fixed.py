"""Fixed task weights."""

from collections.abc import Sequence

import jax.numpy as jnp

from mtl_jax.transforms.contract import arguments
from mtl_jax.transforms.contract import loss_weighting


def equal_weights() -> loss_weighting.LossWeighting:
  r"""The mean loss.

  .. math:: \min \frac{1}{T} \sum_i L_i, \qquad w_i = 1 / T

  Scale: weights sum to 1, so that the update is the mean of the task gradients,
  as with `linear`. Absent tasks drop out of the mean.

  Returns:
    A `LossWeighting` without state.

  Examples:
    >>> import jax.numpy as jnp, mtl_jax
    >>> weighting = mtl_jax.equal_weights()
    >>> losses, state = jnp.array([1.0, 2.0]), weighting.init(2)
    >>> print(weighting.update(losses, state)[0])
    [0.5 0.5]

  References:
    Kurin et al., `In Defense of the Unitary Scalarization for Deep Multi-Task
    Learning <https://arxiv.org/abs/2201.04122>`_, 2022
  """

  def update(losses, active):
    del losses
    return active / loss_weighting.number(active)

  return loss_weighting.stateless(update)


def static_weights(weights: Sequence[float]) -> loss_weighting.LossWeighting:
  r"""A weighted sum of the losses.

  .. math:: \min \sum_i w_i L_i

  Scale: as given; the weights of the others stay when a task is absent.

  Args:
    weights: [T], non-negative and not all zero.

  Returns:
    A `LossWeighting` without state.

  Raises:
    ValueError: for negative, non-finite or all-zero weights; at `init` and
      `update` for another number of tasks.

  Examples:
    >>> import jax.numpy as jnp, mtl_jax
    >>> weighting = mtl_jax.static_weights((0.5, 1.5))
    >>> losses, state = jnp.array([1.0, 2.0]), weighting.init(2)
    >>> print(weighting.update(losses, state)[0])
    [0.5 1.5]

  References:
    Xin et al., `Do Current Multi-Task Optimization Methods in Deep Learning
    Even Help? <https://arxiv.org/abs/2209.11379>`_, 2022 (a grid of such
    weights is the baseline for every other method)
  """
  weights = arguments.as_weights('weights', weights)

  def update(losses, active):
    del active
    return jnp.asarray(weights, losses.dtype)

  return loss_weighting.stateless(update, ('weights', weights))
