"""Checks of the arguments that a config gives to a factory by name."""

from collections.abc import Callable
from collections.abc import Collection
from collections.abc import Mapping
from collections.abc import Sequence
import inspect
import numbers
import types
import typing
from typing import Any

_KINDS: Mapping[Any, tuple[type, str, str]] = {
  bool: (bool, 'a bool', 'bools'),
  int: (numbers.Integral, 'an integer', 'integers'),
  float: (numbers.Real, 'a number', 'numbers'),
  str: (str, 'a string', 'strings'),
}


def check_arguments(
  where: str,
  name: str,
  factory: Callable[..., Any],
  arguments: Mapping[str, Any],
  *,
  hidden: Collection[str] = (),
) -> None:
  """Checks arguments against the signature of a factory.

  Args:
    where: the config group that holds them, such as `'model.kwargs'`.
    name: the factory's name in the config.
    factory: a function or class, all of whose arguments have a type.
    arguments: the arguments, by name.
    hidden: arguments that a config does not set.

  Raises:
    ValueError: if one is unknown, missing or of another type; the message names
      it.
  """
  parameters = {
    key: parameter
    for key, parameter in inspect.signature(factory).parameters.items()
    if key not in hidden
  }
  hints = typing.get_type_hints(factory)
  for key, value in arguments.items():
    if key not in parameters:
      raise ValueError(
        f'{where}.{key} is no argument of {name!r}, which takes '
        f'{sorted(parameters)}; --config.{where}="{{...}}" replaces all of '
        f'{where}'
      )
    if not _fits(value, hints[key]):
      raise ValueError(
        f'{where}.{key} of {name!r} must be {_words(hints[key])}, got {value!r}'
      )
  for key, parameter in parameters.items():
    if parameter.default is parameter.empty and key not in arguments:
      raise ValueError(f'{where} of {name!r} must hold {key!r}')


def _fits(value, hint):
  kinds = _members(hint)
  if len(kinds) > 1:
    return any(_fits(value, kind) for kind in kinds)
  if hint in _KINDS:
    # A bool is an integer to Python.
    return isinstance(value, _KINDS[hint][0]) and (
      hint is bool or not isinstance(value, bool)
    )
  if _is_sequence(hint):
    # A tuple becomes a list in a file.
    return isinstance(value, list | tuple) and all(
      _fits(x, typing.get_args(hint)[0]) for x in value
    )
  if typing.get_origin(hint) is Callable:
    return callable(value)
  return not isinstance(hint, type) or isinstance(value, hint)


def _words(hint):
  """The values that a config can hold for a type, in words."""
  words = []
  for kind in _members(hint):
    if kind in _KINDS:
      words.append(_KINDS[kind][1])
    elif _is_sequence(kind):
      words.append(f'a tuple of {_KINDS[typing.get_args(kind)[0]][2]}')
    elif kind is type(None):
      words.append('None')
  return ' or '.join(words) or getattr(hint, '__name__', str(hint))


def _members(hint):
  if typing.get_origin(hint) in (typing.Union, types.UnionType):
    return typing.get_args(hint)
  return (hint,)


def _is_sequence(hint):
  return typing.get_origin(hint) in (Sequence, tuple)


def plain_default(hint: Any, default: Any) -> tuple[type, Any] | None:
  """The form in which a config holds an argument with this default.

  Args:
    hint: the argument's type.
    default: its default.

  Returns:
    The type of the config's field and the value; None for an argument other
    than a number, a string, a bool or a tuple of these, such as an optimizer.
  """
  kinds = _members(hint)
  plain = [kind for kind in kinds if kind in _KINDS]
  several = any(map(_is_sequence, kinds))
  simple = bool | int | float | str | tuple
  if default is not None and not isinstance(default, simple):
    return None
  if plain and several:
    # A value for all tasks, or a tuple with one for each.
    return object, default
  if several:
    return tuple, default
  if not plain:
    return None
  return plain[0], default
