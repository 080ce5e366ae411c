"""Parameters and tasks cut over a mesh: what lies where, and the same step."""

import functools

import digits
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import ml_collections
import numpy as np
import pytest
import quick_compile

from benchmarks import hlo_collectives
from configs import common
from configs import methods
from mtl_jax import gradients
from mtl_jax import transforms
from mtl_jax.train import build
from mtl_jax.train import distributed
from mtl_jax.train import experiment
from mtl_jax.train import sharding
from mtl_jax.train import step as steps

NAMES = ('b', 'a', 'd', 'c')


@functools.cache
def layout_of(parameters, task_devices, names=NAMES, min_size=1):
  mesh = distributed.make_mesh(task_devices=task_devices)
  return sharding.Layout(mesh, names, parameters, min_size=min_size)


def specs(tree):
  return jax.tree.map(lambda x: x.spec, tree)


def shape(*numbers):
  return jax.ShapeDtypeStruct(numbers, jnp.float32)


def test_a_leaf_is_cut_along_its_longest_axis_that_the_devices_divide():
  params = {
    'longest': shape(16, 3, 24),
    'first_of_two': shape(16, 16),
    'longest_that_divides': shape(30, 8),
    'none': shape(9, 9),
    'scalar': shape(),
  }
  assert specs(layout_of('sharded', 1).of_params(params)) == {
    'longest': P(None, None, ('data',)),
    'first_of_two': P(('data',), None),
    'longest_that_divides': P(None, ('data',)),
    'none': P(None, None),
    'scalar': P(),
  }


def test_a_short_leaf_stays_whole():
  params = {'short': shape(8, 2), 'long': shape(8, 4)}
  found = layout_of('sharded', 1, min_size=32).of_params(params)
  assert specs(found) == {'short': P(None, None), 'long': P(('data',), None)}


def test_stacks_in_a_state_are_cut_as_their_parameters_are():
  params = {'shared': {'w': shape(2, 8)}, 'heads': {n: shape(8) for n in NAMES}}
  state = steps.TrainState(
    step=shape(),
    params=params,
    model_state={'mean': shape(8)},
    joint={'stack': shape(4, 2, 8), 'gram': shape(4, 4)},
    opt_state=params,
  )
  found = specs(layout_of('sharded', 1).of_state(state))
  assert found.model_state == {'mean': P()}
  assert found.opt_state == found.params
  assert found.joint['stack'] == P(None, None, ('data',))
  assert found.joint['gram'] == P(None, None)
  # What updates parameters is cut among the devices that share out tasks too.
  both = ('data', 'task')
  found = specs(layout_of('sharded', 2).of_state(state))
  assert found.params['shared']['w'] == P(None, ('data',))
  assert found.opt_state['shared']['w'] == P(None, both)
  assert found.joint['stack'] == P(None, None, both)
  found = specs(layout_of('replicated', 2).of_state(state))
  assert found.params['shared']['w'] == P(None, None)
  assert found.opt_state['shared']['w'] == P(None, ('task',))


@pytest.mark.parametrize('engine', ['unroll', 'scan'])
def test_engines_that_take_tasks_in_turn_are_refused_where_tasks_are_cut(
  engine,
):
  with pytest.raises(
    ValueError, match=f"engine '{engine}' takes tasks in turn"
  ):
    layout_of('replicated', 2).engine(engine)
  assert layout_of('replicated', 2).engine('auto') == 'vmap'
  assert layout_of('replicated', 1).engine(engine) == engine


def test_task_devices_must_divide_the_tasks():
  mesh = distributed.make_mesh(task_devices=2)
  with pytest.raises(ValueError, match='got 2 for the 3 tasks'):
    sharding.Layout(mesh, ('a', 'b', 'c'))


