"""Losses in the order of the tasks, whatever they come in."""

from collections.abc import Callable
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

# `(params, *args) -> (losses, aux)`, losses {task: scalar} or [T].
LossFn = Callable[..., tuple[Any, Any]]


def as_scalars(losses: Any, names: tuple[str, ...]) -> tuple[jax.Array, ...]:
  """The losses from a loss function, in the order of the tasks."""
  return tuple(in_order(losses, names))


def in_order(losses: Any, names: tuple[str, ...]) -> Any:
  """The losses from a loss function as T scalars of one dtype, or as array [T].

  Args:
    losses: a mapping {task: scalar} in any order, a list of scalars, or [T].
    names: the tasks.

  Raises:
    ValueError: for other tasks, and for losses that are not scalars.
  """
  if isinstance(losses, Mapping):
    if set(losses) != set(names):
      raise ValueError(
        f'loss_fn must return a loss for each of {names}, got {tuple(losses)}'
      )
    scalars = [jnp.asarray(losses[task]) for task in names]
  elif isinstance(losses, list) and len(losses) == len(names):
    scalars = list(map(jnp.asarray, losses))
  else:
    losses = jnp.asarray(losses)
    if losses.shape != (len(names),):
      raise ValueError(
        f'loss_fn must return losses of shape ({len(names)},) or a dictionary '
        f'of scalars, got shape {losses.shape}'
      )
    return losses
  for task, loss in zip(names, scalars, strict=True):
    if loss.shape:
      raise ValueError(
        f'the loss of task {task!r} must be a scalar, got shape {loss.shape}'
      )
  dtype = jnp.result_type(*scalars)
  return [loss.astype(dtype) for loss in scalars]


def ordered(found, names):
  """The result of a loss function, with its losses `in_order`."""
  losses, aux = found
  return in_order(losses, names), aux
