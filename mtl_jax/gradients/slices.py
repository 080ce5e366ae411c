"""Slices of a batch, and the labels of each task in them.

Micro-batches and independent batches are slices. This module also counts
labels, which weigh slices and replicas and show which tasks are present.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp


def cut(batch: Any, number: int, argument: str = 'micro_batches') -> Any:
  """Cuts a batch into slices.

  In a sharded batch neighbouring rows are on one device. Every n-th row goes to
  the same slice, so each slice is spread over all devices.

  Args:
    batch: tree of leaves [B, ...].
    number: the number of slices; must divide B.
    argument: the name of the number in an error.

  Returns:
    The tree with leaves [number, B / number, ...]; row r of the batch is in
    slice r mod number.

  Raises:
    ValueError: if a leaf cannot be cut; the message names its shape.
  """

  def cut_leaf(x):
    if not jnp.shape(x) or x.shape[0] % number:
      raise ValueError(
        f'{argument}={number} must divide the leading axis of every leaf of '
        f'the batch, got shape {jnp.shape(x)}'
      )
    x = x.reshape(x.shape[0] // number, number, *x.shape[1:])
    return jnp.swapaxes(x, 0, 1)

  return jax.tree.map(cut_leaf, batch)


def independent(batch: Any, number: int) -> list[Any]:
  """Cuts a batch into independent batches of one size.

  Args:
    batch: tree of leaves [B, ...].
    number: the number of batches, at most B. The last B mod number rows are
      dropped.

  Returns:
    Trees of leaves [B // number, ...].

  Raises:
    ValueError: if there are fewer rows than batches.
  """

  def whole(x):
    if not jnp.shape(x) or x.shape[0] < number:
      raise ValueError(
        f'{number} independent batches need at least {number} rows in every '
        f'leaf of the batch, got shape {jnp.shape(x)}'
      )
    return x[: x.shape[0] // number * number]

  pieces = cut(jax.tree.map(whole, batch), number)
  return [jax.tree.map(lambda x, k=k: x[k], pieces) for k in range(number)]


def masks(batch: Any, task_names: tuple[str, ...]) -> dict[str, Any]:
  """The masks in a batch by task, for the tasks that have one.

  Args:
    batch: any tree. Its masks are `batch['mask'][task]`, or attributes of these
      names; a batch without any, or with one mask for all, has none by task.
    task_names: the tasks.

  Returns:
    `{task: mask [B, ...]}`.
  """
  found = _member(batch, 'mask')
  by_task = {task: _member(found, task) for task in task_names}
  return {
    task: mask for task, mask in by_task.items() if hasattr(mask, 'dtype')
  }


def _member(container: Any, name: str) -> Any:
  if isinstance(container, Mapping):
    return container.get(name)
  # Arrays have attributes too, such as `sum`.
  return None if hasattr(container, 'dtype') else getattr(container, name, None)


def label_counts(batch: Any, task_names: tuple[str, ...]) -> jax.Array:
  """Counts the labels of each task in a batch.

  Args:
    batch: see `masks`; a mask is 1 for a label that is present.
    task_names: the tasks.

  Returns:
    [T], float32; 1 for a task without a mask.
  """
  found = masks(batch, task_names)
  return jnp.stack(
    [
      jnp.sum(found[task].astype(jnp.float32))
      if task in found
      else jnp.ones(())
      for task in task_names
    ]
  )


def shares(
  pieces: Any, task_names: tuple[str, ...], weigh: bool = True
) -> jax.Array:
  """The share of each task's labels in each slice.

  Args:
    pieces: a batch from `cut`, leaves [N, ...].
    task_names: the tasks.
    weigh: whether labels count at all; otherwise every share is 1 / N.

  Returns:
    [N, T]; zeros for a task without labels.
  """
  if not weigh:
    number = jax.tree.leaves(pieces)[0].shape[0]
    return jnp.full((number, len(task_names)), 1 / number)
  counts = jax.vmap(lambda piece: label_counts(piece, task_names))(pieces)
  total = jnp.sum(counts, axis=0, keepdims=True)
  return counts / jnp.maximum(total, 1)