@pytest.mark.parametrize(
  'key, value, message',
  [
    ('parameters', 'cut', "parallel.parameters must be one of .*, got 'cut'"),
    ('task_devices', 8, 'got 8 for the 2 tasks'),
    ('task_devices', 3, 'got 3 for 8 devices'),
    ('task_devices', 2, "engine 'unroll' takes tasks in turn"),
  ],
)
def test_values_of_a_config_that_do_not_fit_are_named(key, value, message):
  config = common.run_local(
    common.make_config(
      problem='multi_digits',
      method=methods.entry('linear', rho=0.1),
      model='mlp',
      model_kwargs={'widths': (4,)},
      seed=0,
    )
  )
  config.parallel[key] = value
  config.engine = 'unroll'
  with pytest.raises(ValueError, match=message):
    experiment.make_experiment(config)


# A loss whose cost is all in two matrices.
ROWS, WIDTH = 64, 256


def loss_fn(params, batch):
  first, second = params['shared']
  hidden = batch @ first @ second
  return {
    task: jnp.mean((hidden @ params['heads'][task]) ** 2) for task in NAMES
  }


def compiled(layout, flat, engine):
  """The compiled evaluation of task gradients, as training's step has it."""
  gathered = lambda params, batch: loss_fn(layout.gather(params), batch)
  fns = layout.task_grad(gradients.task_grad(gathered, NAMES, engine=engine))
  params = {
    'shared': [shape(WIDTH, WIDTH)] * 2,
    'heads': {task: shape(WIDTH) for task in NAMES},
  }
  shards = layout.of_params(params)
  if flat:
    row = lambda x: shape(len(NAMES), *x.shape)
    params['shared'] = jax.tree.map(row, params['shared'])
    shards = None
  return (
    jax.jit(
      fns.at_each if flat else fns.at,
      in_shardings=(shards, distributed.batch_sharded(layout.mesh)),
    )
    .lower(params, shape(ROWS, WIDTH))
    .compile(quick_compile.DEFAULTS)
  )


@pytest.mark.parametrize('task_devices', [2, 4])
@pytest.mark.parametrize('flat', [False, True])
def test_tasks_are_shared_out_among_devices(flat, task_devices):
  """The operations of a device are those of its tasks and rows alone."""
  layout = layout_of('replicated', task_devices)
  found = compiled(layout, flat, 'vmap').cost_analysis()['flops']
  # Products of matrices, forward and backward: the batch has no derivative.
  forward, backward = 2, 3
  tasks = len(NAMES) // task_devices
  # One forward pass is common to all tasks when they are at the same place.
  products = (tasks if flat else 1) * forward + tasks * backward
  rows = ROWS // (8 // task_devices)
  expected = products * 2 * rows * WIDTH * WIDTH
  assert expected <= found < 1.2 * expected


@pytest.mark.parametrize('engine', ['unroll', 'vmap'])
@pytest.mark.parametrize('flat', [False, True])
def test_sharded_parameters_are_gathered_and_gradients_scattered(flat, engine):
  """No activation travels, and nothing that is kept whole is a stack."""
  text = compiled(layout_of('sharded', 1), flat, engine).as_text()
  found = hlo_collectives.collectives(text)
  size = 2 * 4 * WIDTH * WIDTH
  heads = 4 * WIDTH * len(NAMES)
  total = lambda kind: sum(c.bytes for c in found if c.kind == kind)
  gathered = size * (len(NAMES) if flat else 1) + heads
  assert total('all-gather') == gathered
  assert {c.kind for c in found} <= {'all-gather', 'all-reduce'}
  whole = total('all-reduce') - sum(c.sliced_bytes for c in found)
  # The loss of each head for each task.
  assert whole <= 4 * len(NAMES) ** 2
  assert sum(c.sliced_bytes for c in found) == size * len(NAMES) + heads


