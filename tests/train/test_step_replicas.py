"""A step that every device runs by itself, on its rows of the batch."""

import functools

import digits
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quick_compile

from configs import multi_digits
import mtl_jax
from mtl_jax import losses
from mtl_jax import models
from mtl_jax import types
from mtl_jax.models import registry
from mtl_jax.train import distributed
from mtl_jax.train import experiment as experiments
from mtl_jax.train import objective as objectives
from mtl_jax.train import sharding

DEVICES = 8
# Every device's rows can be cut into two and into three.
ROWS = 6 * DEVICES


@functools.cache
def _batch():
  """Other labels are missing on every device, and on the first all of a task.

  A mean of the means of devices would be another number.
  """
  first, second = (np.ones(ROWS, np.float32) for _ in range(2))
  first[:7] = 0
  second[[5, 17, 18, 19, 21, 40]] = 0
  masks = zip(digits.names(), (first, second), strict=True)
  return {
    **digits.batch(ROWS),
    'mask': {task: jnp.asarray(mask) for task, mask in masks},
  }


def _stack(make_method, *, rho=None, perturbation='global', **options):
  """`(axis_name, model) -> case`; of flat minima with a radius."""

  def make(axis_name, its_model):
    aggregator = make_method(num_tasks=2, axis_name=axis_name)
    if rho is None:
      tx = mtl_jax.shared_only(aggregator, digits.names())
    else:
      tx = mtl_jax.flat_minima(
        aggregator,
        digits.names(),
        rho,
        perturbation=perturbation if axis_name else 'global',
      )
    return _case(mtl_jax.stack_update(tx), axis_name, its_model, **options)

  return make


def _case(joint, axis_name, its_model, **options):
  return digits.case(
    joint,
    mtl_jax.skip_nonfinite(optax.sgd(0.1)),
    its_model=its_model,
    axis_name=axis_name,
    **options,
  )


def _famo(axis_name, its_model):
  joint = mtl_jax.weighted_update(mtl_jax.famo(gamma=0.1), digits.names())
  return _case(joint, axis_name, its_model, micro_batches=2)


CASES = {
  'pcgrad': _stack(mtl_jax.pcgrad, micro_batches=2),
  'f_imtl_g': _stack(mtl_jax.imtl_g, rho=0.3, engine='scan'),
  'modo': _stack(functools.partial(mtl_jax.modo, gamma=0.5)),
  'famo': _famo,
}


def _run(cases, *, axis_name, batch_norm='global', count=2):
  """States and metrics of all cases after some steps: one program for all."""
  alone = {
    name: make(None, digits.normalised()) for name, make in cases.items()
  }
  states, batch = digits.start(alone, _batch()), _batch()
  if axis_name is None:
    step = digits.step_of(alone)
  else:
    along = axis_name if batch_norm == 'global' else None
    its_model = digits.normalised(axis_name=along)
    own = {name: make(axis_name, its_model) for name, make in cases.items()}
    mesh = distributed.make_mesh()
    step = sharding.per_device(digits.step_of(own), mesh)
    batch = distributed.put_batch(batch, mesh)
  step = quick_compile.jit(step)
  for _ in range(count):
    states, metrics = step(states, batch)
  return states, metrics


@pytest.fixture(scope='module')
def with_replicas():
  return _run(CASES, axis_name='data')


def test_replicas_take_the_step_of_the_whole_batch(with_replicas):
  """Where neither the perturbation nor BatchNorm is theirs."""
  (states, metrics), (expected, right) = (
    with_replicas,
    _run(CASES, axis_name=None),
  )
  for name in CASES:
    digits.close(states[name], expected[name], err_msg=name)
    digits.close(metrics[name], right[name], err_msg=name)


def test_all_devices_have_the_same_state(with_replicas):
  for leaf in jax.tree.leaves(digits.numbers(with_replicas[0])):
    pieces = [np.asarray(shard.data) for shard in leaf.addressable_shards]
    assert len(pieces) == DEVICES
    for piece in pieces:
      np.testing.assert_array_equal(piece, pieces[0])


def _slices(tree):
  return [
    jax.tree.map(lambda x, d=d: x[6 * d : 6 * d + 6], tree)
    for d in range(DEVICES)
  ]


