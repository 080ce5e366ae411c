"""Multi-objective gradient correction."""

from collections.abc import Hashable
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtl_jax.transforms.aggregators import _simplex_memory
from mtl_jax.transforms.aggregators import _tracked
from mtl_jax.transforms.contract import aggregation
from mtl_jax.transforms.contract import arguments
from mtl_jax.transforms.contract import lifting
from mtl_jax.transforms.solvers import simplex


class MocoMemory(NamedTuple):
  """The memory of `moco`.

  Attributes:
    tracked: tree of leaves [T, *shape], the tracked gradients.
    weights: [T], on the simplex.
    updates: [T], number of updates with each task.
  """

  tracked: Any
  weights: jax.Array
  updates: jax.Array


def moco(
  *,
  beta: float = 0.5,
  beta_decay: float = 0.5,
  gamma: float = 0.1,
  gamma_decay: float = 0.5,
  rho: float = 0.0,
  scale: str = 'relative',
  num_tasks: int | None = None,
  axis_name: Hashable | None = None,
  reduce: str = 'mean',
  shard_axis: Hashable | None = None,
) -> aggregation.Aggregator:
  r"""Multi-objective gradient correction (MoCo).

  A moving average of each task's gradients, whose noise dies out, and in each
  update one projected step of the weights on its Gram matrix:

  .. math::
    y_i \leftarrow y_i + \beta_k (g_i - y_i), \qquad
    w \leftarrow \Pi_\Delta\big(w - \gamma_k (Y Y^\top + \rho I)\, w\big),
    \qquad d = \sum_i w_i y_i

  with :math:`\beta_k = \beta / k^{b}` and :math:`\gamma_k = \gamma / k^{c}` in
  the k-th update with a task (for :math:`\gamma_k`, the task with the most).
  The average starts with its first gradient.

  Scale: weights on the simplex. Degree of homogeneity: 1 in the gradients of
  this and the earlier updates together; with `scale='paper'` the step of the
  weights grows with the square of the gradients.

  Memory: one stack like the task gradients, in float32 at least.

  Args:
    beta: step size of the average, in (0, 1].
    beta_decay: b, not negative; 0 for a constant step.
    gamma: step size of the weights, positive.
    gamma_decay: c, not negative.
    rho: regularization towards equal weights, not negative. With
      `scale='relative'` it is in units of the squared mean length too.
    scale: `'relative'` (the Gram matrix is divided by the square of the mean
      length of the :math:`y_i`) or `'paper'`.
    num_tasks: T; needed at `init`, by hand or from a wrapper.
    axis_name: see `from_gram`.
    reduce: see `from_gram`.
    shard_axis: see `from_gram`.

  Returns:
    An aggregator whose memory is a `MocoMemory`. The weights in its state are
    the coefficients of the tracked gradients, not of this update's gradients.

  Raises:
    ValueError: for an argument outside its range.

  Examples:
    Equal and orthogonal gradients keep equal weights.

    >>> import jax.numpy as jnp, mtl_jax
    >>> task_grads = jnp.array([[2.0, 0.0], [0.0, 2.0]])
    >>> tx = mtl_jax.moco(beta=0.5, beta_decay=0.0, num_tasks=2)
    >>> updates, state = tx.update(task_grads, tx.init(jnp.zeros(2)))
    >>> print(updates)
    [1. 1.]
    >>> print(tx.update(2 * task_grads, state)[0])
    [1.5 1.5]

  References:
    Fernando et al., `Mitigating Gradient Bias in Multi-objective Learning: A
    Provably Convergent Stochastic Approach <https://arxiv.org/abs/2210.12624>`_,
    2023, Algorithm 1
  """
  arguments.check_that('beta', beta, lambda x: 0 < x <= 1, 'in (0, 1]')
  arguments.check_positive('gamma', gamma)
  arguments.check_not_negative('beta_decay', beta_decay)
  arguments.check_not_negative('gamma_decay', gamma_decay)
  arguments.check_not_negative('rho', rho)
  arguments.one_of('scale', scale, ('relative', 'paper'))

  def memory(size, params, dtype):
    return MocoMemory(
      tracked=_tracked.start(size, params),
      weights=_simplex_memory.start(size, dtype),
      updates=jnp.zeros(size, jnp.int32),
    )

  def combine(given: lifting.Given) -> lifting.Combined:
    old, active = given.memory, given.active
    dtype = old.weights.dtype
    updates = _tracked.count_of(old.updates, active)
    k = jnp.maximum(updates, 1).astype(dtype)
    tracked = _tracked.follow(
      old.tracked,
      given.task_grads,
      jnp.where(updates <= 1, 1, beta / k**beta_decay),
      active,
    )
    inner = _tracked.gram(tracked, active, given.axes)
    if scale == 'relative':
      inner = _simplex_memory.relative(inner, active)
    longest = jnp.max(jnp.where(active, k, 1))
    w = _simplex_memory.share(old.weights, active)
    slope = inner.astype(dtype) @ w + rho * w
    w = simplex.project_simplex(
      w - gamma / longest**gamma_decay * slope, active
    )
    return lifting.Combined(
      updates=_tracked.weighted_sum(w, tracked, given.task_grads),
      weights=w,
      memory=MocoMemory(
        tracked, _simplex_memory.keep(old.weights, w, active), updates
      ),
    )

  return lifting.lift(
    combine,
    memory=memory,
    num_tasks=num_tasks,
    axes=aggregation.Axes(axis_name, reduce, shard_axis),
    weights='tracked',
  )
