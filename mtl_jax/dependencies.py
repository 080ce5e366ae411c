"""Which arguments a function has a derivative in, as tracing alone tells.

A function that takes parameters by more than one way can lose a gradient in
silence. Nothing is computed to find out.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
from jax.custom_derivatives import SymbolicZero
import jax.numpy as jnp


def check_independent(
  rule: str, fn: Callable[[Any], Any], tree: Any, paths: Any
) -> None:
  """Raises, with the rule, if `fn` has a derivative in a leaf of `tree`."""
  # One trace where all is well.
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
  """Whether `fn` has a derivative in `x`, as tracing alone tells."""
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
