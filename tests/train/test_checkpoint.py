"""What is saved comes back, and damage is noticed."""

import logging
import pathlib
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.train import checkpoint
from mtl_jax.train import distributed
from mtl_jax.train import sharding
from mtl_jax.train import step as steps


class _State(NamedTuple):
  params: Any
  key: jax.Array
  count: jax.Array


@pytest.fixture(scope='module')
def mesh():
  return distributed.make_mesh()


def _state(mesh, seed):
  rng = np.random.default_rng(seed)
  state = _State(
    params={
      'shared': {'w': jnp.asarray(rng.normal(size=(400, 30)), jnp.float32)},
      'heads': {'a': jnp.asarray(rng.normal(size=3), jnp.bfloat16)},
      'none': None,
    },
    key=jax.random.key(seed),
    count=jnp.int32(seed),
  )
  return jax.device_put(state, distributed.replicated(mesh))


def _same(a, b):
  raw = lambda x: (
    jax.random.key_data(x)
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
    else x
  )
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert x.dtype == y.dtype
    assert x.sharding == y.sharding
    np.testing.assert_array_equal(raw(x), raw(y))


def _save(workdir, mesh, steps, keep=3):
  checkpoints = checkpoint.Checkpoints(workdir, keep=keep)
  for step in steps:
    checkpoints.save(step, _state(mesh, step), {'wall_time': step / 3})
  checkpoints.close()


def _restore(workdir, template):
  checkpoints = checkpoint.Checkpoints(workdir)
  try:
    return checkpoints.restore(template)
  finally:
    checkpoints.close()


def _arrays_file(workdir, step):
  """The file that holds the arrays' bytes."""
  files = (workdir / 'checkpoints' / str(step)).rglob('d/*')
  return max(files, key=lambda path: path.stat().st_size)


