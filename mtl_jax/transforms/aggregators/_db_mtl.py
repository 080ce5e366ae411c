"""Dual balancing of losses and gradients."""

from collections.abc import Hashable
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtl_jax.transforms.aggregators import _tracked
from mtl_jax.transforms.contract import aggregation
from mtl_jax.transforms.contract import arguments
from mtl_jax.transforms.contract import lifting


class DbMtlMemory(NamedTuple):
  """The memory of `db_mtl`.

  Attributes:
    tracked: tree of leaves [T, *shape], averages of the gradients of log
      losses.
    updates: [T], number of updates with each task.
  """

  tracked: Any
  updates: jax.Array


def db_mtl(
  *,
  beta: float = 0.9,
  beta_decay: float = 0.0,
  num_tasks: int | None = None,
  axis_name: Hashable | None = None,
  reduce: str = 'mean',
  shard_axis: Hashable | None = None,
) -> aggregation.Aggregator:
  r"""Dual balancing (DB-MTL): log losses, and gradients of equal length.

  .. math::
    y_i \leftarrow \beta_k y_i + (1 - \beta_k)\, g_i / L_i, \qquad
    d = \max_j |y_j| \sum_i \frac{y_i}{|y_i|}

  where :math:`g_i / L_i` is the gradient of :math:`\log L_i` and :math:`\beta_k
  = \beta / k^{b}` in the k-th update with a task. The average starts with its
  first gradient.

  Scale: the sum of T gradients of log losses, so T / L for T equal tasks of
  loss L; the update grows as losses fall. Degree of homogeneity: 1 in the
  gradients of this and the earlier updates together, for given losses; 0 where
  losses and their gradients are scaled alike.

  Memory: one stack like the task gradients, in float32 at least.

  Args:
    beta: weight of the past in the average, in [0, 1).
    beta_decay: b, not negative; 0 for a constant weight. The paper searches
      among constant ones and b = 0.5.
    num_tasks: T; needed at `init`, by hand or from a wrapper.
    axis_name: see `from_gram`.
    reduce: see `from_gram`.
    shard_axis: see `from_gram`.

  Returns:
    An aggregator whose memory is a `DbMtlMemory`. Its `update` needs `losses`
    [T] and takes their absolute values; a loss of zero counts as 1. A task
    whose average is zero has weight 0. The weights in its state are the
    coefficients of the :math:`y_i`. In the paper the heads also follow the log
    losses; here they are up to the caller.

  Raises:
    ValueError: for an argument outside its range; at `update` without `losses`.

  Examples:
    The gradients of the log losses are (3, 0) and (0, 1).

    >>> import jax.numpy as jnp, mtl_jax
    >>> task_grads = jnp.array([[6.0, 0.0], [0.0, 0.5]])
    >>> tx = mtl_jax.db_mtl(num_tasks=2)
    >>> print(tx.update(
    ...   task_grads, tx.init(jnp.zeros(2)), losses=jnp.array([2.0, 0.5]))[0])
    [3. 3.]

  References:
    Lin et al., `Dual-Balancing for Multi-Task Learning
    <https://arxiv.org/abs/2308.12029>`_, 2023, Algorithm 1
  """
  arguments.check_that('beta', beta, lambda x: 0 <= x < 1, 'in [0, 1)')
  arguments.check_not_negative('beta_decay', beta_decay)

  def memory(size, params, dtype):
    del dtype
    return DbMtlMemory(
      tracked=_tracked.start(size, params),
      updates=jnp.zeros(size, jnp.int32),
    )

  def combine(given: lifting.Given) -> lifting.Combined:
    if given.losses is None:
      raise ValueError('db_mtl needs losses at update')
    old, active = given.memory, given.active
    dtype = given.gram.dtype
    updates = _tracked.count_of(old.updates, active)
    k = jnp.maximum(updates, 1).astype(dtype)
    losses = jnp.abs(given.losses).astype(dtype)
    tracked = _tracked.follow(
      old.tracked,
      given.task_grads,
      jnp.where(updates <= 1, 1, 1 - beta / k**beta_decay),
      active,
      1 / jnp.where(losses > 0, losses, 1),
    )
    squares = jnp.diagonal(_tracked.gram(tracked, active, given.axes))
    lengths = jnp.sqrt(squares).astype(dtype)
    weights = jnp.where(
      lengths > 0, jnp.max(lengths) / jnp.where(lengths > 0, lengths, 1), 0
    )
    return lifting.Combined(
      updates=_tracked.weighted_sum(weights, tracked, given.task_grads),
      weights=weights,
      memory=DbMtlMemory(tracked, updates),
    )

  return lifting.lift(
    combine,
    memory=memory,
    num_tasks=num_tasks,
    axes=aggregation.Axes(axis_name, reduce, shard_axis),
    weights='tracked',
  )
