"""The perturbation of each task, and the flat gradients that follow from it."""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax.transforms.contract import aggregation
from mtl_jax.transforms.contract import algebra
from mtl_jax.transforms.contract import arguments
from mtl_jax.transforms.contract import labels


@dataclasses.dataclass(frozen=True)
class Perturbation:
  """The radius and the ball within which every task is perturbed.

  Attributes:
    rho: radius, in the units of the parameters, or an optax schedule of the
      number of updates.
    rho_heads: radius for the heads; `rho` if None.
    adaptive: whether the ball is ASAM's, elementwise in the parameters.
    norm: `'separate'`: shared part and head are each divided by their own norm;
      `'joint'`: both by the norm over both.
    eps: added to the norm.

  Raises:
    TypeError: for a radius that is neither a number nor a schedule.
    ValueError: for a negative radius, another norm, and an eps that is not
      positive.
  """

  rho: float | Callable[[jax.Array], Any] = 0.05
  rho_heads: float | Callable[[jax.Array], Any] | None = None
  adaptive: bool = False
  norm: str = 'separate'
  eps: float = 1e-12

  def __post_init__(self):
    arguments.one_of('norm', self.norm, ('separate', 'joint'))
    arguments.check_positive('eps', self.eps)
    self._schedules()

  def radii(self, count: Any) -> tuple[Any, Any]:
    """Radii of the shared part and of the heads after `count` updates."""
    of_shared, of_heads = self._schedules()
    return of_shared(count), of_heads(count)

  def _schedules(self):
    of_shared = schedule('rho', self.rho)
    if self.rho_heads is None:
      return of_shared, of_shared
    return of_shared, schedule('rho_heads', self.rho_heads)


def schedule(name: str, rho: Any) -> Callable[[jax.Array], Any]:
  """A radius as a function of the number of updates."""
  if callable(rho):
    return rho
  if isinstance(rho, jax.Array):  # Its value may be traced.
    return lambda count: rho
  if not isinstance(rho, int | float | np.number):
    raise TypeError(f'{name} must be a number or a schedule, got {rho!r}')
  arguments.check_not_negative(name, float(rho))
  return lambda count: rho


def _widen(leaf: jax.Array) -> jax.Array:
  """The leaf in the dtype for norms, so that small squares do not underflow."""
  return leaf.astype(algebra.wide(leaf.dtype))


def _squares(leaf: jax.Array, axes: tuple[int, ...] | None) -> jax.Array:
  leaf = _widen(leaf)
  return jnp.sum(leaf * leaf, axis=axes)


def squared_norm(tree: Any) -> jax.Array:
  """Squared norm over all leaves, float32 at least."""
  return sum((_squares(x, None) for x in jax.tree.leaves(tree)), jnp.zeros(()))


class Norms(NamedTuple):
  """Squared norms of task gradients by part, [T] or for one task."""

  shared: jax.Array
  heads: jax.Array


