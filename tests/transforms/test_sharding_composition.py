"""What is made of several parts gives, on many devices, the update of one."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest
import quick_compile

import mtl_jax

DEVICES = 8
ROWS = 2 * DEVICES
NAMES = ('shape', 'colour', 'depth')
# Of the batch itself, and of two further ones for methods that need them.
BATCHES = 3
STEPS = 2

# Steps of the weights that are long enough to tell whose gradients they saw.
WITH_EXTRA_GRADS = {
  'modo': functools.partial(mtl_jax.modo, gamma=0.5),
  'sdmgrad': functools.partial(mtl_jax.sdmgrad, inner_steps=5),
}
WRAPPED = {
  'every': lambda **axes: mtl_jax.every(2, mtl_jax.mgda(**axes)),
  'per_group': lambda **axes: mtl_jax.per_group(mtl_jax.mgda(**axes), 'leaf'),
  'cr_mogm': lambda **axes: mtl_jax.cr_mogm(mtl_jax.mgda(**axes)),
}
METHODS = WITH_EXTRA_GRADS | WRAPPED
KINDS = {
  'plain': lambda method: mtl_jax.shared_only(method, NAMES),
  'flat': lambda method: mtl_jax.flat_minima(
    method, NAMES, rho=0.3, rho_heads=0.6
  ),
}


def make():
  """Parameters, and curvatures and centres of losses.

  Task i has the loss 1/2 sum a_i (x - c_i)^2 over all its numbers x in each row
  of each batch, with other a_i and c_i everywhere.

  Returns:
    params, and a pair of trees of leaves [ROWS, BATCHES, *shape], where shape
    is that of task gradients.
  """
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
  shapes = {'kernel': (8, 2), 'bias': (8,)}

  def tree(*lead):
    rows = lead and (*lead, len(NAMES))
    return {
      'shared': {name: draw(*rows, *shape) for name, shape in shapes.items()},
      'heads': {task: draw(*lead, 8) for task in NAMES},
    }

  lead = ROWS, BATCHES
  return tree(), (jax.tree.map(jnp.abs, tree(*lead)), tree(*lead))


PARAMS, PROBLEM = make()


def gradients(problem, task_params):
  """A stack of task gradients of every batch, means over the rows at hand."""
  gradient = lambda a, c, x: jnp.mean(a * (x[None, None] - c), axis=0)
  found = jax.tree.map(gradient, *problem, task_params)
  return [jax.tree.map(lambda g, i=i: g[i], found) for i in range(BATCHES)]


def task_params_of(params):
  stack = lambda leaf: jnp.stack([leaf] * len(NAMES))
  return params | {'shared': jax.tree.map(stack, params['shared'])}


# All of them go into one program a place.
CASES = [(name, kind) for name in METHODS for kind in KINDS]


def steps(params, problem, *, cases=tuple(CASES), **axes):
  """The updates in `STEPS` steps of descent, by case."""
  found = {f'{name} {kind}': [] for name, kind in cases}
  for name, kind in cases:
    updates_of_kind = found[f'{name} {kind}']
    method = METHODS[name](**axes)
    tx, at = KINDS[kind](method), params
    state = tx.init(params)
    for _ in range(STEPS):
      stacks = gradients(problem, task_params_of(at))
      updates, state = tx.update(
        stacks[0],
        state,
        at,
        grad_fn=lambda own: gradients(problem, own)[0],
        extra_grads=tuple(stacks[1:][: tx.extra_batches]),
        extra_grad_fn=lambda own, number=tx.extra_batches: tuple(
          gradients(problem, own)[1:][:number]
        ),
      )
      updates_of_kind.append(updates)
      at = jax.tree.map(lambda x, u: x - 0.5 * u, at, updates)
  return found


def mesh(axis):
  return jax.make_mesh(
    (DEVICES,), (axis,), axis_types=(jax.sharding.AxisType.Auto,)
  )


def on_one_device():
  return quick_compile.jit(steps)(PARAMS, PROBLEM)


def with_shard_map(*, check_vma):
  mapped = jax.shard_map(
    functools.partial(steps, axis_name='batch'),
    mesh=mesh('batch'),
    in_specs=(P(), P('batch')),
    out_specs=P(),
    check_vma=check_vma,
  )
  return quick_compile.jit(mapped)(PARAMS, PROBLEM)


def with_pmap():
  mapped = jax.pmap(
    functools.partial(steps, axis_name='batch'),
    axis_name='batch',
    in_axes=(None, 0),
  )
  parts = lambda x: x.reshape(DEVICES, -1, *x.shape[1:])
  found = mapped(PARAMS, jax.tree.map(parts, PROBLEM))
  # The replicas stay together.
  jax.tree.map(
    lambda x: np.testing.assert_array_equal(x, np.stack([x[0]] * DEVICES)),
    found,
  )
  return jax.tree.map(lambda x: x[0], found)


def with_shards(*, check_vma):
  """Every leaf in shards along the first axis of its parameter."""
  along = lambda p, a: P(*[None] * (a.ndim - p.ndim), 'model')
  of_problem = jax.tree.map(along, PARAMS, PROBLEM[0])
  mapped = jax.shard_map(
    functools.partial(
      steps,
      cases=[(name, 'plain') for name in WRAPPED],
      shard_axis='model',
    ),
    mesh=mesh('model'),
    in_specs=(P('model'), (of_problem, of_problem)),
    out_specs=P('model'),
    check_vma=check_vma,
  )
  return quick_compile.jit(mapped)(PARAMS, PROBLEM)


REPLICAS = {
  'shard_map': functools.partial(with_shard_map, check_vma=False),
  'shard_map with check_vma': functools.partial(with_shard_map, check_vma=True),
  'pmap': with_pmap,
}
SHARDS = {
  'shards': functools.partial(with_shards, check_vma=False),
  'shards with check_vma': functools.partial(with_shards, check_vma=True),
}
PLACES = {'one device': on_one_device} | REPLICAS | SHARDS


@functools.cache
def results(place):
  return jax.tree.map(np.asarray, PLACES[place]())


def assert_same_as_on_one_device(place, names, kinds):
  """Every leaf of both updates within a share of its own length."""
  for case in (f'{name} {kind}' for name in names for kind in kinds):
    jax.tree.map(
      lambda a, b, case=case: np.testing.assert_allclose(
        a, b, rtol=0, atol=1e-4 * np.linalg.norm(b), err_msg=case
      ),
      results(place)[case],
      results('one device')[case],
    )


@pytest.mark.parametrize('place', REPLICAS)
def test_extra_grads_of_replicas_are_averaged(place):
  assert_same_as_on_one_device(place, WITH_EXTRA_GRADS, KINDS)


@pytest.mark.parametrize('place', REPLICAS)
def test_wrapped_aggregator_averages_over_its_replicas(place):
  assert_same_as_on_one_device(place, WRAPPED, KINDS)


@pytest.mark.parametrize('place', SHARDS)
def test_wrapped_aggregator_sums_over_its_shards(place):
  assert_same_as_on_one_device(place, WRAPPED, ['plain'])
