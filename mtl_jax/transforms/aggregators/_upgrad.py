"""Projections of task gradients that conflict with no task."""

from collections.abc import Hashable
from collections.abc import Sequence

import jax.numpy as jnp

from mtl_jax.transforms.contract import aggregation
from mtl_jax.transforms.contract import arguments
from mtl_jax.transforms.contract import gram_based
from mtl_jax.transforms.solvers import cone


def upgrad(
  preference: Sequence[float] | None = None,
  *,
  num_tasks: int | None = None,
  axis_name: Hashable | None = None,
  reduce: str = 'mean',
  shard_axis: Hashable | None = None,
) -> aggregation.Aggregator:
  r"""Unconflicting projection of gradients (UPGrad).

  Every task gradient is projected on the dual cone of all gradients, which
  holds the directions that conflict with no task. The projections are averaged:

  .. math::
    d = \sum_i p_i \, \pi(g_i), \qquad
    \pi(g) = \arg\min_x |x - g| \;\; \text{s.t.} \;\;
    \langle g_j, x \rangle \ge 0 \;\text{ for all } j

  Hence d conflicts with no task and grows linearly with the length of any one
  gradient.

  Scale: the mean of the projections, or their sum weighted by the preference.
  Degree of homogeneity: 1. Tasks with a zero gradient bound nothing and count
  in the mean. Absent tasks drop out of the mean; a given preference for the
  others does not change. There is no regularisation, because with it the update
  conflicts with tasks whose gradients are short.

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
    The projections are (1/2, 1/2) and (0, 1).

    >>> import jax.numpy as jnp, mtl_jax
    >>> task_grads = jnp.array([[1.0, 0.0], [-1.0, 1.0]])
    >>> tx = mtl_jax.upgrad()
    >>> jnp.set_printoptions(precision=3)
    >>> print(tx.update(task_grads, tx.init(jnp.zeros(2)))[0])
    [0.25 0.75]

  References:
    Quinton and Rey, `Jacobian Descent for Multi-Objective Optimization
    <https://arxiv.org/abs/2406.16232>`_, 2024, eq. 3 and Proposition 1
  """
  preference = arguments.as_preference(preference, num_tasks)

  def weights_fn(gram, *, losses, active):
    del losses
    wanted = active / jnp.maximum(jnp.sum(active), 1)
    if preference is not None:
      arguments.check_length('preference', preference, gram.shape[0])
      wanted = jnp.asarray(preference)
    return cone.dual_cone(gram, active, jnp.diag(wanted.astype(gram.dtype)))

  return gram_based.from_gram(
    weights_fn,
    num_tasks=num_tasks,
    axis_name=axis_name,
    reduce=reduce,
    shard_axis=shard_axis,
    residual=True,
  )
