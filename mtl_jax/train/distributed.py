"""Start-up of processes, the mesh of devices, and batches on the mesh."""

import collections
from collections.abc import Iterator
from collections.abc import Mapping
import contextlib
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np

from mtl_jax import types
from mtl_jax.train import roll_call

DATA_AXIS = 'data'
TASK_AXIS = 'task'


def initialize(
  coordinator_address: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  *,
  timeout_s: int = 300,
) -> None:
  """Starts `jax.distributed`; call it before any use of a device.

  Without arguments JAX detects them on Cloud TPU pods, under Slurm and under
  Open MPI.

  Args:
    coordinator_address: `host:port` of process 0.
    num_processes: number of processes.
    process_id: the number of this process.
    timeout_s: seconds to wait for the other processes.

  Raises:
    ValueError: if some but not all of the three are given, or if processes have
      different `num_processes`.
    TimeoutError: if the three are given and a process did not come; the message
      names it.
  """
  given = (coordinator_address, num_processes, process_id)
  if any(x is None for x in given) and any(x is not None for x in given):
    raise ValueError(
      'coordinator_address, num_processes and process_id go together, got '
      f'{coordinator_address!r}, {num_processes} and {process_id}'
    )
  if (
    coordinator_address is not None
    and num_processes is not None
    and process_id is not None
  ):
    if not 0 <= process_id < num_processes:
      raise ValueError(
        f'process_id must be from 0 to num_processes - 1, got {process_id} of '
        f'{num_processes}'
      )
    roll_call.roll_call(
      coordinator_address, num_processes, process_id, timeout_s
    )
  jax.distributed.initialize(*given, initialization_timeout=timeout_s)
  # Processes find each other at the first exchange, for which Gloo (on CPU)
  # waits 30 s. After that they can wait for the preparation of data.
  wait_for_all('all processes have started')


def make_mesh(
  devices: Any = None, *, task_devices: int = 1
) -> jax.sharding.Mesh:
  """A mesh over all devices of all processes.

  Devices of one process are neighbours, so that a process holds the rows that
  the pipeline gives it.

  Args:
    devices: the devices; all devices by default.
    task_devices: n. With 1 the mesh has one axis, `'data'`; with more it has
      the axes `('data', 'task')` and n devices along `'task'`, among which the
      tasks are divided for one part of the batch.

  Returns:
    The mesh.

  Raises:
    ValueError: if n does not divide the number of devices in every process: two
      processes would have to read the rows of one part of the batch.
  """
  devices = jax.devices() if devices is None else devices
  ordered = sorted(devices, key=lambda d: (d.process_index, d.id))
  held = collections.Counter(d.process_index for d in ordered)
  if task_devices < 1 or any(n % task_devices for n in held.values()):
    raise ValueError(
      'parallel.task_devices must be positive and divide the number of devices '
      f'of every process, got {task_devices} for {len(ordered)} devices, by '
      f'process {[held[process] for process in sorted(held)]}'
    )
  names: tuple[str, ...] = (DATA_AXIS,)
  shape: tuple[int, ...] = (len(ordered),)
  if task_devices > 1:
    names, shape = (DATA_AXIS, TASK_AXIS), (-1, task_devices)
  return jax.sharding.Mesh(
    np.array(ordered).reshape(shape),
    names,
    axis_types=(jax.sharding.AxisType.Auto,) * len(names),
  )


def replicated(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
  """The sharding of arrays that every device holds whole."""
  return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def batch_sharded(
  mesh: jax.sharding.Mesh, axis: int = 0
) -> jax.sharding.NamedSharding:
  """The sharding of a batch, with the axis of its examples along `'data'`."""
  spec = jax.sharding.PartitionSpec(*(None,) * axis, DATA_AXIS)
  return jax.sharding.NamedSharding(mesh, spec)


def check_batch_size(
  batch_size: int, mesh: jax.sharding.Mesh, micro_batches: int = 1
) -> None:
  """Raises a ValueError if a batch cannot be divided among its devices."""
  along_data = mesh.shape[DATA_AXIS]
  parts = along_data * micro_batches
  if batch_size < 1 or batch_size % parts:
    raise ValueError(
      f'batch_size must be a positive multiple of {parts} ({along_data} '
      f'devices x {micro_batches} micro-batches), got {batch_size}'
    )


def put_batch(
  batch: types.Batch, mesh: jax.sharding.Mesh, axis: int = 0
) -> types.Batch:
  """Puts this process's slice of a global batch on its devices.

  Args:
    batch: NumPy arrays, one axis of which is this process's share of the batch.
    mesh: of `make_mesh`.
    axis: that axis; every process holds the axes before it whole.

  Returns:
    The global batch, sharded over the mesh.
  """
  sharding = batch_sharded(mesh, axis)
  if jax.process_count() == 1:
    return jax.device_put(batch, sharding)
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(sharding, x), batch
  )


def is_main() -> bool:
  """Whether this is the process that writes files and shows progress."""
  return jax.process_index() == 0


def agree(flag: bool) -> bool:
  """Whether `flag` is true in any process; all processes must call it."""
  if jax.process_count() == 1:
    return flag
  return bool(multihost_utils.process_allgather(np.array(flag)).any())


def add_up(numbers: Mapping[str, int]) -> dict[str, int]:
  """Sums over processes, mod 2^32; all must call it, with the same names."""
  if jax.process_count() == 1 or not numbers:
    return dict(numbers)
  own = np.array([x % 2**32 for x in numbers.values()], np.uint32)
  totals = np.sum(
    multihost_utils.process_allgather(own), axis=0, dtype=np.uint32
  )
  return dict(zip(numbers, map(int, totals), strict=True))


def wait_for_all(name: str) -> None:
  """Returns when all processes have come here; `name` identifies the place."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


@contextlib.contextmanager
def process_zero_first(name: str) -> Iterator[None]:
  """Process 0 runs the body before the others, for example to prepare data."""
  if not is_main():
    wait_for_all(name)
  yield
  if is_main():
    wait_for_all(name)
