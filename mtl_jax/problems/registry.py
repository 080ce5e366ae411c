"""Problems by name."""

from collections.abc import Callable
from collections.abc import Mapping
import difflib
import functools

from mtl_jax import types
from mtl_jax.problems import multi_digits
from mtl_jax.problems import multi_mnist

_PROBLEMS: Mapping[str, Callable[[], types.Problem]] = {
  'multi_digits': multi_digits.multi_digits,
  **{
    name: functools.partial(multi_mnist.multi_mnist, name)
    for name in multi_mnist.NAMES
  },
}


def by_name(name: str) -> types.Problem:
  """The problem with a name.

  Args:
    name: `'multi_digits'`, `'multi_mnist'`, `'multi_fashion'` or
      `'multi_fashion_and_mnist'`.

  Returns:
    A `types.Problem`.

  Raises:
    ValueError: if there is none; the message lists the nearest names.
  """
  if name not in _PROBLEMS:
    near = difflib.get_close_matches(name, _PROBLEMS)
    hint = f'; did you mean {" or ".join(map(repr, near))}?' if near else ''
    raise ValueError(
      f'unknown problem {name!r}, expected one of {sorted(_PROBLEMS)}{hint}'
    )
  return _PROBLEMS[name]()