def _one_by_one():
  """A step of MGDA with own perturbations, from the slices one after another.

  Returns:
    parameters, the model's state and the losses {task: number}.
  """
  model, radius, rate = digits.normalised(), 0.3, 0.1
  start = digits.start(
    {'mgda': _stack(mtl_jax.mgda, rho=0.3)(None, model)}, _batch()
  )['mgda']
  as_numpy = functools.partial(jax.tree.map, np.asarray)
  params, names = as_numpy(start.params), digits.names()
  counts = [float(_batch()['mask'][task].sum()) for task in names]

  @quick_compile.jit
  def of_slice(task_params, piece):
    """The slice's part of each loss and its gradient, by task; statistics."""
    piece = digits.problem().preprocess(piece)

    def part(params, task, count):
      predictions, state = model.apply(
        params, start.model_state, piece, train=True
      )
      values = losses.cross_entropy(predictions[task], piece['labels'][task])
      return jnp.sum(values * piece['mask'][task]) / count, state

    found = [
      jax.value_and_grad(part, has_aux=True)(*inputs)
      for inputs in zip(task_params, names, counts, strict=True)
    ]
    return (
      [loss for (loss, _), _ in found],
      [
        {'shared': g['shared'], 'head': g['heads'][task]}
        for task, (_, g) in zip(names, found, strict=True)
      ],
      found[0][0][1],
    )

  def moved(part, grads):
    # Without labels a slice has no direction to perturb in.
    length = np.sqrt(sum(np.sum(g**2) for g in jax.tree.leaves(grads)))
    return jax.tree.map(
      lambda p, g: p + radius * g / max(length, 1e-12), part, grads
    )

  add = functools.partial(jax.tree.map, np.add)
  sums = None
  for piece in _slices(_batch()):
    values, g, state = as_numpy(of_slice([params] * 2, piece))
    task_params = [
      {
        'shared': moved(params['shared'], own['shared']),
        'heads': params['heads']
        | {task: moved(params['heads'][task], own['head'])},
      }
      for task, own in zip(names, g, strict=True)
    ]
    _, s, _ = as_numpy(of_slice(task_params, piece))
    both = values, g, s, state
    sums = both if sums is None else add(sums, both)
  values, g, s, state = sums

  stack = lambda first, second: np.stack([first, second])
  g_shared, s_shared = (
    jax.tree.map(stack, *(own['shared'] for own in both)) for both in (g, s)
  )
  aggregator = mtl_jax.mgda()
  aggregate = quick_compile.jit(
    lambda rows: aggregator.update(rows, aggregator.init(params['shared']))[0]
  )
  flat = jax.tree.map(np.subtract, s_shared, g_shared)
  updates = {
    'shared': add(as_numpy(aggregate(g_shared)), as_numpy(aggregate(flat))),
    'heads': {task: own['head'] for task, own in zip(names, s, strict=True)},
  }
  return (
    jax.tree.map(lambda p, u: p - rate * u, params, updates),
    jax.tree.map(lambda x: x / DEVICES, state),
    dict(zip(names, values, strict=True)),
  )


def test_own_perturbations_and_statistics_are_those_of_the_slices():
  cases = {
    name: _stack(mtl_jax.mgda, rho=0.3, perturbation=name)
    for name in ('per_device', 'global')
  }
  states, metrics = _run(
    cases, axis_name='data', batch_norm='per_device', count=1
  )
  params, model_state, found = _one_by_one()
  own = states['per_device']
  digits.close(own.params, params, rtol=2e-4, atol=1e-5)
  digits.close(own.model_state, model_state, rtol=1e-5, atol=1e-6)
  for task in digits.names():
    np.testing.assert_allclose(
      metrics['per_device'][f'{task}/loss'], found[task], rtol=1e-5
    )
  # The same statistics and another perturbation is another step.
  digits.close(states['global'].model_state, model_state, rtol=1e-5, atol=1e-6)
  apart = optax.tree.sub(states['global'].params, params)
  assert optax.tree.norm(apart) > 1e-3


def test_replicas_drop_the_same_units_in_both_passes():
  # With radius 0 both passes differ by their masks alone, if at all.
  make = _stack(mtl_jax.linear, rho=0.0, perturbation='per_device')
  its_model = digits.model('mlp', widths=(32,), dropout=0.5)
  states = digits.start({'linear': make(None, its_model)}, _batch())
  step = digits.step_of({'linear': make('data', its_model)})
  step = quick_compile.jit(sharding.per_device(step, distributed.make_mesh()))
  metrics = step(states, _batch())[1]['linear']
  assert metrics['task_1/gradient_norm'] > 0.1
  assert metrics['task_1/flat_gradient_norm'] < 1e-5


def test_every_replica_has_a_key_of_its_own():
  def apply(params, state, batch, *, train, key):
    del params, state, train
    rows = batch['image'].shape[0]
    predictions = dict.fromkeys(digits.names(), jnp.zeros((rows, 10)))
    return predictions, jax.random.key_data(key)

  objective = objectives.objective(
    digits.problem(), types.Model(None, apply), axis_name='data'
  )

  def own(batch):
    _, aux = objective.loss_fn({}, batch, (), jax.random.key(0))
    return aux.mean[None]

  keys = jax.shard_map(
    own,
    mesh=distributed.make_mesh(),
    in_specs=jax.sharding.PartitionSpec('data'),
    out_specs=jax.sharding.PartitionSpec('data'),
  )(_batch())
  assert len(np.unique(keys, axis=0)) == DEVICES