def _flip_a_bit(path: pathlib.Path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


def test_state_comes_back_bit_for_bit_with_keys_and_shardings(tmp_path, mesh):
  _save(tmp_path, mesh, [7])
  state, info = _restore(tmp_path, _state(mesh, 0))
  _same(state, _state(mesh, 7))
  assert info == {'wall_time': 7 / 3}


def test_there_is_nothing_to_restore_in_an_empty_folder(tmp_path, mesh):
  assert _restore(tmp_path, _state(mesh, 0)) is None


def test_only_the_newest_are_kept(tmp_path, mesh):
  _save(tmp_path, mesh, [1, 2, 3, 4], keep=2)
  names = {path.name for path in (tmp_path / 'checkpoints').iterdir()}
  assert names == {'3', '4'}


def test_state_may_be_donated_while_its_checkpoint_is_written(tmp_path, mesh):
  step = jax.jit(
    lambda s: s._replace(params=jax.tree.map(lambda x: x + 1, s.params)),
    donate_argnums=0,
  )
  state = _state(mesh, 5)
  checkpoints = checkpoint.Checkpoints(tmp_path)
  checkpoints.save(5, state, {})
  for _ in range(20):
    state = step(state)
  checkpoints.close()
  restored, _ = _restore(tmp_path, _state(mesh, 0))
  _same(restored, _state(mesh, 5))


def _layout(mesh, place):
  """The same state on other devices, cut as if all its arrays were long."""
  layout = sharding.Layout(mesh, ('a',), place, min_size=8)

  def put(state):
    train = steps.TrainState(0, state.params, {}, {}, state)
    return jax.device_put(state, layout.of_state(train).opt_state)

  return put


@pytest.mark.parametrize(
  'written, read',
  [
    ((8, 'sharded'), (8, 'replicated')),
    ((8, 'replicated'), (8, 'sharded')),
    ((8, 'sharded'), (1, 'replicated')),
    ((1, 'replicated'), (8, 'sharded')),
    ((8, 'sharded'), (4, 'sharded')),
  ],
)
def test_state_comes_back_on_another_topology(tmp_path, mesh, written, read):
  def lay(state, devices, parameters):
    mesh = distributed.make_mesh(jax.devices()[:devices])
    return _layout(mesh, parameters)(jax.device_get(state))

  before = lay(_state(mesh, 3), *written)
  w = before.params['shared']['w']
  assert w.is_fully_replicated == (written[1] == 'replicated')
  checkpoints = checkpoint.Checkpoints(tmp_path)
  checkpoints.save(3, before, {})
  checkpoints.close()
  template = lay(_state(mesh, 0), *read)
  restored, _ = _restore(tmp_path, template)
  _same(restored, lay(_state(mesh, 3), *read))


@pytest.mark.parametrize('dtype', [np.float32, np.int8, jnp.bfloat16, bool])
@pytest.mark.parametrize('axis', [0, 1, 2])
def test_checksum_is_of_the_entries_and_their_places_alone(axis, dtype):
  x = np.random.default_rng(0).integers(0, 2, (4, 8, 4)).astype(dtype)
  spec = [None, None, None]
  spec[axis] = ('data', 'task') if axis == 1 else 'data'
  mesh = distributed.make_mesh(task_devices=2)
  place = jax.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
  of = lambda x, sharding: checkpoint.checksums(
    {'x': jax.device_put(x, sharding)}
  )['x']
  whole = of(x, distributed.replicated(mesh))
  assert of(x, place) == whole
  other = x.copy()
  other[3, 5, 2] = 1 - other[3, 5, 2]
  assert of(other, place) == of(other, distributed.replicated(mesh)) != whole
  assert of(x[:, ::-1], place) != whole


def test_damage_to_a_sharded_array_is_noticed(tmp_path, mesh):
  lay = _layout(mesh, 'sharded')
  checkpoints = checkpoint.Checkpoints(tmp_path)
  checkpoints.save(1, lay(_state(mesh, 1)), {})
  checkpoints.close()
  _flip_a_bit(_arrays_file(tmp_path, 1))
  with pytest.raises(ValueError, match='wrong checksum of params/shared/w'):
    _restore(tmp_path, lay(_state(mesh, 0)))


# TensorStore's threads outlive a read that failed.
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
@pytest.mark.parametrize(
  'damage',
  [
    lambda workdir: _flip_a_bit(_arrays_file(workdir, 2)),
    lambda workdir: _arrays_file(workdir, 2).write_bytes(b''),
    lambda workdir: _arrays_file(workdir, 2).unlink(),
    lambda workdir: (workdir / 'checkpoints/2/arrays/_METADATA').write_text(
      '{'
    ),
    lambda workdir: (workdir / 'checkpoints/2/info/metadata').write_text('{'),
  ],
  ids=['bit', 'empty', 'gone', 'metadata', 'info'],
)
def test_damaged_last_checkpoint_falls_back_to_the_one_before_and_says_so(
  tmp_path, mesh, caplog, damage
):
  _save(tmp_path, mesh, [1, 2])
  damage(tmp_path)
  with caplog.at_level(logging.WARNING, 'mtl_jax'):
    state, _ = _restore(tmp_path, _state(mesh, 0))
  _same(state, _state(mesh, 1))
  (message,) = [r.getMessage() for r in caplog.records if 'mtl_jax' in r.name]
  assert 'step 2 cannot be read' in message
  assert 'step 1 is used' in message
  assert (tmp_path / 'damaged_checkpoints' / '2').is_dir()
  _save(tmp_path, mesh, [2])
  _same(_restore(tmp_path, _state(mesh, 0))[0], _state(mesh, 2))


def test_error_when_all_are_damaged_names_each_and_leaves_them(tmp_path, mesh):
  _save(tmp_path, mesh, [1, 2])
  for step in (1, 2):
    _flip_a_bit(_arrays_file(tmp_path, step))
  with pytest.raises(
    ValueError,
    match=r'none of.*\n  2: OSError: wrong checksum of params/shared/w\n  1: ',
  ):
    _restore(tmp_path, _state(mesh, 0))
  assert (tmp_path / 'checkpoints' / '2').is_dir()


def test_error_for_another_structure_names_array_and_shapes(tmp_path, mesh):
  _save(tmp_path, mesh, [1, 2])
  other = _state(mesh, 0)
  params = {
    **other.params,
    'shared': {'w': jnp.zeros((5, 3))},
    'new': other.key,
  }
  with pytest.raises(
    ValueError,
    match=r'params/new is missing; params/shared/w is float32\[400,30\], '
    r'expected float32\[5,3\]',
  ):
    _restore(tmp_path, other._replace(params=params))


def test_keep_must_be_positive(tmp_path):
  with pytest.raises(ValueError, match='keep must be positive, got 0'):
    checkpoint.Checkpoints(tmp_path, keep=0)
