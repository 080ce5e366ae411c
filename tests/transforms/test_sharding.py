"""Eight devices with a part of the batch each give the update of one device."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import methods
import numpy as np
import processes
import pytest
import quadratics
import quick_compile

import mtl_jax
from mtl_jax.train import distributed
from mtl_jax.train import sharding

DEVICES = 8
ROWS = 2 * DEVICES
NAMES = ('shape', 'colour', 'absent', 'depth')
INPUTS = HIDDEN = 8

# All methods go into one program a place, for compiling it is what these tests
# cost.
NEEDING_LOSSES = [m for m in methods.METHODS if m.needs_losses][:1]
METHODS = {m.name: m for m in (*quadratics.FACTORIES, *NEEDING_LOSSES)}


def flat(method, **options):
  return mtl_jax.flat_minima(method, NAMES, rho=0.3, rho_heads=0.6, **options)


# What is made of a method; the axes are told to the method alone.
KINDS = {
  'plain': lambda method: mtl_jax.shared_only(method, NAMES),
  'flat': flat,
  'flat asam': functools.partial(
    flat, norm='joint', adaptive=True, combine='direct'
  ),
}
# What is inside `flat_minima` changes nothing of how it meets devices.
FLAT = ('linear', 'mgda', 'pcgrad', 'cagrad_0.1', 'upgrad', 'graddrop', 'moco')
# A method sees what its replicas have brought together: in most places one of
# each kind will do (in closed form, with a solver, with draws, of coordinates,
# with memory, with further batches, with losses).
KINDS_OF_METHODS = (
  'linear',
  'mgda',
  'pcgrad',
  'graddrop',
  'moco',
  'modo',
  'weighted_dwa',
  *(m.name for m in NEEDING_LOSSES),
)
FEW = [
  *((name, 'plain') for name in KINDS_OF_METHODS),
  *((name, 'flat') for name in ('linear', 'mgda', 'pcgrad', 'moco')),
  ('linear', 'flat asam'),
]
CASES = [
  *((name, 'plain') for name in METHODS),
  *((name, 'flat') for name in METHODS if name in FLAT),
  ('linear', 'flat asam'),
]


def make():
  """Parameters, and a batch in which every device has as many labels."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
  params = {
    'shared': {'kernel': draw(INPUTS, HIDDEN), 'bias': draw(1, HIDDEN)},
    'heads': {task: draw(HIDDEN) for task in NAMES},
  }
  every_other = jnp.tile(jnp.array([0.0, 1.0]), DEVICES)
  mask = dict.fromkeys(NAMES, jnp.ones(ROWS))
  mask |= {'colour': every_other, 'absent': jnp.zeros(ROWS)}
  batch = {
    'image': draw(ROWS, INPUTS),
    'labels': {task: draw(ROWS) for task in NAMES},
    'mask': mask,
  }
  return params, batch


PARAMS, BATCH = make()


def step(
  params,
  batch,
  *,
  cases=tuple(FEW),
  mark=lambda params: params,
  layout=None,
  **axes,
):
  """Updates and what the state shows, of every case.

  Args:
    params: replicated.
    batch: the rows of this replica, or all of them.
    cases: pairs of a method and a kind.
    mark: what is done to the parameters before they are differentiated.
    layout: as in `mtl_jax.train.step.make_train_step`.
    **axes: of the method.
  """
  counts = {task: jnp.sum(mask) for task, mask in batch['mask'].items()}
  axis = axes.get('axis_name')
  everywhere = counts if axis is None else jax.lax.psum(counts, axis)
  # Sums of replicas make a mean where each divides by all labels.
  divisors = everywhere if axes.get('reduce') == 'sum' else counts

  def loss_fn(params, batch):
    if layout is not None:
      params = layout.gather(params)
    hidden = jnp.tanh(
      batch['image'] @ params['shared']['kernel'] + params['shared']['bias']
    )
    return {
      task: jnp.sum(
        batch['mask'][task]
        * (hidden @ params['heads'][task] - batch['labels'][task]) ** 2
      )
      / jnp.maximum(divisors[task], 1)
      for task in NAMES
    }

  fns = mtl_jax.task_grad(
    loss_fn,
    NAMES,
    engine='unroll' if layout is None else 'vmap',
  )
  at, at_each = fns if layout is None else layout.task_grad(fns)
  (losses, _), task_grads = at(mark(params), batch)
  active = jnp.stack([everywhere[task] for task in NAMES]) > 0
  found = {}
  for name, kind in cases:
    method = METHODS[name].make_alone(
      range(len(NAMES)), num_tasks=len(NAMES), **axes
    )
    tx = KINDS[kind](method)
    updates, state = tx.update(
      task_grads,
      tx.init(params),
      params,
      losses=losses,
      active=active,
      grad_fn=lambda own: at_each(own, batch)[1],
    )
    found[f'{name} {kind}'] = updates, mtl_jax.diagnostics(state)
  return found


