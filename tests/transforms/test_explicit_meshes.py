"""On meshes with explicit axes an update is what it is on one device."""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest
import quick_compile

import mtl_jax

NAMES = ('a', 'b')
MESH = ((2, 2), ('rows', 'tasks'))


def _normal(*shape):
  return np.random.default_rng(len(shape)).normal(size=shape).astype('f')


PARAMS = {
  'shared': {'w': _normal(8, 6), 'v': _normal(4)},
  'heads': {task: _normal(4, 2) for task in NAMES},
}
GRADS = {
  'shared': {'w': _normal(2, 8, 6), 'v': _normal(2, 4)},
  'heads': PARAMS['heads'],
}
# A map from the Gram matrix, one that tracks gradients, one that looks at
# coordinates, and one that keeps weights from update to update.
AGGREGATORS = {
  'cagrad': mtl_jax.cagrad,
  'moco': mtl_jax.moco,
  'graddrop': mtl_jax.graddrop,
  'every': lambda: mtl_jax.every(2, mtl_jax.mgda(), num_tasks=2),
  'per_group': lambda: mtl_jax.per_group(mtl_jax.mgda(), 'leaf'),
}


def _updates(tx):
  """Two updates in a row, which a scan makes only of states of one type."""

  def grad_fn(own):
    return jax.tree.map(lambda x: jnp.sin(3 * x), own)

  def run(grads, params, losses, active):
    def step(state, _):
      updates, state = tx.update(
        grads, state, params, losses=losses, active=active, grad_fn=grad_fn
      )
      return state, updates

    return jax.lax.scan(step, tx.init(params), None, length=2)[1]

  return run


def _put(mesh, tree, tasks):
  """First parameter axes over 'rows', and task axes over `tasks`."""

  def put(path, leaf):
    is_stack = tree is GRADS and path[0].key == 'shared'
    spec = P(tasks, 'rows') if is_stack else P('rows')
    return jax.device_put(leaf, NamedSharding(mesh, spec))

  return jax.tree_util.tree_map_with_path(put, tree)


@pytest.mark.parametrize('make', AGGREGATORS.values(), ids=AGGREGATORS)
def test_explicit_axes_change_neither_updates_nor_types(make):
  given = np.array([1.0, 2.0], np.float32), np.array([True, True])
  mesh = jax.make_mesh(*MESH, axis_types=(AxisType.Explicit,) * 2)

  def run(grads, params, losses, active):
    return [
      _updates(tx)(grads, params, losses, active)
      for tx in (
        mtl_jax.shared_only(make(), NAMES),
        mtl_jax.flat_minima(make(), NAMES, 0.1, adaptive=True),
      )
    ]

  expected = quick_compile.jit(run)(GRADS, PARAMS, *given)
  with jax.set_mesh(mesh):
    params = _put(mesh, PARAMS, None)
    vectors = [
      jax.device_put(x, NamedSharding(mesh, P('tasks'))) for x in given
    ]
    found = quick_compile.jit(run)(_put(mesh, GRADS, 'tasks'), params, *vectors)
  for updates in found:
    # After the axis of the scan.
    assert jax.typeof(updates['shared']['w']).sharding.spec[1] == 'rows'
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    found,
    expected,
  )
