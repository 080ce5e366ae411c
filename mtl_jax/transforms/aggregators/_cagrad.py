"""Conflict-averse gradient descent."""

from collections.abc import Hashable

import jax.numpy as jnp

from mtl_jax.transforms.contract import aggregation
from mtl_jax.transforms.contract import arguments
from mtl_jax.transforms.contract import gram_based
from mtl_jax.transforms.solvers import averse


def cagrad(
  c: float = 0.5,
  *,
  rescale: str = 'none',
  num_tasks: int | None = None,
  axis_name: Hashable | None = None,
  reduce: str = 'mean',
  shard_axis: Hashable | None = None,
) -> aggregation.Aggregator:
  r"""Conflict-averse gradient descent (CAGrad).

  The direction, within a ball around the mean gradient :math:`g_0`, along which
  the worst task improves most:

  .. math::
    \max_d \min_i \langle g_i, d \rangle
    \quad \text{s.t.} \quad |d - g_0| \le c\,|g_0|

  whose solution is :math:`d = g_0 + \frac{c |g_0|}{|g_w|} g_w` with
  :math:`w = \arg\min_{w \in \Delta} \langle g_w, g_0 \rangle + c |g_0| |g_w|`.

  Scale: the paper's, about the mean gradient's. Degree of homogeneity: 1.

  Args:
    c: radius of the ball, not negative. At 0 it is the mean; for large c it
      tends to the direction of `mgda`.
    rescale: `'none'` (paper), or a divisor that the authors' code offers:
      `'1+c^2'` (their default) or `'1+c'`.
    num_tasks: T, to have weights, Gram matrix and residual in the state.
    axis_name: see `from_gram`.
    reduce: see `from_gram`.
    shard_axis: see `from_gram`.

  Returns:
    An aggregator. Where :math:`g_w` vanishes, the update is inside the ball.

  Raises:
    ValueError: for a negative c or another `rescale`.

  Examples:
    >>> import jax.numpy as jnp, mtl_jax
    >>> task_grads = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
    >>> tx = mtl_jax.cagrad(c=0.5)
    >>> jnp.set_printoptions(precision=3)
    >>> print(tx.update(task_grads, tx.init(jnp.zeros(3)))[0])
    [0.184 1.204 1.204]

  References:
    Liu et al., `Conflict-Averse Gradient Descent for Multi-task Learning
    <https://arxiv.org/abs/2110.14048>`_, 2021, Algorithm 1
  """
  arguments.check_not_negative('c', c)
  arguments.one_of('rescale', rescale, ('none', '1+c^2', '1+c'))
  divisor = {'none': 1.0, '1+c^2': 1 + c * c, '1+c': 1 + c}[rescale]

  # A traced c may be 0 too, but only when the program runs.
  is_mean = arguments.is_known(c) and c == 0

  def weights_fn(gram, *, losses, active):
    del losses
    mean = active / jnp.maximum(jnp.sum(active), 1).astype(gram.dtype)
    if is_mean:
      return mean
    radius = arguments.in_dtype(c, gram.dtype)
    if arguments.is_known(c):
      found, multiplier = averse.conflict_averse(gram, active, radius)
    else:
      # A ball of no radius has no dual.
      there = radius > 0
      found, multiplier = averse.conflict_averse(
        gram, active, jnp.where(there, radius, 1)
      )
      multiplier = jnp.where(there, multiplier, 0)
    weights = (mean + multiplier * found.weights) / divisor
    return gram_based.Solution(weights, found.residual)

  return gram_based.from_gram(
    weights_fn,
    num_tasks=num_tasks,
    axis_name=axis_name,
    reduce=reduce,
    shard_axis=shard_axis,
    residual=not is_mean,
  )
