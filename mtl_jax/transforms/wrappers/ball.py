"""The perturbation of each task, and what it changes of the gradients."""

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax.transforms.contract import aggregation
from mtl_jax.transforms.contract import algebra
from mtl_jax.transforms.contract import arguments
from mtl_jax.transforms.contract import labels


def schedule(name: str, rho: Any) -> Callable[[jax.Array], Any]:
  """A radius as a function of the number of updates."""
  if callable(rho):
    return rho
  if isinstance(rho, jax.Array):  # It may be traced: its value is not known.
    return lambda count: rho
  if not isinstance(rho, int | float | np.number):
    raise TypeError(f'{name} must be a number or a schedule, got {rho!r}')
  arguments.check_not_negative(name, float(rho))
  return lambda count: rho


def _widen(leaf: jax.Array) -> jax.Array:
  """The leaf in the dtype of norms: small numbers squared stay numbers."""
  return leaf.astype(algebra.wide(leaf.dtype))


def _squares(leaf: jax.Array, axes: tuple[int, ...] | None) -> jax.Array:
  leaf = _widen(leaf)
  return jnp.sum(leaf * leaf, axis=axes)


def squared_norm(tree: Any) -> jax.Array:
  """Squared norm over all leaves, float32 at least."""
  return sum((_squares(x, None) for x in jax.tree.leaves(tree)), jnp.zeros(()))


class Norms(NamedTuple):
  """Squared norms of task gradients, [T] or those of one task, by part."""

  shared: jax.Array
  heads: jax.Array


def step_sizes(
  squares: Norms, rho: Sequence[Any], *, norm: str, eps: float
) -> tuple[jax.Array, jax.Array]:
  """What gradients are multiplied by to be perturbations, by part.

  Args:
    squares: squared norms of what is to be perturbed.
    rho: the radii of the shared part and of the heads.
    norm: `'separate'` or `'joint'`.
    eps: added to the norm.

  Returns:
    Factors of the shared parts and of the heads, shaped like `squares`.
  """
  if norm == 'joint':
    both = squares.shared + squares.heads
    squares = Norms(both, both)
  # A zero gradient has no direction; eps leaves its task where it is.
  of_shared, of_heads = (
    radius / (jnp.sqrt(square) + eps)
    for radius, square in zip(rho, squares, strict=True)
  )
  return of_shared, of_heads


def _shared(partition: labels.Partition, leaves: Sequence[Any]) -> list[Any]:
  """The shared ones of all leaves."""
  return [
    leaf
    for leaf, label in zip(leaves, partition.labels, strict=True)
    if label == labels.SHARED
  ]


def _squared_rows(
  stack: Sequence[jax.Array], size: int, axes: aggregation.Axes
) -> jax.Array:
  """Squared norms [T] of the rows of a stack of leaves [T, *shape]."""
  total = jnp.zeros(size)
  for leaf in stack:
    total = total + _squares(leaf, tuple(range(1, leaf.ndim)))
  return axes.sum_shards(total)


def _squared_norms(
  partition: labels.Partition, leaves: Sequence[Any], axes: aggregation.Axes
) -> Norms:
  size = len(partition.task_names)
  heads = [jnp.zeros(())] * size
  for leaf, owner in zip(leaves, partition.owners, strict=True):
    if owner is not None:
      heads[owner] = heads[owner] + _squares(leaf, None)
  shared = _squared_rows(_shared(partition, leaves), size, axes)
  return Norms(shared, axes.sum_shards(jnp.stack(heads)))


def perturbed(
  partition: labels.Partition,
  grads: Sequence[Any],
  params: Sequence[Any],
  *,
  rho: Any,
  rho_heads: Any,
  adaptive: bool,
  norm: str,
  eps: float,
  axes: aggregation.Axes,
  present: jax.Array | None = None,
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
    present: bool [T], the tasks to perturb; all by default. The shared rows of
      others may hold anything.

  Returns:
    A tree laid out like task gradients.
  """
  # A task axis to meet that of the gradients: ranks are never promoted here.
  params = [
    p[None] if label == labels.SHARED else p
    for p, label in zip(params, partition.labels, strict=True)
  ]
  scaled = grads
  if adaptive:
    scaled = [
      g if label == labels.FROZEN else jnp.abs(_widen(p)) * _widen(g)
      for g, p, label in zip(grads, params, partition.labels, strict=True)
    ]
  squares = _squared_norms(partition, scaled, axes)
  if present is not None:
    squares = Norms(*(jnp.where(present, x, 0) for x in squares))
  of_shared, of_heads = step_sizes(
    squares, (rho, rho_heads), norm=norm, eps=eps
  )
  moved = []
  for g, p, label, owner in zip(
    grads, params, partition.labels, partition.owners, strict=True
  ):
    if label == labels.FROZEN:
      moved.append(p)
      continue
    scale = (
      algebra.row(of_shared, g) if label == labels.SHARED else of_heads[owner]
    )
    there = shifted(p, g, scale, adaptive)
    if present is not None and label == labels.SHARED:
      there = jnp.where(algebra.row(present, g), there, p)
    moved.append(there)
  return partition.tree(moved)


def shifted(
  p: jax.Array, g: jax.Array, scale: Any, adaptive: bool = False
) -> jax.Array:
  """A parameter moved along its gradient, in the parameter's dtype."""
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
  squares = Norms(*map(squared_norm, scaled))
  scales = step_sizes(squares, rho, norm=norm, eps=eps)

  def shift(leaves, own_grads, scale):
    return jax.tree.map(
      lambda p, g: shifted(p, g, scale, adaptive), leaves, own_grads
    )

  return list(map(shift, params, grads, scales))


def flat_part(
  partition: labels.Partition,
  loss_grads: Sequence[Any],
  sam_grads: Sequence[Any],
  axes: aggregation.Axes,
  present: jax.Array | None = None,
) -> list[Any]:
  """Flat gradients; those that are only rounding count as zero.

  Args:
    partition: which leaves are shared.
    loss_grads: leaves of the loss gradients.
    sam_grads: leaves of the SAM gradients.
    axes: the mapped axes.
    present: as in `perturbed`; the rows of other tasks are zero.

  Returns:
    Leaves of the flat gradients; of heads those of `loss_grads`.
  """
  loss, sam = (
    list(map(jnp.asarray, _shared(partition, grads)))
    for grads in (loss_grads, sam_grads)
  )
  size = len(partition.task_names)
  difference = jax.tree.map(jnp.subtract, sam, loss)
  resolution = max((float(jnp.finfo(g.dtype).eps) for g in loss), default=0.0)
  of_flat = _squared_rows(difference, size, axes)
  of_loss = _squared_rows(loss, size, axes)
  seen = of_flat > resolution**2 * of_loss
  # A non-finite gradient is not rounding: it has to reach the update.
  seen = seen | ~jnp.isfinite(of_flat)
  if present is not None:
    seen &= present
  if algebra.on_cpu():

    def write(i, sam):
      rows = [
        jnp.where(seen[i], s[i] - g[i], 0)
        for s, g in zip(sam, loss, strict=True)
      ]
      return [s.at[i].set(x) for s, x in zip(sam, rows, strict=True)]

    # In the place of the SAM gradients.
    flat = jax.lax.fori_loop(0, size, write, sam)
  else:
    flat = [jnp.where(algebra.row(seen, h), h, 0) for h in difference]
  rows = iter(flat)
  return [
    next(rows) if label == labels.SHARED else g
    for g, label in zip(loss_grads, partition.labels, strict=True)
  ]
