"""The contract of a method that needs losses and no task gradients."""

from collections.abc import Callable
from collections.abc import Mapping
import inspect
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtl_jax.transforms.contract import aggregation
from mtl_jax.transforms.contract import arguments


class LossWeighting(NamedTuple):
  """Weights of tasks from their losses: three pure functions.

  The weights are the coefficients of the task gradients, so that the gradient
  of `sum(weights * losses)` with constant weights is the method's update: one
  backward pass for any number of tasks. `weighted` turns a weighting into an
  aggregator.

  An absent task has weight 0, its part of the state stays, and it does not
  affect the weights of the others. Without any active task the whole state
  stays. A weighting cannot raise inside `jit`. If it takes the logarithm of a
  loss that is negative or not finite, the weights of that update are NaN, so
  that a wrapper can skip and count the update. A task whose loss is exactly 0
  is solved and counts as absent there. A non-finite loss leaves no trace in the
  state.

  Attributes:
    init: `num_tasks -> state`; its leaves are [T, ...] or scalars.
    update: `(losses [T], state, *, active=None) -> (weights [T], state)`.
      Weights are at least float32 and constants to differentiation. A method
      may take further keywords; those here ignore unknown ones.
    after_step: `(new_losses [T], state, *, active=None) -> state`, with the
      losses and active tasks for the same batch after the parameters have
      moved; None for a method that does not use them.
  """

  init: Callable[[int], Any]
  update: Callable[..., tuple[jax.Array, Any]]
  after_step: Callable[..., Any] | None = None

  def instead_of_aggregator(self) -> str:
    """The text of an error where an aggregator is expected."""
    return 'got a loss weighting; wrap it, as in weighted(mtl_jax.si())'


def present_losses(
  losses: Any, active: Any, state: Any = ()
) -> tuple[jax.Array, jax.Array]:
  """The losses and active tasks in the form that every method uses.

  Args:
    losses: [T].
    active: bool [T], or None for all.
    state: the method's state, for a check of the number of tasks.

  Returns:
    losses [T], constants, with 1 for absent tasks, and active bool [T].

  Raises:
    ValueError: for other shapes.
  """
  losses = aggregation.as_vector('losses', losses)
  if losses.ndim != 1:
    raise ValueError(f'losses must have shape [tasks], got {losses.shape}')
  size = losses.shape[0]
  for leaf in jax.tree.leaves(state):
    if arguments.is_raw_key(leaf):
      continue
    if leaf.shape and leaf.shape[0] != size:
      raise ValueError(
        f'losses must have shape ({leaf.shape[0]},), one for each task in the '
        f'state, got {losses.shape}'
      )
  active = aggregation.full_active(active, size)
  losses = jax.lax.stop_gradient(losses.astype(jnp.result_type(float)))
  # 1 has a logarithm and a reciprocal.
  return jnp.where(active, losses, 1), active


def unless_nobody(active: jax.Array, new: Any, old: Any) -> Any:
  """The new state, or the old one if no task is active."""
  anyone = jnp.any(active)
  return jax.tree.map(lambda x, y: jnp.where(anyone, x, y), new, old)


def call_update(
  weighting: LossWeighting,
  losses: jax.Array,
  state: Any,
  active: Any,
  extra_args: Mapping[str, Any],
) -> tuple[jax.Array, Any]:
  """`weighting.update` with only the extra arguments that it takes."""
  parameters = inspect.signature(weighting.update).parameters
  swallows = any(p.kind == p.VAR_KEYWORD for p in parameters.values())
  taken = {
    name: value
    for name, value in extra_args.items()
    if swallows or name in parameters
  }
  return weighting.update(losses, state, active=active, **taken)


def loss_weighting(
  init: Callable[[int], Any],
  update: Callable[..., tuple[jax.Array, Any]],
  after_step: Callable[..., Any] | None = None,
) -> LossWeighting:
  """A weighting from functions that need not check anything.

  Args:
    init: `num_tasks -> state`.
    update: `(losses, state, active) -> (weights, state)` with the losses and
      `active` of `present_losses`; the weights of absent tasks are dropped.
    after_step: `(new_losses, state, active) -> state`.

  Returns:
    The same with the contract's signatures and checks.
  """

  def checked_init(num_tasks):
    arguments.check_num_tasks(num_tasks)
    return init(num_tasks)

  def checked_update(losses, state, *, active=None, **unused):
    del unused
    losses, active = present_losses(losses, active, state)
    weights, new_state = update(losses, state, active)
    weights = jnp.where(active, weights, 0)
    return weights, unless_nobody(active, new_state, state)

  def checked_after_step(new_losses, state, *, active=None):
    new_losses, active = present_losses(new_losses, active, state)
    new_state = after_step(new_losses, state, active)
    return unless_nobody(active, new_state, state)

  return LossWeighting(
    checked_init,
    checked_update,
    None if after_step is None else checked_after_step,
  )


def stateless(
  update: Callable[..., jax.Array], *per_task: tuple[str, Any]
) -> LossWeighting:
  """A weighting without state.

  Args:
    update: `(losses, active) -> weights`.
    *per_task: `(argument, value)` pairs of arguments whose lengths are compared
      with the number of tasks.

  Returns:
    The weighting.
  """

  def init(num_tasks):
    for argument, values in per_task:
      arguments.check_length(argument, values, num_tasks)
    return ()

  def checked(losses, state, active):
    init(losses.shape[0])
    return update(losses, active), state

  return loss_weighting(init, checked)


def positive(losses: jax.Array) -> jax.Array:
  """The losses, NaN where they are not positive and finite."""
  return jnp.where((losses > 0) & jnp.isfinite(losses), losses, jnp.nan)


def unsolved(
  losses: jax.Array, active: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Separates the losses of solved tasks from those with a logarithm.

  A loss of exactly 0 belongs to a solved task. It has no logarithm, and any
  number in its place would determine the weights of the other tasks: with the
  usual 1e-8 they would be almost zero, and training would stop. A solved task
  therefore counts as absent in that update; its gradient is zero anyway.

  Args:
    losses: [T], above their lower bounds.
    active: bool [T].

  Returns:
    losses [T], 1 for solved or absent tasks; and bool [T], true for the others.
  """
  # A number without a finite reciprocal counts as 0.
  solved = (losses >= 0) & (losses < jnp.finfo(losses.dtype).tiny)
  left = active & ~solved
  return jnp.where(left, losses, 1), left


def number(active: jax.Array) -> jax.Array:
  """The number of active tasks, at least 1."""
  return jnp.maximum(jnp.sum(active), 1).astype(jnp.result_type(float))


def softmax(x: jax.Array, active: jax.Array) -> jax.Array:
  """Softmax over the active tasks; zeros if there is none."""
  largest = jnp.max(jnp.where(active, x, -jnp.inf))
  # Without tasks there is no largest entry; the shift has no derivative.
  largest = jax.lax.stop_gradient(jnp.where(jnp.any(active), largest, 0))
  powers = jnp.where(active, jnp.exp(jnp.where(active, x - largest, 0)), 0)
  total = jnp.sum(powers)
  return powers / jnp.where(total > 0, total, 1)
