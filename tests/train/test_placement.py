"""Training data on the devices give the batches of the host's."""

import itertools

import jax
import numpy as np
import processes
import pytest

from mtl_jax.data import pipeline
from mtl_jax.train import calls
from mtl_jax.train import distributed
from mtl_jax.train import placement

_SIZE, _BATCH = 37, 8


def source():
  rng = np.random.default_rng(0)
  return pipeline.ArraySource(
    {
      'image': rng.integers(0, 256, (_SIZE, 3, 2, 1)).astype(np.uint8),
      'labels': {'a': np.arange(_SIZE), 'b': np.arange(_SIZE)[:, None] * 2.0},
      'mask': {
        'a': rng.integers(0, 2, _SIZE).astype(np.float32),
        'b': np.ones((_SIZE, 1), np.float32),
      },
    }
  )


def batches(examples, mesh, steps_per_call):
  """The first calls' inputs, on the mesh."""
  return [
    distributed.put_batch(batch, mesh, 0 if steps_per_call == 1 else 1)
    for batch in itertools.islice(
      pipeline.train_batches(
        examples,
        seed=3,
        batch_size=_BATCH,
        num_steps=12,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        steps_per_call=steps_per_call,
      ),
      # More than an epoch of four steps.
      12 // steps_per_call,
    )
  ]


def assert_same_batches(mesh, steps_per_call):
  """Compares what this process holds of each batch, placed either way."""
  data = placement.put(source(), mesh)
  rows = distributed.batch_sharded(mesh)
  found = []

  def step(state, batch):
    """Hands on a batch, as the state: in the end the last of a call."""
    del state
    return batch

  take, hand = (
    jax.jit(
      calls.make_call(step, steps_per_call=steps_per_call, placement=place),
      out_shardings=rows,
    )
    for place in ('device', 'host')
  )
  state = jax.jit(placement.take)(data, np.zeros(_BATCH, np.int32))
  of_host = batches(source(), mesh, steps_per_call)
  indices = batches(placement.IndexSource(_SIZE), mesh, steps_per_call)
  for batch, index in zip(of_host, indices, strict=True):
    found.append(index)
    expected, actual = hand(state, batch), take(state, (data, index))
    for a, b in zip(
      jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True
    ):
      assert a.dtype == b.dtype
      for mine, other in zip(
        a.addressable_shards, b.addressable_shards, strict=True
      ):
        np.testing.assert_array_equal(mine.data, other.data)
  return found


@pytest.mark.parametrize('steps_per_call', [1, 3])
@pytest.mark.parametrize('num_devices', [1, 8])
def test_rows_taken_on_the_devices_are_the_batches_of_the_host(
  num_devices, steps_per_call
):
  mesh = distributed.make_mesh(jax.devices()[:num_devices])
  found = assert_same_batches(mesh, steps_per_call)
  seen = np.concatenate([np.asarray(x).ravel() for x in found])
  assert len(seen) == 12 * _BATCH
  for epoch in np.split(seen, 3):
    assert len(set(epoch)) == 4 * _BATCH


_PROCESS = """
import sys
from mtl_jax.train import distributed
distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
sys.path[:0] = ['tests', 'tests/train']
import test_placement
mesh = distributed.make_mesh()
assert mesh.size == 4
test_placement.assert_same_batches(mesh, 3)
"""


def test_rows_taken_in_two_processes_are_the_batches_of_the_host():
  for status, error in processes.run_two(
    lambda address, i: ('-c', _PROCESS, address, str(i))
  ):
    assert status == 0, error


class _Device:
  """A device that tells its memory."""

  def __init__(self, memory):
    self._memory = memory

  def memory_stats(self):
    return self._memory


def test_data_larger_than_half_of_the_free_memory_are_refused():
  memory = {'bytes_limit': 1000, 'bytes_in_use': 400}
  placement.check_fits(300, [_Device(None), _Device(memory)])
  with pytest.raises(
    ValueError, match=r"'device', .* 301 bytes.* the 600 that"
  ):
    placement.check_fits(301, [_Device(None), _Device(memory)])
