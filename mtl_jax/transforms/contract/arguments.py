"""Checks of what factories are given; each error names argument and value."""

from collections.abc import Sequence
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def one_of(argument: str, value: Any, choices: Sequence[str]) -> None:
  """Raises unless `value` is one of `choices`."""
  if value not in choices:
    raise ValueError(f'{argument} must be one of {choices}, got {value!r}')


def check_positive(argument: str, value: float) -> None:
  """Raises unless `value` is positive and finite."""
  if not 0 < value < math.inf:
    raise ValueError(f'{argument} must be positive and finite, got {value}')


def check_not_negative(argument: str, value: float) -> None:
  """Raises unless `value` is finite and not negative."""
  if not 0 <= value < math.inf:
    raise ValueError(f'{argument} must be finite and not negative, got {value}')


def check_count(argument: str, value: int, least: int = 1) -> None:
  """Raises unless `value` is a whole number of at least `least`."""
  if not isinstance(value, int | np.integer) or value < least:
    raise ValueError(
      f'{argument} must be a whole number of at least {least}, got {value}'
    )


def check_num_tasks(num_tasks: int | None) -> None:
  """Raises for fewer than one task; None is an unknown number."""
  if num_tasks is not None:
    check_count('num_tasks', num_tasks)


def is_raw_key(value: Any) -> bool:
  """Whether it is a key as `jax.random.PRNGKey` makes it: a plain array."""
  if not isinstance(value, jax.Array | np.ndarray) or value.dtype != np.uint32:
    return False
  # Its shape depends on the implementation that is set in jax.config.
  return value.shape == jax.eval_shape(jax.random.PRNGKey, 0).shape


def check_seed(seed: int | jax.Array) -> None:
  """Raises unless `seed` is an integer, a typed key or a raw key."""
  if isinstance(seed, int | np.integer) or is_raw_key(seed):
    return
  if isinstance(seed, jax.Array | np.ndarray) and not seed.shape:
    if jnp.issubdtype(seed.dtype, jax.dtypes.prng_key):
      return
    if jnp.issubdtype(seed.dtype, jnp.integer):
      return
  raise TypeError(
    'seed must be an int, a typed key (jax.random.key) or a raw key '
    f'(jax.random.PRNGKey), got {seed!r}'
  )


def as_numbers(
  argument: str, values: float | Sequence[float]
) -> float | tuple[float, ...]:
  """A finite number for all tasks, or a tuple of one each."""
  if np.ndim(values) > 1 or np.size(values) == 0:
    raise ValueError(f'{argument} must be a number or [tasks], got {values!r}')
  numbers = tuple(float(v) for v in np.ravel(values))
  if not all(math.isfinite(v) for v in numbers):
    raise ValueError(f'{argument} must be finite, got {values!r}')
  return numbers if np.ndim(values) else numbers[0]


def as_weights(argument: str, values: Sequence[float]) -> tuple[float, ...]:
  """A tuple of non-negative numbers that are not all zero."""
  if np.ndim(values) != 1:
    raise ValueError(f'{argument} must be [tasks], got {values!r}')
  weights = tuple(float(v) for v in values)
  if not all(math.isfinite(w) and w >= 0 for w in weights) or not any(weights):
    raise ValueError(
      f'{argument} must be finite, non-negative and not all 0, got {weights}'
    )
  return weights


def as_preference(
  preference: Sequence[float] | None, num_tasks: int | None = None
) -> tuple[float, ...] | None:
  """A preference vector [T] as a tuple; None stays None."""
  if preference is None:
    return None
  preference = as_weights('preference', preference)
  check_length('preference', preference, num_tasks)
  return preference


def check_length(argument: str, values: Any, num_tasks: int | None) -> None:
  """Raises unless there is one value a task, or one for all.

  Args:
    argument: its name.
    values: a tuple of one a task; anything else is for all.
    num_tasks: T; None if unknown, which nothing is compared with.
  """
  if isinstance(values, tuple) and num_tasks not in (None, len(values)):
    raise ValueError(
      f'{argument} must be as many as tasks, got {values} for {num_tasks} tasks'
    )
