"""A batch in slices: for micro-batches, and for independent batches."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp


def cut(batch: Any, number: int, argument: str = 'micro_batches') -> Any:
  """Cuts a batch into slices.

  Neighbouring rows lie on one device where the batch is sharded; taking every
  n-th of them leaves each slice spread over all devices.

  Args:
    batch: tree of leaves [B, ...].
    number: of slices; must divide B.
    argument: what the number is called in an error.

  Returns:
    The tree with leaves [number, B / number, ...]; row r of the batch is in
    slice r mod number.

  Raises:
    ValueError: if a leaf cannot be cut; tells its shape.
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
    number: of batches, at most B. The last B mod number rows are left out.

  Returns:
    Trees of leaves [B // number, ...].

  Raises:
    ValueError: if there are fewer rows than batches.
  """

  def whole(x):
    if not jnp.shape(x) or x.shape[0] < number:
      raise ValueError(
        f'{number} independent batches need as many rows in every leaf of the '
        f'batch, got shape {jnp.shape(x)}'
      )
    return x[: x.shape[0] // number * number]

  pieces = cut(jax.tree.map(whole, batch), number)
  return [jax.tree.map(lambda x, k=k: x[k], pieces) for k in range(number)]


def label_counts(
  slices: Any, task_names: tuple[str, ...], number: int
) -> jax.Array:
  """Counts the labels in slices.

  Args:
    slices: a batch as `cut` returns it; `slices['mask'][task]`, where it is
      there, is 1 for a label that is present.
    task_names: the tasks.
    number: of slices.

  Returns:
    [number, T]; ones for a task without a mask.
  """
  masks = slices.get('mask', {}) if isinstance(slices, Mapping) else {}
  counts = [
    jnp.sum(
      masks[task].astype(jnp.float32), axis=tuple(range(1, masks[task].ndim))
    )
    if task in masks
    else jnp.ones(number)
    for task in task_names
  ]
  return jnp.stack(counts, axis=1)
