"""Correlation-reduced multi-objective gradient manipulation."""

from collections.abc import Callable
from collections.abc import Hashable
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtl_jax.transforms.aggregators import _mgda
from mtl_jax.transforms.aggregators import _tracked
from mtl_jax.transforms.contract import aggregation
from mtl_jax.transforms.contract import algebra
from mtl_jax.transforms.contract import arguments
from mtl_jax.transforms.contract import lifting


class CrMogmMemory(NamedTuple):
  """The memory of `cr_mogm`.

  Attributes:
    inner: state of the aggregator whose weights are averaged.
    weights: [T], their average.
    seen: bool [T], whether a task has had a weight yet.
    updates: number of updates.
  """

  inner: Any
  weights: jax.Array
  seen: jax.Array
  updates: jax.Array


def cr_mogm(
  aggregator: optax.GradientTransformation | None = None,
  decay: float | Callable[[jax.Array], Any] = 0.9,
  *,
  num_tasks: int | None = None,
  axis_name: Hashable | None = None,
  reduce: str = 'mean',
  shard_axis: Hashable | None = None,
) -> aggregation.Aggregator:
  r"""Correlation-reduced gradient manipulation: averages a method's weights.

  With the weights :math:`\hat w` that an aggregator finds, the update is

  .. math:: w \leftarrow a\, w + (1 - a)\, \hat w, \qquad d = \sum_i w_i g_i

  This frees the weights from much of the noise in the batch to whose gradients
  they apply. The average starts with the first weights.

  Scale and degree of homogeneity: those of the aggregator, for weights whose
  degree is 0.

  Args:
    aggregator: any whose update is a weighted sum of the task gradients; `mgda`
      if None.
    decay: a, in [0, 1), or an optax schedule of the number of updates. The
      paper lets it grow towards 1 as the learning rate falls.
    num_tasks: T; needed at `init`, by hand or from a wrapper.
    axis_name: see `from_gram`; for the default aggregator. A given one has its
      own.
    reduce: see `axis_name`.
    shard_axis: see `axis_name`.

  Returns:
    An aggregator whose memory is a `CrMogmMemory`. The weights of absent tasks
    stay in memory. The old weights of the others are rescaled to the size of
    the new ones before they are averaged with them.

  Raises:
    ValueError: for a decay outside its range, axes together with an aggregator,
      and an aggregator without weights or with weights of other gradients.

  Examples:
    The least-norm weights are (0.6, 0.4), then (0.5, 0.5).

    >>> import jax.numpy as jnp, mtl_jax
    >>> tx = mtl_jax.cr_mogm(decay=0.5, num_tasks=2)
    >>> state = tx.init(jnp.zeros(3))
    >>> _, state = tx.update(
    ...   jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]), state)
    >>> _, state = tx.update(
    ...   jnp.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), state)
    >>> jnp.set_printoptions(precision=3)
    >>> print(state.task_weights)
    [0.55 0.45]

  References:
    Zhou et al., `On the Convergence of Stochastic Multi-Objective Gradient
    Manipulation and Beyond
    <https://proceedings.neurips.cc/paper_files/paper/2022/hash/f91bd64a3620aad8e70a27ad9cb3ca57-Abstract-Conference.html>`_,
    2022, Algorithm 2
  """
  if not callable(decay):
    arguments.check_that('decay', decay, lambda x: 0 <= x < 1, 'in [0, 1)')
  axes = aggregation.Axes(axis_name, reduce, shard_axis)
  if aggregator is None:
    aggregator = _mgda.mgda(
      axis_name=axis_name, reduce=reduce, shard_axis=shard_axis
    )
  elif axes.check() != aggregation.Axes():
    raise ValueError(
      'the aggregator has axes of its own; make it with axis_name='
      f'{axis_name!r}, reduce={reduce!r} and shard_axis={shard_axis!r}'
    )
  inner = aggregation.as_inner('cr_mogm', aggregator)
  aggregation.check_weights('cr_mogm', inner)

  def memory(size, params, dtype):
    return CrMogmMemory(
      inner=inner.for_tasks(size).init(params),
      weights=jnp.zeros(size, dtype),
      seen=jnp.zeros(size, bool),
      updates=jnp.zeros((), jnp.int32),
    )

  def combine(given: lifting.Given) -> lifting.Combined:
    old, active = given.memory, given.active
    state = old.inner
    # When a state is made the axes are not bound, and only the shapes of the
    # aggregator's state are needed.
    sized = inner.for_tasks(active.shape[0])
    if given.task_grads is None and sized.weigh is not None:
      state = sized.weigh(given.gram, state, losses=given.losses, active=active)
    elif given.axes == inner.axes:
      _, state = sized.aggregate(
        given.task_grads,
        state,
        losses=given.losses,
        active=active,
        extra_grads=given.extra_grads,
      )
    new = state.task_weights.astype(old.weights.dtype)
    a = decay(old.updates) if callable(decay) else decay
    weights, kept = _average(old, new, active, a)
    inner_products = given.gram @ weights
    return lifting.Combined(
      updates=algebra.weighted_sum(weights, given.unmasked, given.active),
      weights=weights,
      residual=getattr(state, 'residual', None),
      memory=CrMogmMemory(
        state,
        kept,
        old.seen | active,
        _tracked.count_of(old.updates, jnp.any(active)),
      ),
      update_inner=(inner_products, weights @ inner_products),
    )

  return lifting.lift(
    combine,
    memory=memory,
    num_tasks=num_tasks,
    axes=inner.axes,
    head_scale=inner.head_scale,
    extra_batches=inner.extra_batches,
    # The aggregator decides whether there is a residual.
    residual=None,
    gram_only=inner.weigh is not None,
  )


def _average(
  old: CrMogmMemory, new: jax.Array, active: jax.Array, decay: Any
) -> tuple[jax.Array, jax.Array]:
  """The averaged weights [T] of the active tasks, and those to remember [T]."""
  new = jnp.where(active, new, 0)
  past = jnp.where(active & old.seen, old.weights, new)
  # Weights for some of the tasks differ in size from weights for all of them.
  # Nothing has to be done only if the same tasks are back.
  size, had = jnp.sum(jnp.abs(new)), jnp.sum(jnp.abs(past))
  whole = jnp.all(active & old.seen) | ~(had > 0) | ~(size > 0)
  grown = jnp.where(whole, 1, size / jnp.where(whole, 1, had))
  weights = decay * grown * past + (1 - decay) * new
  weights = jnp.where(had > 0, weights, new).astype(old.weights.dtype)
  # If other tasks are only absent, the active ones keep their share.
  away = jnp.any(old.seen & ~active)
  kept = jnp.where(away, weights / grown, weights)
  return weights, jnp.where(active, kept, old.weights).astype(old.weights.dtype)
