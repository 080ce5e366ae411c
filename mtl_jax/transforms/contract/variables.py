"""Trees with leaves that a model library has wrapped.

`flax.nnx` keeps every array in an optimizer's state, and in the parameters at
its creation, in a separate variable. It calls `update` without variables.
"""

from typing import Any

import jax


def _is_variable(node: Any) -> bool:
  # Recognised by its method, without an import of the library.
  return callable(getattr(type(node), 'get_value', None))


def unwrapped(tree: Any) -> Any:
  """The tree with variables replaced by their values."""
  return jax.tree.map(
    lambda x: x.get_value() if _is_variable(x) else x,
    tree,
    is_leaf=_is_variable,
  )