def step_sizes(
  squares: Norms, perturbation: Perturbation, count: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """The factors that turn gradients into perturbations, by part.

  Args:
    squares: squared norms of the gradients.
    perturbation: the ball.
    count: number of updates so far.

  Returns:
    Factors for the shared parts and for the heads, shaped like `squares`.
  """
  if perturbation.norm == 'joint':
    both = squares.shared + squares.heads
    squares = Norms(both, both)
  # A zero gradient has no direction; eps leaves its task where it is.
  of_shared, of_heads = (
    radius / (jnp.sqrt(square) + perturbation.eps)
    for radius, square in zip(perturbation.radii(count), squares, strict=True)
  )
  return of_shared, of_heads


def _shared(partition: labels.Partition, leaves: Sequence[Any]) -> list[Any]:
  """The shared leaves among all leaves."""
  return [
    leaf
    for leaf, label in zip(leaves, partition.labels, strict=True)
    if label == labels.SHARED
  ]


def _squared_rows(
  stack: Sequence[jax.Array], size: int, axes: aggregation.Axes
) -> jax.Array:
  """Squared norms [T] of the rows in a stack of leaves [T, *shape]."""
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
  perturbation: Perturbation,
  count: jax.Array,
  *,
  axes: aggregation.Axes,
  present: jax.Array | None = None,
) -> Any:
  """Task parameters, with each task at its worst point in the ball.

  Args:
    partition: which leaves are shared.
    grads: leaves of the loss gradients; shared ones [T, *shape].
    params: leaves of the parameters.
    perturbation: the ball.
    count: number of updates so far.
    axes: the mapped axes.
    present: bool [T], the tasks to perturb; all by default. The shared rows of
      other tasks may hold anything.

  Returns:
    A tree laid out like task gradients.
  """
  # The parameter gets a task axis like the gradients': ranks are not promoted.
  params = [
    p[None] if label == labels.SHARED else p
    for p, label in zip(params, partition.labels, strict=True)
  ]
  scaled = grads
  if perturbation.adaptive:
    scaled = [
      g if label == labels.FROZEN else jnp.abs(_widen(p)) * _widen(g)
      for g, p, label in zip(grads, params, partition.labels, strict=True)
    ]
  squares = _squared_norms(partition, scaled, axes)
  if present is not None:
    squares = Norms(*(jnp.where(present, x, 0) for x in squares))
  of_shared, of_heads = step_sizes(squares, perturbation, count)
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
    there = shifted(p, g, scale, perturbation.adaptive)
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
  perturbation: Perturbation,
  count: jax.Array,
) -> list[Any]:
  """`perturbed` for a single task, without a task axis.

  Args:
    grads: the task's gradient: leaves of the shared part and leaves of its
      head.
    params: the parameters likewise.
    perturbation: the ball.
    count: number of updates so far.

  Returns:
    Parameters laid out like `params`.
  """
  scaled = grads
  if perturbation.adaptive:
    scaled = jax.tree.map(
      lambda g, p: jnp.abs(_widen(p)) * _widen(g), grads, params
    )
  squares = Norms(*map(squared_norm, scaled))
  scales = step_sizes(squares, perturbation, count)

  def shift(leaves, own_grads, scale):
    return jax.tree.map(
      lambda p, g: shifted(p, g, scale, perturbation.adaptive),
      leaves,
      own_grads,
    )

  return list(map(shift, params, grads, scales))


def resolved(
  of_flat: jax.Array, of_loss: jax.Array, shared: Sequence[Any]
) -> jax.Array:
  """Mask of the flat gradients that are more than rounding, bool [T].

  Args:
    of_flat: [T], squared norms of the flat gradients.
    of_loss: [T], squared norms of the loss gradients.
    shared: arrays with the dtypes of the shared part's gradients.
  """
  eps = max((float(jnp.finfo(x.dtype).eps) for x in shared), default=0.0)
  # A non-finite gradient is not rounding: it has to reach the update.
  return (of_flat > eps**2 * of_loss) | ~jnp.isfinite(of_flat)


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
    Leaves of the flat gradients; for heads, the leaves of `loss_grads`.
  """
  loss, sam = (
    list(map(jnp.asarray, _shared(partition, grads)))
    for grads in (loss_grads, sam_grads)
  )
  size = len(partition.task_names)
  difference = jax.tree.map(jnp.subtract, sam, loss)
  of_flat = _squared_rows(difference, size, axes)
  of_loss = _squared_rows(loss, size, axes)
  seen = resolved(of_flat, of_loss, loss)
  if present is not None:
    seen &= present
  if algebra.on_cpu():

    def write(i, sam):
      rows = [
        jnp.where(seen[i], s[i] - g[i], 0)
        for s, g in zip(sam, loss, strict=True)
      ]
      return [s.at[i].set(x) for s, x in zip(sam, rows, strict=True)]

    # This overwrites the SAM gradients.
    flat = jax.lax.fori_loop(0, size, write, sam)
  else:
    flat = [jnp.where(algebra.row(seen, h), h, 0) for h in difference]
  rows = iter(flat)
  return [
    next(rows) if label == labels.SHARED else g
    for g, label in zip(loss_grads, partition.labels, strict=True)
  ]
