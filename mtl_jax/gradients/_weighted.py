"""The gradient of a weighted loss: one backward pass for any number of tasks.

Loss weightings need nothing else. The weights may depend on the losses from the
same forward pass; they are constants in the differentiation.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax import types
from mtl_jax.gradients import _order
from mtl_jax.gradients import _programs
from mtl_jax.gradients import slices


def weighted(
  loss_fn: _order.LossFn,
  names: tuple[str, ...],
  weigh: Callable[[jax.Array], tuple[jax.Array, Any]],
  params: types.Params,
  *args: Any,
) -> tuple[tuple[jax.Array, Any, Any], types.Params]:
  """Losses [T], aux, the result of `weigh`, and the gradient."""
  program = _program(loss_fn, names, params, *args)
  leaves, structure = jax.tree.flatten(params)
  found = program.pull_back(leaves)
  losses, aux = found.value
  losses = jnp.stack(_order.as_scalars(losses, names))
  weighed = weigh(jax.lax.stop_gradient(losses))
  weights = jax.lax.stop_gradient(weighed[0])
  grads = jax.tree.unflatten(structure, found.pull(weights))
  return (losses, aux, weighed), grads


def values(
  loss_fn: _order.LossFn,
  names: tuple[str, ...],
  active: jax.Array | None,
  params: types.Params,
  *args: Any,
) -> jax.Array:
  """Losses [T] from a forward pass; their derivatives skip absent tasks."""
  if active is None:
    losses, _ = loss_fn(params, *args)
    return jnp.stack(_order.as_scalars(losses, names))
  return jnp.stack(guarded(loss_fn, names, active, params, *args)[0])


def guarded(
  loss_fn: _order.LossFn,
  names: tuple[str, ...],
  active: jax.Array,
  params: types.Params,
  *args: Any,
) -> tuple[list[jax.Array], Any]:
  """The losses and aux, whose derivatives skip the tasks that are not active.

  Returns:
    T scalars in the order of the tasks, and aux.
  """
  program = _program(loss_fn, names, params, *args)
  losses, aux = program.values(jax.tree.leaves(params), active)
  return list(_order.as_scalars(losses, names)), aux


def sliced_values(
  loss_fn: _order.LossFn,
  names: tuple[str, ...],
  number: int,
  weigh_slices: bool,
  params: types.Params,
  batch: Any,
  *args: Any,
) -> jax.Array:
  """`values` for a batch in slices, one at a time."""

  def one(piece_and_share):
    piece, share = piece_and_share
    losses = values(loss_fn, names, share > 0, params, piece, *args)
    return jnp.where(share > 0, share * losses, 0)

  pieces = slices.cut(batch, number)
  shares = slices.shares(pieces, names, weigh_slices)
  # A sum in order, like the sum over slices in a second pass.
  return jnp.sum(jax.lax.map(one, (pieces, shares)), axis=0)


def sliced_weighted(
  loss_fn: _order.LossFn,
  names: tuple[str, ...],
  number: int,
  weigh_slices: bool,
  weigh: Callable[[jax.Array], tuple[jax.Array, Any]],
  params: types.Params,
  batch: Any,
  *args: Any,
) -> tuple[tuple[jax.Array, Any, Any], types.Params]:
  """`weighted` for a batch in slices; leaves of aux have a leading axis."""
  whole = sliced_values(
    loss_fn, names, number, weigh_slices, params, batch, *args
  )
  weighed = weigh(jax.lax.stop_gradient(whole))

  def one(piece, share):
    own = jnp.where(share > 0, share * weighed[0], 0)
    (losses, aux, _), grads = weighted(
      loss_fn, names, lambda _: (own, None), params, piece, *args
    )
    losses = jnp.where(share > 0, share * losses, 0)
    return (losses, [_wide(g) for g in jax.tree.leaves(grads)]), aux

  def step(sums, piece_and_share):
    more, aux = one(*piece_and_share)
    return jax.tree.map(jnp.add, sums, more), aux

  pieces = slices.cut(batch, number)
  shares = slices.shares(pieces, names, weigh_slices)
  first = jax.tree.map(lambda x: x[0], (pieces, shares))
  start = jax.tree.map(jnp.zeros_like, jax.eval_shape(one, *first)[0])
  (losses, sums), aux = jax.lax.scan(step, start, (pieces, shares))
  leaves, structure = jax.tree.flatten(params)
  grads = [
    jnp.zeros_like(p) if isinstance(g, tuple) else g.astype(p.dtype)
    for g, p in zip(sums, leaves, strict=True)
  ]
  return (losses, aux, weighed), jax.tree.unflatten(structure, grads)


def _wide(grad):
  """A gradient to be added up; empty for a leaf that has none, such as a key.

  Sums of many numbers in half precision would lose the last ones.
  """
  if not jnp.issubdtype(grad.dtype, jnp.inexact):
    return ()
  return grad.astype(jnp.promote_types(grad.dtype, jnp.float32))


def _program(loss_fn, names, params, *args):
  def run(params):
    losses, aux = loss_fn(params, *args)
    return _order.in_order(losses, names), aux

  return _programs.Program(run, len(names), params)
