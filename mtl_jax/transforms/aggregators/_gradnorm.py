"""Gradient normalization."""

from collections.abc import Hashable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtl_jax.transforms.aggregators import _simplex_memory
from mtl_jax.transforms.contract import aggregation
from mtl_jax.transforms.contract import arguments
from mtl_jax.transforms.contract import gram_based


class GradNormMemory(NamedTuple):
  """The memory of `gradnorm`.

  Attributes:
    shares: [T], the learned weights over T, on the simplex.
    first_losses: [T], each task's loss in its first update.
    seen: bool [T], whether there was one.
  """

  shares: jax.Array
  first_losses: jax.Array
  seen: jax.Array


def gradnorm(
  alpha: float = 1.5,
  *,
  learning_rate: float = 0.025,
  scale: str = 'relative',
  num_tasks: int | None = None,
  axis_name: Hashable | None = None,
  reduce: str = 'mean',
  shard_axis: Hashable | None = None,
) -> aggregation.Aggregator:
  r"""Gradient normalization (GradNorm): weights that balance training rates.

  The update is :math:`d = \sum_i w_i g_i`. Then the weights move one step down
  the slope of

  .. math::
    \sum_i \big| w_i |g_i| - \bar{G}\, r_i^\alpha \big|, \qquad
    \bar{G} = \frac{1}{T} \sum_j w_j |g_j|, \quad
    r_i = \frac{L_i / L_i^0}{\frac{1}{T} \sum_j L_j / L_j^0}

  with the targets held fixed. They are then rescaled to the sum T.

  Scale: weights with the sum T, so the first update is the sum. Degree of
  homogeneity: 1; with `scale='paper'` the step of the weights grows with the
  gradients.

  Args:
    alpha: how strongly tasks that learn slowly are pulled up, not negative; 0
      makes the weighted gradients equally long.
    learning_rate: step size of the weights, positive.
    scale: `'relative'` (the slope of a weight is plus or minus :math:`|g_i|`
      over the mean length) or `'paper'` (:math:`|g_i|` itself).
    num_tasks: T; needed at `init`, by hand or from a wrapper.
    axis_name: see `from_gram`.
    reduce: see `from_gram`.
    shard_axis: see `from_gram`.

  Returns:
    An aggregator whose memory is a `GradNormMemory`. Its `update` needs
    `losses` [T]; a task whose first loss is not positive counts as if it stayed
    there. Weights do not fall below zero. The paper takes lengths in the last
    shared layer only; here they are over all shared parameters.

  Raises:
    ValueError: for an argument outside its range; at `update` without `losses`.

  Examples:
    The mean length is 2; the weights that follow move by 0.1 times 1 / 2 and
    3 / 2, up for the shorter and down for the longer gradient, to 1.05 and
    0.85, before their sum is 2 again.

    >>> import jax.numpy as jnp, mtl_jax
    >>> task_grads = jnp.array([[1.0, 0.0], [0.0, 3.0]])
    >>> tx = mtl_jax.gradnorm(learning_rate=0.1, num_tasks=2)
    >>> losses = jnp.ones(2)
    >>> updates, state = tx.update(
    ...   task_grads, tx.init(jnp.zeros(2)), losses=losses)
    >>> print(updates)
    [1. 3.]
    >>> _, state = tx.update(task_grads, state, losses=losses)
    >>> jnp.set_printoptions(precision=3)
    >>> print(state.task_weights)
    [1.105 0.895]

  References:
    Chen et al., `GradNorm: Gradient Normalization for Adaptive Loss Balancing
    in Deep Multitask Networks <https://arxiv.org/abs/1711.02257>`_, 2018,
    Algorithm 1
  """
  arguments.check_not_negative('alpha', alpha)
  arguments.check_positive('learning_rate', learning_rate)
  arguments.one_of('scale', scale, ('relative', 'paper'))

  def memory(size, dtype):
    return GradNormMemory(
      shares=_simplex_memory.start(size, dtype),
      first_losses=jnp.ones(size, dtype),
      seen=jnp.zeros(size, bool),
    )

  def weights_fn(gram, *, losses, active, memory):
    if losses is None:
      raise ValueError('gradnorm needs losses at update')
    dtype = memory.shares.dtype
    number = jnp.maximum(jnp.sum(active), 1).astype(dtype)

    def mean(x):
      return jnp.sum(jnp.where(active, x, 0)) / number

    losses = losses.astype(dtype)
    first = jnp.where(active & ~memory.seen, losses, memory.first_losses)
    progress = jnp.where(
      first > 0, jnp.maximum(losses, 0) / jnp.where(first > 0, first, 1), 1
    )
    average = mean(progress)
    rate = jnp.where(
      average > 0, progress / jnp.where(average > 0, average, 1), 1
    )
    lengths = jnp.sqrt(jnp.diagonal(gram)).astype(dtype)
    weights = number * _simplex_memory.share(memory.shares, active)
    norms = weights * lengths
    target = mean(norms) * rate**alpha
    off = norms - target
    # Lengths that differ only by the rounding of a mean have no slope.
    rounding = 4 * jnp.finfo(dtype).eps * target
    slope = jnp.where(jnp.abs(off) > rounding, jnp.sign(off), 0) * lengths
    if scale == 'relative':
      length = mean(lengths)
      slope = jnp.where(length > 0, slope / jnp.where(length > 0, length, 1), 0)
    moved = jnp.maximum(weights - learning_rate * slope, 0)
    shares = _simplex_memory.share(moved, active)
    return gram_based.Solution(
      weights,
      memory=GradNormMemory(
        _simplex_memory.keep(memory.shares, shares, active),
        first,
        memory.seen | active,
      ),
    )

  return gram_based.from_gram(
    weights_fn,
    memory=memory,
    num_tasks=num_tasks,
    axis_name=axis_name,
    reduce=reduce,
    shard_axis=shard_axis,
    residual=False,
  )
