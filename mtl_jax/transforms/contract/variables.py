"""Trees whose leaves a model library has wrapped.

`flax.nnx` keeps every array of an optimizer's state, and of the parameters that
it is made for, in a variable of its own, and calls `update` without them.
"""

from typing import Any

import jax


def _is_variable(node: Any) -> bool:
  # By what it does: the libraries themselves are not needed here.
  return callable(getattr(type(node), 'get_value', None))


def unwrapped(tree: Any) -> Any:
  """The tree with the values of variables in their place."""
  return jax.tree.map(
    lambda x: x.get_value() if _is_variable(x) else x,
    tree,
    is_leaf=_is_variable,
  )