def mesh(names=('batch',), shape=(DEVICES,)):
  auto = (jax.sharding.AxisType.Auto,) * len(names)
  return jax.make_mesh(shape, names, axis_types=auto)


# Here every method has its turn: a program of its own for one device,
# partitioned by XLA, and typed by what varies from device to device.
every = functools.partial(step, cases=tuple(CASES))


def on_one_device():
  return quick_compile.jit(every)(PARAMS, BATCH)


def with_plain_jit():
  put = lambda tree, spec: jax.device_put(tree, jax.NamedSharding(mesh(), spec))
  return quick_compile.jit(step)(put(PARAMS, P()), put(BATCH, P('batch')))


def with_sharded_parameters():
  """Parameters and batch along one axis, as in FSDP, and nothing else told."""
  put = lambda x, spec: jax.device_put(x, jax.NamedSharding(mesh(), spec))
  last = lambda x: put(x, P(*[None] * (x.ndim - 1), 'batch'))
  return quick_compile.jit(every)(
    jax.tree.map(last, PARAMS), put(BATCH, P('batch'))
  )


def with_layout(batch=BATCH):
  """As training does it: parameters in shards, two devices to share out tasks.

  Either of these alone is tested with training's step.

  Args:
    batch: the rows of this process.
  """
  mesh = distributed.make_mesh(task_devices=2)
  layout = sharding.Layout(mesh, NAMES, 'sharded', min_size=1)
  return quick_compile.jit(
    functools.partial(step, layout=layout),
    out_shardings=distributed.replicated(mesh),
  )(
    jax.device_put(jax.tree.map(np.asarray, PARAMS), layout.of_params(PARAMS)),
    distributed.put_batch(jax.tree.map(np.asarray, batch), mesh),
  )


def with_shard_map(*, check_vma, reduce, step=step):
  vary = lambda params: jax.lax.pcast(params, 'batch', to='varying')
  mapped = jax.shard_map(
    functools.partial(
      step,
      mark=vary if check_vma else lambda params: params,
      axis_name='batch',
      reduce=reduce,
    ),
    mesh=mesh(),
    in_specs=(P(), P('batch')),
    out_specs=P(),
    check_vma=check_vma,
  )
  return quick_compile.jit(mapped)(PARAMS, BATCH)


def with_pmap():
  mapped = jax.pmap(
    functools.partial(step, axis_name='batch'),
    axis_name='batch',
    in_axes=(None, 0),
  )
  found = mapped(
    PARAMS,
    jax.tree.map(lambda x: x.reshape(DEVICES, -1, *x.shape[1:]), BATCH),
  )
  # The replicas stay together.
  jax.tree.map(
    lambda x: np.testing.assert_array_equal(x, np.stack([x[0]] * DEVICES)),
    found,
  )
  return jax.tree.map(lambda x: x[0], found)


PLACES = {
  'one device': on_one_device,
  'jit': with_plain_jit,
  'jit, sharded parameters': with_sharded_parameters,
  'jit, sharded parameters and tasks': with_layout,
  'shard_map, mean': functools.partial(
    with_shard_map, check_vma=False, reduce='mean'
  ),
  'shard_map, sum': functools.partial(
    with_shard_map, check_vma=False, reduce='sum'
  ),
  'shard_map with check_vma, mean': functools.partial(
    with_shard_map, check_vma=True, reduce='mean', step=every
  ),
  'shard_map with check_vma, sum': functools.partial(
    with_shard_map, check_vma=True, reduce='sum'
  ),
  'pmap': with_pmap,
}


@functools.cache
def results(place):
  return jax.tree.map(np.asarray, PLACES[place]())


def assert_trees_close(actual, expected, tolerance=1e-4, what=''):
  """Every leaf within a share of its own length."""
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      a, b, atol=tolerance * np.linalg.norm(b) + 1e-7, err_msg=what
    ),
    actual,
    expected,
  )


EVERY_METHOD = (
  'jit, sharded parameters',
  'shard_map with check_vma, mean',
)


@pytest.mark.parametrize('place', list(PLACES)[1:])
def test_update_is_that_of_one_device_with_the_whole_batch(place):
  found = results(place)
  assert len(found) == len(CASES if place in EVERY_METHOD else FEW)
  for case, (updates, shown) in found.items():
    expected, right = results('one device')[case]
    assert_trees_close(updates, expected, what=case)
    # They would tell a gradient that was summed and not averaged.
    grams = [key for key in right if key.endswith('gram')]
    assert grams
    for key in grams:
      assert_trees_close(shown[key], right[key], 1e-3, case)