def test_gradients_that_are_summed_already_are_refused():
  # As shard_map(check_vma=True) sums those of replicated parameters.
  joint = mtl_jax.weighted_update(mtl_jax.equal_weights(), digits.names())
  make = lambda axis_name: {'equal': digits.case(joint, axis_name=axis_name)}
  spec = jax.sharding.PartitionSpec
  checked = jax.shard_map(
    digits.step_of(make(distributed.DATA_AXIS)),
    mesh=distributed.make_mesh(),
    in_specs=(spec(), spec(distributed.DATA_AXIS)),
    out_specs=spec(),
    check_vma=True,
  )
  states = digits.start(make(None), _batch())
  with pytest.raises(ValueError, match='summed over devices already'):
    jax.eval_shape(checked, states, _batch())


@pytest.mark.parametrize('name', registry._TRUNKS)
def test_trunks_with_batch_norm_take_the_axis_of_their_statistics(name):
  trunk = models.by_name(name)
  variables = jax.eval_shape(
    trunk.init, jax.random.key(0), jnp.zeros((1, 36, 36, 1))
  )
  assert hasattr(trunk, 'batch_norm_axis') == ('batch_stats' in variables)


def test_statistics_of_a_resnet_along_an_axis_are_those_of_the_batch():
  small = functools.partial(models.ResNet, widths=(2, 3), blocks=(1, 1))
  image = jax.random.normal(jax.random.key(0), (2 * DEVICES, 8, 8, 1))
  variables = quick_compile.jit(small().init)(jax.random.key(1), image)
  run = lambda trunk, image: trunk.apply(
    variables, image, train=True, mutable=['batch_stats']
  )
  rows = jax.sharding.PartitionSpec('data')
  along = jax.shard_map(
    functools.partial(run, small(batch_norm_axis='data')),
    mesh=distributed.make_mesh(),
    in_specs=rows,
    out_specs=(rows, jax.sharding.PartitionSpec()),
  )
  one = functools.partial(run, small())
  digits.close(
    quick_compile.jit(along)(image),
    quick_compile.jit(one)(image),
    rtol=1e-3,
    atol=1e-5,
  )


def _config(
  method='f_linear', *, perturbation='global', engine='unroll', **parallel
):
  config = multi_digits.get_config(f'runlocal,method={method}')
  config.perturbation, config.engine = perturbation, engine
  with config.unlocked():
    config.parallel.update(parallel)
  return config


def test_configs_choose_what_is_global_and_what_is_of_each_device():
  """There is no BatchNorm in this network, which leaves the perturbation."""
  made = [
    experiments.make_experiment(_config()),
    experiments.make_experiment(
      _config(perturbation='per_device', batch_norm='per_device')
    ),
  ]
  batch = next(made[0].train_batches(0))
  # Devices with the same rows perturb alike.
  rows = batch['image'].shape[0] // DEVICES
  same = jax.tree.map(
    lambda x: np.concatenate([np.asarray(x)[:rows]] * DEVICES), batch
  )
  same = distributed.put_batch(same, made[0].mesh)
  expected, actual = (e.step(e.init(), same).train for e in made)
  digits.close(actual.params, expected.params, rtol=1e-3, atol=1e-5)
  expected, other = (e.step(e.init(), batch).train for e in made)
  apart = jax.tree.map(
    lambda a, b: np.abs(a - b).max(), other.params, expected.params
  )
  assert max(jax.tree.leaves(apart)) > 1e-3


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'perturbation': 'local'}, "perturbation must be one of .*'local'"),
    ({'batch_norm': 'none'}, r"parallel\.batch_norm must be one of .*'none'"),
    (
      {'perturbation': 'per_device', 'parameters': 'sharded'},
      r"perturbation='per_device'.*parallel\.parameters.*'sharded'",
    ),
    (
      {'batch_norm': 'per_device', 'task_devices': 2},
      r"parallel\.batch_norm='per_device'.*parallel\.task_devices.*2",
    ),
    (
      {'task_devices': 2, 'method': 'equal', 'engine': 'vmap'},
      r'a weighted loss needs.*with parallel\.task_devices=2',
    ),
    (
      {'task_devices': 2, 'method': 'stl'},
      r"parallel\.task_devices.*model\.sharing.*2 and 'separate'",
    ),
    (
      {'batch_norm': 'per_device', 'method': 'auto_lambda'},
      "bilevel_update needs a look-ahead.*axis_name='data'.*per_device",
    ),
    (
      {'perturbation': 'per_device', 'method': 'mgda'},
      "perturbation is 'per_device'.*method.flat is None",
    ),
  ],
)
def test_choices_that_do_not_go_together_are_named(changes, message):
  with pytest.raises(ValueError, match=message):
    experiments.make_experiment(_config(**changes))
