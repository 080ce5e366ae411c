"""Task weights recomputed every k updates."""

from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtl_jax.transforms.contract import aggregation
from mtl_jax.transforms.contract import algebra
from mtl_jax.transforms.contract import arguments


class EveryState(NamedTuple):
  """State of `every`.

  Attributes:
    inner: the aggregator's state after its last own update.
    task_weights: [T], weights of the last update; zero for absent tasks.
    active: bool [T], the tasks for which the weights were computed.
    count: number of updates so far, int32.
  """

  inner: Any
  task_weights: jax.Array
  active: jax.Array
  count: jax.Array  # type: ignore[assignment]

  def diagnostics(self) -> dict[str, jax.Array]:
    """The aggregator's diagnostics from when its weights were computed."""
    return {**self.inner.diagnostics(), 'task_weights': self.task_weights}


def every(
  k: int,
  aggregator: optax.GradientTransformation,
  *,
  num_tasks: int | None = None,
) -> aggregation.Aggregator:
  r"""Computes an aggregator's weights every k updates and keeps them between.

  .. math:: d_t = \sum_i w_i(G_{k \lfloor t / k \rfloor})\, g_i

  In between, no Gram matrix is made and nothing is solved. Weights are
  recomputed immediately when the set of active tasks changes. Scale and degree
  of homogeneity over k updates: those of the aggregator.

  Args:
    k: at least 1.
    aggregator: any whose update is a weighted sum of the task gradients.
    num_tasks: T; needed at `init` unless the aggregator was made with it or a
      wrapper supplies it.

  Returns:
    An aggregator with an `EveryState`. Its memory, random draws and diagnostics
    change only when its weights are computed.

  Raises:
    ValueError: for a k below 1, and for an aggregator without weights or with
      weights for other gradients.

  Examples:
    >>> import jax.numpy as jnp, mtl_jax
    >>> tx = mtl_jax.every(2, mtl_jax.mgda(), num_tasks=2)
    >>> state = tx.init(jnp.zeros(2))
    >>> for rows in ([[1.0, 0.0], [0.0, 2.0]], [[1.0, 0.0], [0.0, 1.0]]):
    ...   updates, state = tx.update(jnp.array(rows), state)
    ...   print(updates)
    [0.8 0.4]
    [0.8 0.2]

  References:
    Navon et al., `Multi-Task Learning as a Bargaining Game
    <https://arxiv.org/abs/2202.01017>`_, 2022 (`update_weights_every` in the
    authors' code)
  """
  arguments.check_count('k', k)
  inner = aggregation.as_inner('every', aggregator)
  aggregation.check_weights('every', inner)
  if num_tasks is not None:
    inner = inner.for_tasks(num_tasks)

  def init(params):
    state = inner.init(params)
    weights = initial_weights('every', state)
    return EveryState(
      inner=state,
      task_weights=weights,
      active=jnp.zeros(weights.shape, bool),
      count=jnp.zeros((), jnp.int32),
    )

  def aggregate(task_grads, state, params=None, *, active=None, **extra_args):
    size = aggregation.check_task_axis(
      task_grads, params, state.task_weights.shape[0]
    )
    present = aggregation.full_active(active, size)
    anew = lambda inner_state: inner.aggregate(
      task_grads, inner_state, params, active=active, **extra_args
    )[1]
    state = advance(anew, state, present)
    if active is not None:
      task_grads = algebra.keep_active(present, task_grads)
    return algebra.weighted_sum(state.task_weights, task_grads), state

  def weigh(gram, state, *, active=None, **extra_args):
    anew = lambda inner_state: inner.weigh(
      gram, inner_state, active=active, **extra_args
    )
    present = aggregation.full_active(active, gram.shape[0])
    return advance(anew, state, present)

  def advance(anew, state, present):
    """The state after an update; its inner state is recomputed if it is due."""
    due = (state.count % k == 0) | jnp.any(present != state.active)
    inner_state = jax.lax.cond(due, anew, lambda s: s, state.inner)
    return EveryState(
      inner=inner_state,
      task_weights=jnp.where(present, inner_state.task_weights, 0),
      active=present,
      count=optax.safe_increment(state.count),
    )

  def after_step(new_losses, state, *, active=None):
    moved = inner.after_step(new_losses, state.inner, active=active)
    return state._replace(inner=moved)

  return aggregation.Aggregator(
    init,
    aggregate,
    axes=inner.axes,
    head_scale=inner.head_scale,
    extra_batches=inner.extra_batches,
    weights='gradients',
    for_tasks=lambda size: every(k, inner.for_tasks(size)),
    weigh=weigh if inner.weigh else None,
    after_step=after_step if inner.after_step else None,
  )


def initial_weights(name: str, state: Any) -> jax.Array:
  """A buffer for the weights [T] that a state shows; raises without any."""
  weights = getattr(state, 'task_weights', None)
  if weights is None:
    raise ValueError(f'{name} needs to know the tasks; give it num_tasks')
  return jnp.zeros_like(weights)
