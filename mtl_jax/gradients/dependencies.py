"""Dependencies of a function on its arguments, found by tracing alone.

A function that takes parameters in more than one way can silently lose a
gradient. The check computes nothing.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Var
import jax.numpy as jnp


def check_independent(
  rule: str, fn: Callable[[Any], Any], tree: Any, paths: Any
) -> None:
  """Raises, with the rule, if `fn` has a derivative in a leaf of `tree`."""
  # A single trace if all is well.
  if not _depends(fn, tree):
    return
  leaves, structure = jax.tree.flatten(tree)

  def of_leaf(i, leaf):
    return fn(
      jax.tree.unflatten(structure, [*leaves[:i], leaf, *leaves[i + 1 :]])
    )

  used = [
    path
    for i, path in enumerate(jax.tree.leaves(paths))
    if _depends(functools.partial(of_leaf, i), leaves[i])
  ]
  raise ValueError(f'{rule}, but it depends on {used}')


def _depends(fn: Callable[[Any], Any], x: Any) -> bool:
  """Whether `fn` has a derivative in `x`, found by tracing alone."""
  found = []

  @jax.custom_jvp
  def look(out):
    return out

  def rule(primals, tangents):
    is_zero = lambda t: isinstance(t, SymbolicZero)
    leaves = jax.tree.leaves(tangents, is_leaf=is_zero)
    found.append(not all(is_zero(t) for t in leaves))
    return primals[0], jax.tree.map(jnp.zeros_like, primals[0])

  look.defjvp(rule, symbolic_zeros=True)
  jax.eval_shape(lambda x: jax.vjp(lambda x: look(fn(x)), x)[0], x)
  return any(found)


def needed(fn: Callable[..., Any], *args: Any) -> Any:
  """Finds the leaves of the result that depend on the arguments.

  Args:
    fn: a function of arrays.
    *args: its arguments; shapes and dtypes will do.

  Returns:
    A tree of bools, laid out like the result. A loop or call counts as one
    operation, all of whose results need all of its arguments.
  """
  closed, shapes = jax.make_jaxpr(fn, return_shape=True)(*args)
  reached = set(closed.jaxpr.invars)
  is_reached = lambda x: isinstance(x, Var) and x in reached
  for equation in closed.jaxpr.eqns:
    if any(map(is_reached, equation.invars)):
      reached.update(equation.outvars)
  flags = map(is_reached, closed.jaxpr.outvars)
  return jax.tree.unflatten(jax.tree.structure(shapes), list(flags))
