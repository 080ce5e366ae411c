"""The projection of the mean gradient that conflicts with no task."""

from collections.abc import Hashable
from collections.abc import Sequence

import jax.numpy as jnp

from mtl_jax.transforms.contract import aggregation
from mtl_jax.transforms.contract import arguments
from mtl_jax.transforms.contract import gram_based
from mtl_jax.transforms.solvers import cone


def dualproj(
  preference: Sequence[float] | None = None,
  *,
  num_tasks: int | None = None,
  axis_name: Hashable | None = None,
  reduce: str = 'mean',
  shard_axis: Hashable | None = None,
) -> aggregation.Aggregator:
  r"""Projection of the mean gradient on the dual cone (DualProj).

  The direction nearest to the mean among those that conflict with no task:

  .. math::
    d = \arg\min_x \Big|x - \sum_i p_i g_i\Big| \quad \text{s.t.} \quad
    \langle g_j, x \rangle \ge 0 \;\text{ for all } j

  Gradient episodic memory does the same with the gradient of its newest task.

  Scale: the mean of the task gradients, or their sum weighted by the
  preference. Degree of homogeneity: 1. Tasks with a zero gradient bound nothing
  and count in the mean. Absent tasks drop out of the mean; a given preference
  for the others does not change. There is no regularisation, because with it
  the update conflicts with tasks whose gradients are short.

  Args:
    preference: p [T], non-negative and not all zero; None for 1/T each.
    num_tasks: T, to have weights, Gram matrix and residual in the state.
    axis_name: see `from_gram`.
    reduce: see `from_gram`.
    shard_axis: see `from_gram`.

  Returns:
    An aggregator.

  Raises:
    ValueError: for a preference that is negative, non-finite, all zero or of
      another length than the tasks.

  Examples:
    The mean (1, 1, 1) has the inner product -2 with the first gradient, whose
    squared length is 18, and one ninth of it is added.

    >>> import jax.numpy as jnp, mtl_jax
    >>> task_grads = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
    >>> tx = mtl_jax.dualproj()
    >>> jnp.set_printoptions(precision=3)
    >>> print(tx.update(task_grads, tx.init(jnp.zeros(3)))[0])
    [0.556 1.111 1.111]

  References:
    Lopez-Paz and Ranzato, `Gradient Episodic Memory for Continual Learning
    <https://arxiv.org/abs/1706.08840>`_, 2017, eq. 11

    Quinton and Rey, `Jacobian Descent for Multi-Objective Optimization
    <https://arxiv.org/abs/2406.16232>`_, 2024 (the name)
  """
  preference = arguments.as_preference(preference, num_tasks)

  def weights_fn(gram, *, losses, active):
    del losses
    wanted = active / jnp.maximum(jnp.sum(active), 1)
    if preference is not None:
      arguments.check_length('preference', preference, gram.shape[0])
      wanted = jnp.asarray(preference)
    return cone.dual_cone(gram, active, wanted.astype(gram.dtype)[None])

  return gram_based.from_gram(
    weights_fn,
    num_tasks=num_tasks,
    axis_name=axis_name,
    reduce=reduce,
    shard_axis=shard_axis,
    residual=True,
  )
