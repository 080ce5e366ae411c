"""Arrays on meshes with explicit axes.

On such a mesh, which `jax.make_mesh` makes, the type of an array holds its
sharding, and a reshape or a product over a sharded axis has to say how its
result is sharded. Rules are written for axes that the compiler manages. They
therefore run with explicit axes made automatic, and their results get the
shardings that follow from the arguments.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec


def spec(x: Any) -> PartitionSpec:
  """The sharding of an array according to its type."""
  return jax.typeof(x).sharding.spec


def row_spec(x: Any) -> PartitionSpec:
  """The sharding of a row in a stack [T, ...], or of the rows' sum."""
  return PartitionSpec(*spec(x)[1:])


def whole(x: Any) -> Any:
  """An array without explicit shards: small ones are indexed by task."""
  return with_automatic_axes(lambda x: x, PartitionSpec(), x)


def with_automatic_axes(fn: Callable[..., Any], specs: Any, *args: Any) -> Any:
  """`fn(*args)` with the explicit axes of its arguments made automatic.

  Args:
    fn: any function of arrays; it must not close over arrays with explicit
      axes.
    specs: for each result its `PartitionSpec`, as a tree or a prefix of one; or
      a function without arguments that makes it, called only where needed.
    *args: trees of arrays.

  Returns:
    `fn(*args)`; nothing else is done where no argument has explicit axes.
  """
  mesh = _explicit_mesh(args)
  if mesh is None:
    return fn(*args)
  with jax.sharding.use_abstract_mesh(mesh):
    return jax.sharding.auto_axes(
      fn,
      axes=mesh.explicit_axes,
      out_sharding=specs() if callable(specs) else specs,
    )(*args)


def _explicit_mesh(tree: Any) -> Any:
  """The abstract mesh of the first leaf with explicit axes; None without."""
  for leaf in jax.tree.leaves(tree):
    mesh = jax.typeof(leaf).sharding.mesh
    if mesh.explicit_axes:
      return mesh
  return None
