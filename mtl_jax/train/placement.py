"""The training split on the devices, so that a step gets only indices.

Every device holds the whole split, so it has all rows that a step may need. The
compiled step takes them itself, and no example is copied from the host during
training.
"""

from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from mtl_jax import types
from mtl_jax.data import pipeline
from mtl_jax.train import distributed


class IndexSource:
  """A source whose examples are their own indices, int32."""

  def __init__(self, size: int):
    """Takes the number of examples."""
    self._size = size

  def __len__(self) -> int:
    """Number of examples."""
    return self._size

  def __getitems__(self, indices: np.ndarray) -> np.ndarray:
    """The indices [B] themselves."""
    return np.asarray(indices, np.int32)


def put(source: types.Source, mesh: jax.sharding.Mesh) -> types.Batch:
  """Puts all examples on every device.

  Args:
    source: the examples; the same ones in every process.
    mesh: from `mtl_jax.train.distributed.make_mesh`.

  Returns:
    All examples as one batch, on every device of the mesh.

  Raises:
    ValueError: see `check_fits`.
  """
  arrays = pipeline.in_memory(source).arrays
  size = sum(x.nbytes for x in jax.tree.leaves(arrays))
  check_fits(size, mesh.local_devices)
  sharding = distributed.replicated(mesh)
  # Each process copies its data to its own devices, so nothing is sent.
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(sharding, x, x.shape),
    arrays,
  )


def check_fits(size: int, devices: Iterable[Any]) -> None:
  """Raises a ValueError if data take more than half of the free memory.

  The other half is for the model, whose need is not yet known. The check skips
  devices that do not report their memory, such as CPUs.

  Args:
    size: number of bytes.
    devices: the devices, each of which will hold all the data.
  """
  for device in devices:
    memory = device.memory_stats() or {}
    if 'bytes_limit' not in memory:
      continue
    free = memory['bytes_limit'] - memory.get('bytes_in_use', 0)
    if 2 * size > free:
      raise ValueError(
        f"data.placement is 'device', but the training split has {size} bytes, "
        f"more than half of the {free} that are free on {device}; 'host' keeps "
        'it there'
      )


def take(data: types.Batch, indices: jax.Array) -> types.Batch:
  """The examples at `indices` [B] as a batch; for use inside `jit`."""
  # The shuffle gives no index out of range, so a check is not needed.
  return jax.tree.map(
    lambda x: x.at[indices].get(mode='promise_in_bounds'), data
  )
