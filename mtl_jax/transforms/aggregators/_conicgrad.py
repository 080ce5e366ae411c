"""The best direction for the worst task in a cone around the mean."""

from collections.abc import Hashable
import math

import jax.numpy as jnp

from mtl_jax.transforms.contract import aggregation
from mtl_jax.transforms.contract import arguments
from mtl_jax.transforms.contract import gram_based
from mtl_jax.transforms.solvers import conic
from mtl_jax.transforms.solvers import simplex


def conicgrad(
  angle: float = 45.0,
  *,
  num_tasks: int | None = None,
  axis_name: Hashable | None = None,
  reduce: str = 'mean',
  shard_axis: Hashable | None = None,
) -> aggregation.Aggregator:
  r"""ConicGrad: the worst task's best direction in a cone around the mean.

  With the mean :math:`g_0` of the task gradients and the cosine c of the angle

  .. math::
    \max_d \min_i \langle g_i, d \rangle \quad \text{s.t.} \quad
    |d| \le |g_0|, \; \langle g_0, d \rangle \ge c \, |g_0|^2

  and the solution is given the length :math:`|g_0|`. Such a d makes an angle of
  at most :math:`\arccos c` with the mean. It is MGDA's direction if that lies
  in the cone, and otherwise on the surface of the cone.

  Scale: the length of the mean gradient. Degree of homogeneity: 1. A task with
  a zero gradient gains nothing for any d; it counts only in the mean.

  The paper asks for the largest worst gain in the cone and sets the length
  afterwards. In a cone alone a positive gain has no maximum. With the length
  bounded there is one direction, which is found exactly here. For many more
  tasks than dimensions float32 leaves a residual of up to 1e-2.

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
  arguments.check_that(
    'angle', angle, lambda x: 0 < x < 90, 'between 0 and 90 degrees'
  )

  def weights_fn(gram, *, losses, active):
    del losses
    lengths, cos, usable = simplex.cosines(gram, active)
    cos = jnp.where(usable[:, None] & usable[None, :], cos, 0)
    # The cosine of each task with the mean, in units of the longest gradient.
    longest = jnp.max(jnp.where(usable, lengths, 0))
    share = jnp.where(usable, lengths / jnp.where(longest > 0, longest, 1), 0)
    square = share @ cos @ share
    mean = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
    tilt = cos @ share / jnp.where(mean > 0, mean, 1)
    if arguments.is_known(angle):
      radians = math.radians(angle)
    else:
      radians = jnp.deg2rad(angle.astype(gram.dtype))
    found = conic.worst_gain(
      cos, tilt, simplex.relative(lengths, usable), radians
    )
    count = jnp.maximum(jnp.sum(active), 1)
    # The quotient of lengths first; each alone may be far from 1.
    weights = found.p * found.v * (longest * mean / count / lengths)
    return gram_based.Solution(weights + found.q / count, found.residual)

  return gram_based.from_gram(
    weights_fn,
    num_tasks=num_tasks,
    axis_name=axis_name,
    reduce=reduce,
    shard_axis=shard_axis,
    residual=True,
  )