_PROCESS = """
import sys
import jax
import numpy as np
from mtl_jax.train import distributed

address, process, out = sys.argv[1:]
distributed.initialize(address, 2, int(process), timeout_s=100)
sys.path[:0] = ['tests', 'tests/transforms']
import test_sharding as test

assert (jax.process_count(), jax.device_count()) == (2, 4)
rows = np.arange(test.ROWS).reshape(2, -1)[int(process)]
found = test.with_layout(jax.tree.map(lambda x: x[rows], test.BATCH))
np.savez(out, *map(np.asarray, jax.tree.leaves(found)))
"""


# `with_layout` in one process would fail with it.
@pytest.mark.slow
def test_two_processes_of_two_devices_give_the_updates_of_one_device(tmp_path):
  for status, error in processes.run_two(
    lambda address, i: (
      *('-c', _PROCESS),
      *(address, str(i), str(tmp_path / f'{i}.npz')),
    )
  ):
    assert status == 0, error
  expected = {
    f'{name} {kind}': results('one device')[f'{name} {kind}']
    for name, kind in FEW
  }
  for i in range(2):
    with np.load(tmp_path / f'{i}.npz') as file:
      leaves = [file[name] for name in file.files]
    found = jax.tree.unflatten(jax.tree.structure(expected), leaves)
    for case, (updates, _) in expected.items():
      assert_trees_close(found[case][0], updates)


def linear_step(params, batch, *, kind, marked):
  """The update of equal weights inside shard_map, from marked parameters."""
  loss_fn = lambda params, x: dict.fromkeys(NAMES, jnp.mean(x @ params))
  at, at_each = mtl_jax.task_grad(loss_fn, NAMES)
  tx = KINDS[kind](mtl_jax.linear(axis_name='batch'))
  local = jax.lax.pcast(params, 'batch', to='varying') if marked else params
  _, task_grads = at(local, batch)
  updates, _ = tx.update(
    task_grads,
    tx.init(params),
    params,
    grad_fn=lambda own: at_each(own, batch)[1],
  )
  return updates


def run_linear_step(**options):
  x = jnp.arange(2.0 * DEVICES).reshape(DEVICES, 2)
  mapped = jax.shard_map(
    functools.partial(linear_step, **options),
    mesh=mesh(),
    in_specs=(P(), P('batch')),
    out_specs=P(),
  )
  return quick_compile.jit(mapped)(jnp.ones(2), x), jnp.mean(x, axis=0)


@pytest.mark.parametrize('kind', ['plain', 'flat'])
def test_gradients_of_replicated_parameters_are_refused(kind):
  """They are summed over devices already, and no mean can undo that."""
  with pytest.raises(ValueError, match=r"does not vary over axis_name='batch'"):
    run_linear_step(kind=kind, marked=False)


@pytest.mark.parametrize('kind', ['plain', 'flat'])
def test_gradients_of_marked_parameters_are_averaged_once(kind):
  updates, expected = run_linear_step(kind=kind, marked=True)
  np.testing.assert_allclose(updates, expected, rtol=1e-6)


@pytest.mark.parametrize('shape', [(2, 4), (1, 8)])
@pytest.mark.parametrize('check_vma', [False, True])
def test_replicas_may_lie_along_two_axes(check_vma, shape):
  axes = ('host', 'device')
  x = jnp.arange(2.0 * DEVICES).reshape(DEVICES, 2)

  def mapped(params, x):
    if check_vma:
      params_here = jax.lax.pcast(params, axes, to='varying')
    else:
      params_here = params
    loss_fn = lambda params, x: {'a': jnp.mean((x @ params) ** 2)}
    at, at_each = mtl_jax.task_grad(loss_fn, ('a',))
    tx = mtl_jax.flat_minima(mtl_jax.linear(axis_name=axes), ('a',), rho=0.5)
    return tx.update(
      at(params_here, x)[1],
      tx.init(params),
      params,
      grad_fn=lambda own: at_each(own, x)[1],
    )[0]

  updates = quick_compile.jit(
    jax.shard_map(
      mapped,
      mesh=mesh(axes, shape),
      in_specs=(P(), P(axes)),
      out_specs=P(),
      check_vma=check_vma,
    )
  )(jnp.ones(2), x)
  second = 2 * np.asarray(x).T @ np.asarray(x) / DEVICES
  g = second @ np.ones(2)
  sam = second @ (np.ones(2) + 0.5 * g / np.linalg.norm(g))
  np.testing.assert_allclose(updates, sam, rtol=1e-5)
