"""Gradients that a method tracks with a moving average."""

from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax.transforms.contract import aggregation
from mtl_jax.transforms.contract import algebra


def start(num_tasks: int, params: Any) -> Any:
  """Zeros [T, *shape] for every parameter, float32 at least.

  Each is sharded like its parameter.
  """

  def zeros(p):
    row = jnp.zeros_like(p, algebra.wide(p.dtype))
    return jnp.broadcast_to(row[None], (num_tasks, *p.shape))

  return jax.tree.map(zeros, params)


def check(tracked: Any, task_grads: Any) -> None:
  """Raises unless gradients match the parameters of the state.

  If `update` is called without the parameters, nothing else compares them and
  gradients with another shape would be broadcast.
  """
  ours: Any = jax.tree.structure(tracked)
  theirs: Any = jax.tree.structure(task_grads)
  if ours != theirs:
    raise ValueError(
      'task gradients must have the structure of the parameters that the state '
      f'was made for, got {theirs} and {ours}'
    )
  for (path, y), g in zip(
    jax.tree_util.tree_leaves_with_path(tracked),
    jax.tree.leaves(task_grads),
    strict=True,
  ):
    if y.shape != g.shape:
      raise ValueError(
        f'the task gradient at {jax.tree_util.keystr(path) or "the root"} has '
        f'shape {g.shape}, expected {y.shape} as in the state'
      )


def count_of(count: jax.Array, active: jax.Array) -> jax.Array:
  """Number of updates with each task, including this one."""
  # It stops before it overflows.
  more = active & (count < jnp.iinfo(count.dtype).max)
  return count + more.astype(count.dtype)


def follow(
  tracked: Any,
  task_grads: Any,
  step: jax.Array,
  active: jax.Array,
  factors: jax.Array | None = None,
) -> Any:
  r"""Moves :math:`y_i` towards :math:`f_i g_i`.

  Args:
    tracked: tree of leaves [T, *shape].
    task_grads: tree of leaves [T, *shape].
    step: [T], the share of the way; 1 replaces the tracked gradient.
    active: bool [T]; rows of absent tasks do not change.
    factors: [T]; ones if None.

  Returns:
    Tree like `tracked`.

  Raises:
    ValueError: for gradients that do not match the parameters.
  """
  check(tracked, task_grads)

  def move(y, g):
    g = g.astype(y.dtype)
    if factors is not None:
      g = algebra.row(factors, g).astype(y.dtype) * g
    share = algebra.row(step, y).astype(y.dtype)
    return jnp.where(algebra.row(active, y), y + share * (g - y), y)

  return jax.tree.map(move, tracked, task_grads)


def gram(tracked: Any, active: jax.Array, axes: aggregation.Axes) -> jax.Array:
  """Gram matrix [T, T] of the tracked gradients; zeros for absent tasks."""
  # Masked here, because zeros in the stack's rows would take a copy of it.
  inner = algebra.gram(tracked, active.shape[0], axes)
  return jnp.where(active[:, None] & active[None, :], inner, 0)


def weighted_sum(weights: jax.Array, tracked: Any, like: Any) -> Any:
  """Weighted sum [*shape] of tracked gradients, in the dtypes of `like`."""
  return jax.tree.map(
    lambda total, g: total.astype(g.dtype),
    algebra.weighted_sum(weights, tracked),
    like,
  )
