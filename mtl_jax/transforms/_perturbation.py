"""The perturbation of each task, and what it changes of the gradients."""

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax.transforms import _aggregator
from mtl_jax.transforms import _arguments
from mtl_jax.transforms import _inner
from mtl_jax.transforms import _labels


def schedule(name: str, rho: Any) -> Callable[[jax.Array], Any]:
  """A radius as a function of the number of updates."""
  if callable(rho):
    return rho
  if isinstance(rho, jax.Array):  # It may be traced: its value is not known.
    return lambda count: rho
  if not isinstance(rho, int | float | np.number):
    raise TypeError(f'{name} must be a number or a schedule, got {rho!r}')
  _arguments.check_not_negative(name, float(rho))
  return lambda count: rho


def _widen(leaf: jax.Array) -> jax.Array:
  """The leaf in the dtype of norms: small numbers squared stay numbers."""
  return leaf.astype(_inner.wide(leaf.dtype))


def _squares(leaf: jax.Array, axes: tuple[int, ...] | None) -> jax.Array:
  leaf = _widen(leaf)
  return jnp.sum(leaf * leaf, axis=axes)


class _Norms(NamedTuple):
  """Squared norms [T] of each task's gradient, by part."""

  shared: jax.Array
  heads: jax.Array


def _squared_norms(
  partition: _labels.Partition, leaves: Sequence[Any], axes: _aggregator.Axes
) -> _Norms:
  size = len(partition.task_names)
  shared = jnp.zeros(size)
  heads = [jnp.zeros(())] * size
  for leaf, label, owner in zip(
    leaves, partition.labels, partition.owners, strict=True
  ):
    if label == _labels.SHARED:
      shared = shared + _squares(leaf, tuple(range(1, leaf.ndim)))
    elif owner is not None:
      heads[owner] = heads[owner] + _squares(leaf, None)
  return _Norms(axes.sum_shards(shared), axes.sum_shards(jnp.stack(heads)))


def perturbed(
  partition: _labels.Partition,
  grads: Sequence[Any],
  params: Sequence[Any],
  *,
  rho: Any,
  rho_heads: Any,
  adaptive: bool,
  norm: str,
  eps: float,
  axes: _aggregator.Axes,
) -> Any:
  """Task parameters: each task at its own worst point of the ball.

  Args:
    partition: which leaves are shared.
    grads: leaves of the loss gradients; shared ones [T, *shape].
    params: leaves of the parameters.
    rho: radius for the shared part, this update's.
    rho_heads: radius for the heads.
    adaptive: whether the ball is ASAM's.
    norm: `'separate'` or `'joint'`.
    eps: added to the norm.
    axes: the mapped axes.

  Returns:
    A tree laid out like task gradients.
  """
  # A task axis to meet that of the gradients: ranks are never promoted here.
  params = [
    p[None] if label == _labels.SHARED else p
    for p, label in zip(params, partition.labels, strict=True)
  ]
  scaled = grads
  if adaptive:
    scaled = [
      g if label == _labels.FROZEN else jnp.abs(_widen(p)) * _widen(g)
      for g, p, label in zip(grads, params, partition.labels, strict=True)
    ]
  squares = _squared_norms(partition, scaled, axes)
  if norm == 'joint':
    both = squares.shared + squares.heads
    squares = _Norms(both, both)
  # A zero gradient has no direction; eps leaves its task where it is.
  of_shared = rho / (jnp.sqrt(squares.shared) + eps)
  of_heads = rho_heads / (jnp.sqrt(squares.heads) + eps)
  moved = []
  for g, p, label, owner in zip(
    grads, params, partition.labels, partition.owners, strict=True
  ):
    if label == _labels.FROZEN:
      moved.append(p)
      continue
    scale = (
      _inner.row(of_shared, g) if label == _labels.SHARED else of_heads[owner]
    )
    moved.append(_shifted(p, g, scale, adaptive))
  return partition.tree(moved)


def _shifted(p: jax.Array, g: jax.Array, scale: Any, adaptive: bool):
  stretch = _widen(p) * _widen(p) if adaptive else 1
  return (_widen(p) + scale * stretch * _widen(g)).astype(p.dtype)


def perturbed_task(
  grads: Sequence[Any],
  params: Sequence[Any],
  *,
  rho: Sequence[Any],
  adaptive: bool,
  norm: str,
  eps: float,
) -> list[Any]:
  """`perturbed` of one task by itself, without a task axis.

  Args:
    grads: the task's gradient: leaves of the shared part, leaves of its head.
    params: the parameters likewise.
    rho: their radii.
    adaptive: as in `perturbed`.
    norm: as in `perturbed`.
    eps: as in `perturbed`.

  Returns:
    Parameters laid out like `params`.
  """
  scaled = grads
  if adaptive:
    scaled = jax.tree.map(
      lambda g, p: jnp.abs(_widen(p)) * _widen(g), grads, params
    )
  squares = [
    sum((_squares(g, None) for g in jax.tree.leaves(part)), jnp.zeros(()))
    for part in scaled
  ]
  if norm == 'joint':
    squares = [squares[0] + squares[1]] * 2

  def shift(leaves, own_grads, radius, square):
    scale = radius / (jnp.sqrt(square) + eps)
    return jax.tree.map(
      lambda p, g: _shifted(p, g, scale, adaptive), leaves, own_grads
    )

  return list(map(shift, params, grads, rho, squares))


def flat_part(
  partition: _labels.Partition,
  loss_grads: Sequence[Any],
  sam_grads: Sequence[Any],
  axes: _aggregator.Axes,
) -> list[Any]:
  """Flat gradients; those that are only rounding count as zero."""
  difference = [
    s - g if label == _labels.SHARED else g
    for s, g, label in zip(sam_grads, loss_grads, partition.labels, strict=True)
  ]
  resolution = max(
    (
      float(jnp.finfo(g.dtype).eps)
      for g, label in zip(loss_grads, partition.labels, strict=True)
      if label == _labels.SHARED
    ),
    default=0.0,
  )
  flat = _squared_norms(partition, difference, axes).shared
  loss = _squared_norms(partition, loss_grads, axes).shared
  seen = flat > resolution**2 * loss
  # A non-finite gradient is not rounding: it has to reach the update.
  seen = seen | ~jnp.isfinite(flat)
  return [
    jnp.where(_inner.row(seen, h), h, 0) if label == _labels.SHARED else h
    for h, label in zip(difference, partition.labels, strict=True)
  ]
