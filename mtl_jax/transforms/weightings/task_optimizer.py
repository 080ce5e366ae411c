"""An optimizer for one learned number a task."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mtl_jax.transforms.contract import algebra
from mtl_jax.transforms.contract import arguments


def make(
  learning_rate: optax.ScalarOrSchedule,
  optimizer: Callable[..., optax.GradientTransformation],
) -> optax.GradientTransformation:
  """`optimizer(learning_rate)`; raises for a rate that is not positive."""
  if not callable(learning_rate):
    arguments.check_positive('learning_rate', learning_rate)
  if not callable(optimizer):
    raise ValueError(
      'optimizer must be a function of the learning rate, such as optax.adam, '
      f'got {optimizer!r}'
    )
  return optimizer(learning_rate)


def init(tx: optax.GradientTransformation, parameters: jax.Array) -> Any:
  """The optimizer states of all tasks, with leaves [T, ...].

  Each task has a separate state. An absent task therefore keeps everything,
  even the step count that corrects Adam's moments.
  """
  return jax.vmap(tx.init)(parameters)


def step(
  tx: optax.GradientTransformation,
  gradients: jax.Array,
  state: Any,
  parameters: jax.Array,
  moving: jax.Array,
) -> tuple[jax.Array, Any]:
  """One step for the tasks that move; the others keep number and state.

  Args:
    tx: the optimizer.
    gradients: [T].
    state: from `init`.
    parameters: [T].
    moving: bool [T]. A non-finite gradient also moves nothing: it would stay in
      the state for ever.

  Returns:
    parameters [T] and state.
  """
  moving = moving & jnp.isfinite(gradients)
  gradients = jnp.where(moving, gradients, 0)
  updates, new_state = jax.vmap(tx.update)(gradients, state, parameters)
  new_parameters = optax.apply_updates(parameters, updates)
  keep = lambda new, old: jnp.where(algebra.row(moving, new), new, old)
  return jax.tree.map(keep, (new_parameters, new_state), (parameters, state))
