"""Processes find each other or say what is wrong; meshes fit the processes."""

import concurrent.futures
import socket
import time
import types

import jax
import numpy as np
import pytest

from mtl_jax.train import distributed
from mtl_jax.train import roll_call


@pytest.fixture
def address():
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    return f'127.0.0.1:{free.getsockname()[1]}'


def _together(address, given, timeout_s=30.0):
  """What becomes of processes with (num_processes, process_id) each."""
  with concurrent.futures.ThreadPoolExecutor(len(given)) as pool:
    calls = [
      pool.submit(roll_call.roll_call, address, *numbers, timeout_s)
      for numbers in given
    ]
    return [call.exception() for call in calls]


def test_a_roll_call_ends_when_all_are_there_and_frees_the_port(address):
  for _ in range(2):
    given = [(3, 2), (3, 1), (3, 0)]
    assert _together(address, given) == [None, None, None]


def test_missing_process_is_named_in_those_that_came(address):
  errors = _together(address, [(4, 0), (4, 2)], timeout_s=0.5)
  for error in errors:
    assert isinstance(error, TimeoutError)
    assert f'processes [1, 3] did not come to {address} within' in str(error)


def test_missing_process_ends_the_initialization_with_an_error(address):
  with pytest.raises(TimeoutError, match=r'processes \[1\] did not come'):
    distributed.initialize(address, 2, 0, timeout_s=1)
  with pytest.raises(TimeoutError, match=r'process 0 at .* did not answer'):
    distributed.initialize(address, 2, 1, timeout_s=1)


def test_counts_that_differ_are_told_to_all(address):
  errors = _together(address, [(2, 0), (3, 1)])
  for error in errors:
    assert isinstance(error, ValueError)
    assert 'num_processes is 2 in process 0, but 3 in process 1' in str(error)


def test_processes_with_one_number_are_told(address):
  errors = _together(address, [(3, 0), (3, 1), (3, 1)])
  for error in errors:
    assert isinstance(error, ValueError)
    assert 'two processes have process_id 1' in str(error)


def test_what_is_no_process_does_not_take_a_place(address):
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    zero = pool.submit(roll_call.roll_call, address, 2, 0, 1.0)
    host, port = address.split(':')
    while not zero.done():
      try:
        socket.create_connection((host, int(port))).close()
        break
      except ConnectionRefusedError:
        time.sleep(0.01)
    else:
      pytest.fail('the roll call was never open')
    assert isinstance(zero.exception(), TimeoutError)


@pytest.mark.parametrize(
  'given, message',
  [
    (('nowhere', 2, 1), "host:port, got 'nowhere'"),
    (('nowhere:1', 2, 2), 'process_id must be .*, got 2 of 2'),
    (('nowhere:1', 2, None), 'go together'),
  ],
)
def test_initialization_names_what_it_cannot_use(given, message):
  with pytest.raises(ValueError, match=message):
    distributed.initialize(*given, timeout_s=1)


def test_rows_of_a_batch_lie_along_data_and_are_whole_along_tasks():
  mesh = distributed.make_mesh(task_devices=4)
  assert dict(mesh.shape) == {'data': 2, 'task': 4}
  rows = np.arange(12).reshape(6, 2)
  placed = distributed.put_batch({'image': rows}, mesh)['image']
  for shard in placed.addressable_shards:
    part = int(np.argwhere(mesh.devices == shard.device)[0][0])
    np.testing.assert_array_equal(shard.data, rows[3 * part : 3 * part + 3])
  distributed.check_batch_size(6, mesh)
  with pytest.raises(ValueError, match=r'multiple of 4 \(2 devices x 2'):
    distributed.check_batch_size(6, mesh, micro_batches=2)


@pytest.mark.parametrize('task_devices', [0, 3, 16])
def test_task_devices_must_divide_the_devices(task_devices):
  with pytest.raises(ValueError, match=f'got {task_devices} for 8 devices'):
    distributed.make_mesh(task_devices=task_devices)


def test_tasks_cannot_be_shared_out_over_processes():
  def device(i):
    return types.SimpleNamespace(process_index=i // 2, id=i)

  devices = [device(i) for i in range(4)]
  with pytest.raises(ValueError, match=r'by process \[2, 2\]'):
    distributed.make_mesh(devices, task_devices=4)


def test_the_batch_of_a_mesh_without_tasks_is_cut_over_all_devices():
  mesh = distributed.make_mesh()
  assert mesh.axis_names == ('data',)
  placed = distributed.put_batch(np.zeros((8, 2)), mesh)
  assert placed.sharding.shard_shape(placed.shape) == (1, 2)
  assert jax.device_count() == 8
