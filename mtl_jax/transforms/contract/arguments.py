"""Checks of factory arguments; each error names argument and value.

The value of a `jax.Array` is not checked: `optax.inject_hyperparams` or
`jax.vmap` may trace it, and its value is then unknown. Arguments that set
shapes or count steps must be known.
"""

from collections.abc import Callable
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


def is_known(value: Any) -> bool:
  """Whether its value is known while a program is traced."""
  return not isinstance(value, jax.Array)


def check_that(
  argument: str, value: Any, holds: Callable[[Any], bool], condition: str
) -> None:
  """Raises unless a known number fulfils a condition.

  Args:
    argument: its name.
    value: a number.
    holds: the condition.
    condition: the same in words, after "must be".
  """
  if is_known(value):
    if not holds(value):
      raise ValueError(f'{argument} must be {condition}, got {value}')
  elif value.shape:
    raise ValueError(f'{argument} must be one number, got shape {value.shape}')


def check_positive(argument: str, value: float) -> None:
  """Raises unless `value` is positive and finite."""
  check_that(argument, value, lambda x: 0 < x < math.inf, 'positive and finite')


def check_not_negative(argument: str, value: float) -> None:
  """Raises unless `value` is finite and not negative."""
  check_that(
    argument, value, lambda x: 0 <= x < math.inf, 'finite and not negative'
  )


def in_dtype(value: Any, dtype: Any) -> Any:
  """A number for arithmetic in `dtype`, which an array would widen."""
  return value if is_known(value) else value.astype(dtype)


def check_count(argument: str, value: int, least: int = 1) -> None:
  """Raises unless `value` is a known whole number of at least `least`."""
  if not is_known(value):
    raise ValueError(
      f'{argument} must be a Python integer, got {value}: it cannot be an '
      'array or traced. Name it in static_args of optax.inject_hyperparams'
    )
  if not isinstance(value, int | np.integer) or value < least:
    raise ValueError(
      f'{argument} must be a whole number of at least {least}, got {value}'
    )


def check_num_tasks(num_tasks: int | None) -> None:
  """Raises for fewer than one task; None is an unknown number."""
  if num_tasks is not None:
    check_count('num_tasks', num_tasks)


def is_raw_key(value: Any) -> bool:
  """Whether it is a raw key from `jax.random.PRNGKey`, a plain array."""
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
  """A finite number for all tasks, or a tuple with one for each."""
  items = _items(argument, values, 'a number or [tasks]')
  if not isinstance(items, tuple):
    items = float(items) if is_known(items) else items
  elif not items:
    raise ValueError(f'{argument} must be a number or [tasks], got {values!r}')
  if not all(math.isfinite(v) for v in known(items)):
    raise ValueError(f'{argument} must be finite, got {values!r}')
  return items


def as_weights(argument: str, values: Sequence[float]) -> tuple[float, ...]:
  """A tuple of non-negative numbers that are not all zero."""
  weights = _items(argument, values, '[tasks]')
  if not isinstance(weights, tuple):
    raise ValueError(f'{argument} must be [tasks], got {values!r}')
  if not all(math.isfinite(w) and w >= 0 for w in known(weights)) or not any(
    not is_known(w) or w for w in weights
  ):
    raise ValueError(
      f'{argument} must be finite, non-negative and not all 0, got {weights}'
    )
  return weights


def known(values: Any) -> list[Any]:
  """The known values in a number or a tuple of numbers."""
  items = values if isinstance(values, tuple) else (values,)
  return [x for x in items if is_known(x)]


def _items(argument: str, values: Any, expected: str) -> Any:
  """The given number, or a tuple of scalars; known ones are floats."""
  shapes = {np.shape(v) for v in values} if _is_listed(values) else {()}
  if shapes - {()} or np.ndim(0 if _is_listed(values) else values) > 1:
    raise ValueError(f'{argument} must be {expected}, got {values!r}')
  if not _is_listed(values) and not np.ndim(values):
    return values
  return tuple(float(v) if is_known(v) else v for v in values)


def _is_listed(values: Any) -> bool:
  return isinstance(values, list | tuple)


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
    values: a tuple with one value a task; anything else is for all.
    num_tasks: T; None if unknown, which skips the check.
  """
  if isinstance(values, tuple) and num_tasks not in (None, len(values)):
    raise ValueError(
      f'{argument} must have one value for each of the {num_tasks} tasks, got '
      f'{values}'
    )
