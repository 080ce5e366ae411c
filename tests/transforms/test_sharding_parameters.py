"""Parameters in shards: every device updates its own as if it had them all."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest
import quadratics
import quick_compile

import mtl_jax

DEVICES = 8
NAMES = ('shape', 'colour', 'depth')
# A method that draws a number for each coordinate draws it in every shard.
METHODS = {
  m.name: m
  for m in quadratics.FACTORIES
  if not (m.random and m.weights == 'none')
}


def labels(params):
  found = mtl_jax.default_labels(params)
  found['shared']['frozen'] = 'frozen'
  return found


def flat(method, **options):
  return mtl_jax.flat_minima(
    method, NAMES, rho=0.3, rho_heads=0.6, param_labels=labels, **options
  )


KINDS = {
  'plain': lambda method: mtl_jax.shared_only(
    method, NAMES, param_labels=labels
  ),
  'flat': flat,
  'flat asam': functools.partial(flat, norm='joint', adaptive=True),
}
FLAT = ('linear', 'mgda', 'pcgrad', 'cagrad_0.1', 'upgrad', 'moco')
CASES = [
  *((name, 'plain') for name in METHODS),
  *((name, 'flat') for name in METHODS if name in FLAT),
  ('linear', 'flat asam'),
]


def make():
  """Parameters, and curvatures and centres laid out like task gradients.

  Task i has the loss 1/2 sum a_i (x - c_i)^2 over all its numbers x, whose
  gradient in a shard needs no other shard.
  """
  rng = np.random.default_rng(0)
  params = {
    'shared': {'kernel': (16, 3), 'bias': (8,), 'frozen': (8,)},
    'heads': {task: (8,) for task in NAMES},
  }
  is_shape = lambda x: isinstance(x, tuple)
  draw = lambda shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
  rows = lambda shape: (len(NAMES), *shape)
  stacked = {
    'shared': {
      'kernel': rows((16, 3)),
      'bias': rows((8,)),
      'frozen': (8,),
    },
    'heads': params['heads'],
  }
  curvatures = jax.tree.map(
    lambda shape: jnp.abs(draw(shape)), stacked, is_leaf=is_shape
  )
  centres = jax.tree.map(draw, stacked, is_leaf=is_shape)
  return jax.tree.map(draw, params, is_leaf=is_shape), (curvatures, centres)


PARAMS, PROBLEM = make()


def grad_fn(problem, task_params):
  gradient = lambda a, c, x: a * (x - c)
  return jax.tree.map(gradient, *problem, task_params)


def step(params, problem, **axes):
  """Updates and what the state shows, of every case."""
  stack = lambda leaf: jnp.stack([leaf] * len(NAMES))
  shared = {
    name: leaf if name == 'frozen' else stack(leaf)
    for name, leaf in params['shared'].items()
  }
  task_grads = grad_fn(problem, {**params, 'shared': shared})
  found = {}
  for name, kind in CASES:
    tx = KINDS[kind](
      METHODS[name].make_alone(range(len(NAMES)), num_tasks=len(NAMES), **axes)
    )
    updates, state = tx.update(
      task_grads,
      tx.init(params),
      params,
      losses=jnp.array([1.0, 2.0, 3.0]),
      grad_fn=functools.partial(grad_fn, problem),
    )
    found[f'{name} {kind}'] = updates, mtl_jax.diagnostics(state)
  return found


def specs():
  """How parameters, and what is laid out like task gradients, are sharded."""
  of_params = jax.tree.map(lambda _: P('model'), PARAMS)
  of_rows = jax.tree.map(
    lambda p, a: P('model') if p.ndim == a.ndim else P(None, 'model'),
    PARAMS,
    PROBLEM[0],
  )
  return of_params, (of_rows, of_rows)


@functools.cache
def results(place):
  if place == 'one device':
    return jax.tree.map(np.asarray, quick_compile.jit(step)(PARAMS, PROBLEM))
  mesh = jax.make_mesh(
    (DEVICES,), ('model',), axis_types=(jax.sharding.AxisType.Auto,)
  )
  mapped = jax.shard_map(
    functools.partial(step, shard_axis='model'),
    mesh=mesh,
    in_specs=specs(),
    # The first of each pair are updates, the second replicated numbers.
    out_specs={f'{n} {k}': (P('model'), P()) for n, k in CASES},
    check_vma=place == 'with check_vma',
  )
  return jax.tree.map(np.asarray, quick_compile.jit(mapped)(PARAMS, PROBLEM))


@pytest.mark.parametrize('place', ['without check_vma', 'with check_vma'])
def test_shards_are_updated_as_if_they_were_together(place):
  assert len(results(place)) == len(CASES)
  for case, (updates, shown) in results(place).items():
    expected, right = results('one device')[case]
    jax.tree.map(
      lambda a, b, case=case: np.testing.assert_allclose(
        a, b, atol=1e-4 * np.linalg.norm(b), err_msg=case
      ),
      updates,
      expected,
    )
    grams = [key for key in right if key.endswith('gram')]
    assert grams
    for key in grams:
      np.testing.assert_allclose(
        shown[key], right[key], rtol=1e-3, atol=1e-4, err_msg=case
      )


@pytest.mark.parametrize('check_vma', [False, True])
def test_replicas_and_shards_may_be_had_together(check_vma):
  """Four shards, each on two replicas with a part of the batch each."""
  centres = jnp.asarray(
    np.random.default_rng(1).standard_normal((6, 2, 8)), jnp.float32
  )
  theta = jnp.linspace(-1, 1, 8)

  def update(theta, centres, **axes):
    task_grads_at = lambda rows: jnp.mean(rows[None] - centres, axis=0)
    tx = mtl_jax.flat_minima(mtl_jax.mgda(**axes), ('a', 'b'), rho=0.5)
    return tx.update(
      task_grads_at(jnp.stack([theta, theta])),
      tx.init(theta),
      theta,
      grad_fn=task_grads_at,
    )[0]

  mesh = jax.make_mesh(
    (2, 4), ('data', 'model'), axis_types=(jax.sharding.AxisType.Auto,) * 2
  )
  mapped = jax.shard_map(
    functools.partial(update, axis_name='data', shard_axis='model'),
    mesh=mesh,
    in_specs=(P('model'), P('data', None, 'model')),
    out_specs=P('model'),
    check_vma=check_vma,
  )
  np.testing.assert_allclose(
    quick_compile.jit(mapped)(theta, centres),
    update(theta, centres),
    rtol=1e-4,
    atol=1e-5,
  )
