"""Multi-objective gradient descent with double sampling."""

from collections.abc import Hashable
from typing import Any

import jax

from mtl_jax.transforms.aggregators import _simplex_memory
from mtl_jax.transforms.contract import aggregation
from mtl_jax.transforms.contract import algebra
from mtl_jax.transforms.contract import arguments
from mtl_jax.transforms.contract import lifting
from mtl_jax.transforms.solvers import simplex


def modo(
  gamma: float = 0.1,
  *,
  rho: float = 0.0,
  batches: str = 'three',
  scale: str = 'relative',
  num_tasks: int | None = None,
  axis_name: Hashable | None = None,
  reduce: str = 'mean',
  shard_axis: Hashable | None = None,
) -> aggregation.Aggregator:
  r"""Multi-objective gradient descent with double sampling (MoDo).

  One projected step of the weights in each update. It is unbiased because the
  two factors of every inner product come from independent batches:

  .. math::
    w \leftarrow \Pi_\Delta\big(w - \gamma (M + \rho I)\, w\big), \quad
    M_{ij} = \langle g_i(z_1), g_j(z_2) \rangle, \quad
    d = \sum_i w_i g_i

  Scale: weights on the simplex. Degree of homogeneity: 1; with `scale='paper'`
  the step grows with the square of the gradients.

  Args:
    gamma: step size of the weights, positive.
    rho: regularization towards equal weights, not negative. With
      `scale='relative'` it is in units of the squared mean length too.
    batches: `'three'` (the weights from the two stacks in `extra_grads`, the
      update from the task gradients) or `'two'` (the weights from the task
      gradients and the one stack in `extra_grads`, the update from the mean of
      both; the weights in the state are its coefficients in that mean).
    scale: `'relative'` (M is divided by the square of the mean root of its
      diagonal, negative entries counting as zero) or `'paper'`.
    num_tasks: T; needed at `init`, by hand or from a wrapper.
    axis_name: see `from_gram`.
    reduce: see `from_gram`.
    shard_axis: see `from_gram`.

  Returns:
    An aggregator whose memory is the weights w [T]. Its `update` needs
    `extra_grads`.

  Raises:
    ValueError: for an argument outside its range; at `update` for another
      number of `extra_grads`.

  Examples:
    M is ((4, 0), (0, 4)) / 4 and the weights stay equal.

    >>> import jax.numpy as jnp, mtl_jax
    >>> task_grads = jnp.array([[1.0, 0.0], [0.0, 3.0]])
    >>> others = 2 * jnp.eye(2), 2 * jnp.eye(2)
    >>> tx = mtl_jax.modo(num_tasks=2)
    >>> print(tx.update(
    ...   task_grads, tx.init(jnp.zeros(2)), extra_grads=others)[0])
    [0.5 1.5]

  References:
    Chen et al., `Three-Way Trade-Off in Multi-Objective Learning: Optimization,
    Generalization and Conflict-Avoidance <https://arxiv.org/abs/2305.20057>`_,
    2023, Algorithm 1
  """
  arguments.check_positive('gamma', gamma)
  arguments.check_not_negative('rho', rho)
  arguments.one_of('batches', batches, ('three', 'two'))
  arguments.one_of('scale', scale, ('relative', 'paper'))

  def combine(given: lifting.Given) -> lifting.Combined:
    size = given.gram.shape[0]
    stacks = (given.task_grads, *given.extra_grads)
    first, second = stacks[-2:]
    inner = algebra.cross(first, second, (size, size), given.axes)
    if scale == 'relative':
      inner = _simplex_memory.relative(inner, given.active)
    w = _simplex_memory.share(given.memory, given.active)
    w = simplex.project_simplex(w - gamma * (inner @ w + rho * w), given.active)
    w = w.astype(given.memory.dtype)
    updates: Any = algebra.weighted_sum(w, given.task_grads)
    if batches == 'two':
      updates = jax.tree.map(
        lambda a, b: (a + b) / 2, updates, algebra.weighted_sum(w, second)
      )
    return lifting.Combined(
      updates=updates,
      weights=w,
      memory=_simplex_memory.keep(given.memory, w, given.active),
    )

  return lifting.lift(
    combine,
    memory=lambda size, params, dtype: _simplex_memory.start(size, dtype),
    num_tasks=num_tasks,
    axes=aggregation.Axes(axis_name, reduce, shard_axis),
    extra_batches=2 if batches == 'three' else 1,
    # With two batches the update also contains other gradients.
    weights='gradients' if batches == 'three' else 'tracked',
  )
