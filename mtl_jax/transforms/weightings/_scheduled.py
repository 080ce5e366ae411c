"""Weightings that change with the number of updates."""

from collections.abc import Callable
from collections.abc import Sequence
import math
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtl_jax.transforms.contract import arguments
from mtl_jax.transforms.contract import loss_weighting


class ScheduledWeightsState(NamedTuple):
  """State of `scheduled_weights`.

  Attributes:
    count: scalar, number of updates so far.
  """

  count: jax.Array  # type: ignore[assignment]


class FirstThenState(NamedTuple):
  """State of `first_then`.

  Attributes:
    count: scalar, number of updates so far.
    first: state of the first weighting.
    then: state of the second.
  """

  count: jax.Array  # type: ignore[assignment]
  first: Any
  then: Any


def _zero() -> jax.Array:
  return jnp.zeros((), jnp.int32)


def scheduled_weights(
  schedules: Callable[[Any], Any] | Sequence[Callable[[Any], Any] | float],
) -> loss_weighting.LossWeighting:
  r"""A weighted sum of the losses whose weights are schedules.

  .. math:: \min \sum_i w_i(t)\, L_i

  Scale: as the schedules give; the weights of the others stay when a task is
  absent.

  Args:
    schedules: a function from the count of updates to weights [T], or for each
      task one optax schedule (or constant, finite and non-negative).

  Returns:
    A `LossWeighting` with a `ScheduledWeightsState`.

  Raises:
    ValueError: for an empty sequence or a constant that is negative or not
      finite; at `init` and `update` for another number of tasks.

  Examples:
    >>> import jax.numpy as jnp, mtl_jax, optax
    >>> weighting = mtl_jax.scheduled_weights(
    ...   (1.0, optax.linear_schedule(0.0, 1.0, transition_steps=2)))
    >>> losses, state = jnp.array([1.0, 2.0]), weighting.init(2)
    >>> for _ in range(3):
    ...   weights, state = weighting.update(losses, state)
    ...   print(weights)
    [1. 0.]
    [1.  0.5]
    [1. 1.]
  """
  if not callable(schedules):
    if not isinstance(schedules, Sequence):
      raise ValueError(
        f'schedules must be a function or one a task, got {schedules!r}'
      )
    schedules = tuple(schedules)
    constants = [s for s in schedules if not callable(s)]
    if not schedules or not all(
      0 <= s < math.inf for s in arguments.known(tuple(constants))
    ):
      raise ValueError(
        'schedules must be functions of the count or finite, non-negative '
        f'numbers, one a task, got {schedules}'
      )

  def weights_at(count, num_tasks):
    if callable(schedules):
      weights = jnp.asarray(schedules(count))
    else:
      weights = jnp.stack(
        [jnp.asarray(s(count) if callable(s) else s) for s in schedules]
      )
    if weights.shape != (num_tasks,):
      raise ValueError(
        f'schedules must give weights ({num_tasks},), got shape {weights.shape}'
      )
    return weights.astype(jnp.result_type(float))

  def init(num_tasks):
    jax.eval_shape(lambda count: weights_at(count, num_tasks), _zero())
    return ScheduledWeightsState(_zero())

  def update(losses, state, active):
    del active
    weights = weights_at(state.count, losses.shape[0])
    return weights, ScheduledWeightsState(optax.safe_increment(state.count))

  return loss_weighting.loss_weighting(init, update)


def first_then(
  first: loss_weighting.LossWeighting,
  steps: int,
  then: loss_weighting.LossWeighting,
) -> loss_weighting.LossWeighting:
  """One weighting for the first updates, another one from then on.

  The inactive weighting gets no losses, and its state stays. An update without
  an active task does not count.

  Args:
    first: the weighting of the first updates.
    steps: number of those updates.
    then: the weighting of all later updates; begins with its initial state.

  Returns:
    A `LossWeighting` with a `FirstThenState`; with an `after_step` if one of
    the two has it.

  Raises:
    ValueError: for a negative or fractional number of steps.

  Examples:
    >>> import jax.numpy as jnp, mtl_jax
    >>> weighting = mtl_jax.first_then(
    ...   mtl_jax.equal_weights(), 1, mtl_jax.si())
    >>> losses, state = jnp.array([1.0, 2.0]), weighting.init(2)
    >>> for _ in range(2):
    ...   weights, state = weighting.update(losses, state)
    ...   print(weights)
    [0.5 0.5]
    [1.  0.5]
  """
  arguments.check_count('steps', steps, least=0)
  for name, weighting in (('first', first), ('then', then)):
    if not isinstance(weighting, loss_weighting.LossWeighting):
      raise TypeError(f'{name} must be a LossWeighting, got {weighting!r}')

  def init(num_tasks):
    return FirstThenState(_zero(), first.init(num_tasks), then.init(num_tasks))

  def update(losses, state, *, active=None, **extra_args):
    early = state.count < steps
    # Both are tens of numbers: a select costs less than a branch.
    choose = lambda a, b: jax.tree.map(
      lambda x, y: jnp.where(early, x, y), a, b
    )
    call = lambda weighting, old: loss_weighting.call_update(
      weighting, losses, old, active, extra_args
    )
    early_weights, early_state = call(first, state.first)
    late_weights, late_state = call(then, state.then)
    moved = FirstThenState(
      optax.safe_increment(state.count),
      choose(early_state, state.first),
      choose(state.then, late_state),
    )
    _, present = loss_weighting.present_losses(losses, active)
    weights = choose(early_weights, late_weights)
    return weights, loss_weighting.unless_nobody(present, moved, state)

  def after_step(new_losses, state, *, active=None):
    # The update before this step is already counted.
    early = state.count <= steps

    def moved(weighting, old, turn):
      if weighting.after_step is None:
        return old
      new = weighting.after_step(new_losses, old, active=active)
      return jax.tree.map(lambda x, y: jnp.where(turn, x, y), new, old)

    return FirstThenState(
      state.count,
      moved(first, state.first, early),
      moved(then, state.then, ~early),
    )

  looks = first.after_step is not None or then.after_step is not None
  return loss_weighting.LossWeighting(
    init, update, after_step if looks else None
  )
