"""Checkpoints go from one process to two and back, cut over all of them."""

import jax
import jax.numpy as jnp
import numpy as np
import processes

from mtl_jax.train import checkpoint
from mtl_jax.train import distributed
from mtl_jax.train import sharding
from mtl_jax.train import step

# Reads what one process wrote and writes twice of it.
_PROCESS = """
import sys
import jax
from mtl_jax.train import checkpoint, distributed
sys.path[:0] = ['tests', 'tests/train']
import test_checkpoint_processes as test

workdir, address, process = sys.argv[1:]
distributed.initialize(address, 2, int(process), timeout_s=60)
assert (jax.process_count(), jax.device_count()) == (2, 4)
checkpoints = checkpoint.Checkpoints(workdir)
state, info = checkpoints.restore(test.place(test.numbers(0)))
assert not state['w'].is_fully_addressable
# Without a gathering: each process multiplies its own parts.
double = jax.jit(lambda s: jax.tree.map(lambda x: 2 * x, s))
checkpoints.save(2, double(state), info)
checkpoints.close()
"""


def numbers(factor):
  w = factor * np.arange(8 * 12, dtype=np.float32).reshape(8, 12)
  return {'w': w, 'count': np.float32(factor)}


def place(state):
  """On all devices of all processes, the array in shards."""
  mesh = distributed.make_mesh()
  layout = sharding.Layout(mesh, ('a',), 'sharded', min_size=8)
  whole = step.TrainState(np.zeros(()), state, {}, joint=(), opt_state=())
  shards = layout.of_state(whole).params
  return jax.tree.map(
    lambda x, s: jax.make_array_from_callback(x.shape, s, lambda i: x[i]),
    state,
    shards,
  )


def test_two_processes_read_what_one_wrote_and_one_reads_what_two_wrote(
  tmp_path,
):
  checkpoints = checkpoint.Checkpoints(tmp_path)
  checkpoints.save(1, place(numbers(3)), {'wall_time_s': 1.5})
  checkpoints.close()
  for status, error in processes.run_two(
    lambda address, i: ('-c', _PROCESS, str(tmp_path), address, str(i))
  ):
    assert status == 0, error

  checkpoints = checkpoint.Checkpoints(tmp_path)
  state, info = checkpoints.restore(place(numbers(0)))
  checkpoints.close()
  assert checkpoints.steps() == [1, 2]
  assert info == {'wall_time_s': 1.5}
  assert len(state['w'].sharding.device_set) == jax.device_count()
  jax.tree.map(np.testing.assert_array_equal, state, numbers(6))
  assert state['w'].dtype == jnp.float32