def test_solvers_do_not_communicate():
  """What is between two stacks is not cut along with one of them."""
  layout = layout_of('replicated', 2)
  fns = layout.task_grad(gradients.task_grad(loss_fn, NAMES, engine='vmap'))

  def power_method(gram, *, losses, active):
    del losses, active
    unit = lambda x: x / jnp.sqrt(jnp.sum(x * x))
    return jax.lax.fori_loop(
      0, 5, lambda _, w: unit(gram @ w), unit(jnp.diagonal(gram))
    )

  tx = transforms.flat_minima(transforms.from_gram(power_method), NAMES)

  def update(params, batch):
    (losses, _), task_grads = fns.at(params, batch)
    # As of the labels of a batch.
    active = jnp.stack([jnp.any(batch[:, i] > 0) for i in range(len(NAMES))])
    return tx.update(
      task_grads,
      tx.init(params),
      params,
      losses=losses,
      active=active,
      grad_fn=lambda own: fns.at_each(own, batch)[1],
    )

  params = {
    'shared': [shape(WIDTH, WIDTH)] * 2,
    'heads': {task: shape(WIDTH) for task in NAMES},
  }
  text = (
    jax.jit(
      update,
      in_shardings=(
        layout.of_params(params),
        distributed.batch_sharded(layout.mesh),
      ),
    )
    .lower(params, shape(ROWS, WIDTH))
    .compile(quick_compile.DEFAULTS)
    .as_text()
  )
  assert ' while(' in text
  found = hlo_collectives.collectives(text)
  assert {c.times for c in found} == {1}
  assert 'all-to-all' in {c.kind for c in found}


def case_of(name, layout, **options):
  """A case of `digits`, laid out; its optimizer has all its parts."""
  config = digits.config(clip=1.0, weight_decay=1e-3, skip_nonfinite=3)
  config.method = ml_collections.ConfigDict(methods.entry(name, rho=0.1))
  made = digits.case(
    build.joint_update(config, digits.names()),
    build.optimizer(config, total_steps=10),
    its_model=digits.model('mlp', widths=(16,)),
    **options,
  )
  if layout is None:
    return made
  return made._replace(losses=layout.around(made.losses))


CASES = {
  'f_pcgrad': ('sharded', 1, {'micro_batches': 2}),
  'f_cagrad': ('replicated', 2, {'engine': 'vmap'}),
  # With further batches, and with a look-ahead and no stack.
  'modo': ('sharded', 1, {}),
  'auto_lambda': ('sharded', 1, {}),
}


def test_steps_with_a_layout_are_those_of_one_device():
  alone = {
    name: case_of(name, None, **options)
    for name, (_, _, options) in CASES.items()
  }
  mask = np.arange(32) % 3 > 0
  batch = digits.masked('task_2', mask, size=32)
  states = start = digits.start(alone, batch)
  step = quick_compile.jit(digits.step_of(alone))
  for _ in range(2):
    states, metrics = step(states, batch)

  for name, (parameters, task_devices, options) in CASES.items():
    layout = layout_of(parameters, task_devices, digits.names(), min_size=16)
    shards = {name: layout.of_state(start[name])}
    found = jax.device_put({name: start[name]}, shards)
    placed = distributed.put_batch(batch, layout.mesh)
    step = quick_compile.jit(
      digits.step_of({name: case_of(name, layout, **options)}),
      out_shardings=(shards, None),
    )
    for _ in range(2):
      found, shown = step(found, placed)
    digits.close(
      (found[name].params, shown[name]),
      (states[name].params, metrics[name]),
      # Adam divides by tiny second moments, so its steps keep fewer digits.
      rtol=2e-3,
      atol=2e-5,
      err_msg=name,
    )
    if parameters == 'sharded':
      kernels = [x for x in jax.tree.leaves(found[name].params) if x.ndim == 2]
      assert all(x.sharding.shard_shape(x.shape) != x.shape for x in kernels)


def test_layouts_that_cut_nothing_change_no_function():
  fns = gradients.task_grad(loss_fn, NAMES)
  layout = layout_of('replicated', 1)
  assert layout.task_grad(fns) is fns
  params = {'shared': jnp.ones(3)}
  assert layout.gather(params) is params
