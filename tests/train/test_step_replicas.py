"""A step that every device runs by itself, on its rows of the batch."""

import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quick_compile
import test_step

from configs import multi_digits
import mtl_jax
from mtl_jax import losses
from mtl_jax import models
from mtl_jax.models import registry
from mtl_jax.train import distributed
from mtl_jax.train import experiment as experiments
from mtl_jax.train import replicas
from mtl_jax.train import step as steps

DEVICES = 8
# Every device's rows can be cut into two and into three.
ROWS = 6 * DEVICES


class _Normalised(nn.Module):
  """A small trunk with BatchNorm over the rows of all devices, or of one."""

  batch_norm_axis: str | None = None

  @nn.compact
  def __call__(self, image, *, train):
    x = nn.Dense(5)(image.reshape(image.shape[0], -1))
    x = nn.BatchNorm(
      use_running_average=not train, axis_name=self.batch_norm_axis
    )(x)
    return nn.tanh(x)


def _problem():
  return test_step._problem()


def _names():
  return _problem().task_names


@functools.cache
def _batch():
  """Other labels are missing on every device, and on the first all of a task.

  A mean of the means of devices would be another number.
  """
  batch = dict(_problem().load('train').__getitems__(np.arange(ROWS)))
  first, second = (np.ones(ROWS, np.float32) for _ in range(2))
  first[:7] = 0
  second[[5, 17, 18, 19, 21, 40]] = 0
  batch['mask'] = dict(zip(_names(), (first, second), strict=True))
  return jax.tree.map(jnp.asarray, batch)


def _case(
  make_method=None,
  *,
  rho=None,
  perturbation='global',
  engine='unroll',  # The quickest to compile.
  **options,
):
  """`axis_name -> (tx, options of make_train_step)`; flat with a radius."""

  def make(axis_name):
    parts, more = [], {'engine': engine, **options}
    if make_method is not None:
      aggregator = make_method(num_tasks=2, axis_name=axis_name)
      if rho is None:
        wrapped = mtl_jax.shared_only(aggregator, _names())
      else:
        wrapped = mtl_jax.flat_minima(
          aggregator,
          _names(),
          rho,
          perturbation=perturbation if axis_name else 'global',
        )
      parts.append(wrapped)
      more['extra_batches'] = wrapped.extra_batches
    tx = optax.chain(*parts, optax.sgd(0.1))
    return mtl_jax.skip_nonfinite(tx), more

  return make


FAMO = mtl_jax.famo(gamma=0.1)
CASES = {
  'pcgrad': _case(mtl_jax.pcgrad, micro_batches=2),
  'f_imtl_g': _case(mtl_jax.imtl_g, rho=0.3, engine='scan'),
  'modo': _case(functools.partial(mtl_jax.modo, gamma=0.5)),
  'famo': _case(weighting=FAMO, micro_batches=2),
}


def _model(batch_norm_axis=None):
  return models.make_model(
    _Normalised(batch_norm_axis=batch_norm_axis), _problem().tasks
  )


def _start(cases):
  found = {}
  for name, case in cases.items():
    tx, options = case(None)
    found[name] = steps.init_state(
      _problem(),
      _model(),
      tx,
      seed=0,
      batch=_batch(),
      weighting=options.get('weighting'),
    )
  return found


def _run(cases, *, axis_name, batch_norm='global', count=2):
  """States and metrics of all cases after some steps: one program for all."""
  model = _model(axis_name if batch_norm == 'global' else None)

  def step(states, batch):
    found = {}
    for name, case in cases.items():
      tx, options = case(axis_name)
      one = steps.make_train_step(
        _problem(), model, tx, axis_name=axis_name, **options
      )
      found[name] = one(states[name], batch)
    return (
      {name: state for name, (state, _) in found.items()},
      {name: metrics for name, (_, metrics) in found.items()},
    )

  states, batch = _start(cases), _batch()
  if axis_name is not None:
    mesh = distributed.make_mesh()
    step = replicas.per_device(step, mesh)
    batch = distributed.put_batch(batch, mesh)
  step = quick_compile.jit(step)
  for _ in range(count):
    states, metrics = step(states, batch)
  return states, metrics


@pytest.fixture(scope='module')
def with_jit():
  return _run(CASES, axis_name=None)


@pytest.fixture(scope='module')
def with_replicas():
  return _run(CASES, axis_name='data')


@pytest.mark.parametrize('name', CASES)
def test_replicas_take_the_step_of_the_whole_batch(
  with_jit, with_replicas, name
):
  """Where neither the perturbation nor BatchNorm is theirs."""
  (states, metrics), (expected, right) = with_replicas, with_jit
  test_step._close(
    _numbers(states[name]), _numbers(expected[name]), rtol=2e-5, atol=2e-6
  )
  test_step._close(metrics[name], right[name], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize('name', CASES)
def test_all_devices_have_the_same_state(with_replicas, name):
  for leaf in jax.tree.leaves(_numbers(with_replicas[0][name])):
    pieces = [np.asarray(shard.data) for shard in leaf.addressable_shards]
    assert len(pieces) == DEVICES
    for piece in pieces:
      np.testing.assert_array_equal(piece, pieces[0])


def _numbers(tree):
  is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
  return jax.tree.map(
    lambda x: jax.random.key_data(x) if is_key(x) else x, tree
  )


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
  model, radius, rate = _model(), 0.3, 0.1
  start = _start({'mgda': _case(mtl_jax.mgda, rho=0.3)})['mgda']
  as_numpy = functools.partial(jax.tree.map, np.asarray)
  params, names = as_numpy(start.params), _names()
  counts = [float(_batch()['mask'][task].sum()) for task in names]

  @quick_compile.jit
  def of_slice(task_params, piece):
    """The slice's part of each loss and its gradient, by task; statistics."""
    piece = _problem().preprocess(piece)

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
    name: _case(mtl_jax.mgda, rho=0.3, perturbation=name)
    for name in ('per_device', 'global')
  }
  states, metrics = _run(
    cases, axis_name='data', batch_norm='per_device', count=1
  )
  params, model_state, found = _one_by_one()
  own = states['per_device']
  test_step._close(own.params, params, rtol=2e-4, atol=1e-5)
  test_step._close(own.model_state, model_state, rtol=1e-5, atol=1e-6)
  for task in _names():
    np.testing.assert_allclose(
      metrics['per_device'][f'{task}/loss'], found[task], rtol=1e-5
    )
  # The same statistics and another perturbation is another step.
  test_step._close(
    states['global'].model_state, model_state, rtol=1e-5, atol=1e-6
  )
  apart = optax.tree.sub(states['global'].params, params)
  assert optax.tree.norm(apart) > 1e-3


def test_replicas_drop_the_same_units_in_both_passes():
  # With radius 0 both passes differ by their masks alone, if at all.
  case = _case(mtl_jax.linear, rho=0.0, perturbation='per_device')
  model = test_step._model('mlp', widths=(32,), dropout=0.5)
  state = steps.init_state(
    _problem(), model, case(None)[0], seed=0, batch=_batch()
  )
  tx, options = case('data')
  step = steps.make_train_step(
    _problem(), model, tx, axis_name='data', **options
  )
  mesh = distributed.make_mesh()
  step = quick_compile.jit(replicas.per_device(step, mesh))
  _, metrics = step(state, _batch())
  assert metrics['task_1/gradient_norm'] > 0.1
  assert metrics['task_1/flat_gradient_norm'] < 1e-5


def test_every_replica_has_a_key_of_its_own():
  own = lambda: replicas.Replicas('data').own_key(jax.random.key(0))[None]
  keys = jax.shard_map(
    own,
    mesh=distributed.make_mesh(),
    in_specs=(),
    out_specs=jax.sharding.PartitionSpec('data'),
  )()
  assert len(np.unique(jax.random.key_data(keys), axis=0)) == DEVICES


def test_a_bilevel_weighting_is_refused_on_replicas():
  with pytest.raises(ValueError, match=r"parallel\.batch_norm.*'data'"):
    steps.make_train_step(
      _problem(),
      _model(),
      optax.sgd(0.1),
      weighting=mtl_jax.auto_lambda(),
      axis_name='data',
    )


def test_gradients_that_are_summed_already_are_refused():
  # As shard_map(check_vma=True) sums those of replicated parameters.
  tx = optax.sgd(0.1)
  step = steps.make_train_step(
    _problem(),
    _model(),
    tx,
    weighting=mtl_jax.equal_weights(),
    axis_name=distributed.DATA_AXIS,
  )
  state = steps.init_state(
    _problem(),
    _model(),
    tx,
    seed=0,
    batch=_batch(),
    weighting=mtl_jax.equal_weights(),
  )
  spec = jax.sharding.PartitionSpec
  checked = jax.shard_map(
    step,
    mesh=distributed.make_mesh(),
    in_specs=(spec(), spec(distributed.DATA_AXIS)),
    out_specs=spec(),
    check_vma=True,
  )
  with pytest.raises(ValueError, match='summed over devices already'):
    jax.eval_shape(checked, state, _batch())


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
  test_step._close(
    quick_compile.jit(along)(image),
    quick_compile.jit(one)(image),
    rtol=1e-3,
    atol=1e-5,
  )


def _config(method='f_linear', *, perturbation='global', **parallel):
  config = multi_digits.get_config(f'runlocal,method={method}')
  config.perturbation = perturbation
  config.engine = 'unroll'
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
  test_step._close(actual.params, expected.params, rtol=1e-3, atol=1e-5)
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
      {'task_devices': 2, 'method': 'equal'},
      r'parallel\.task_devices.*a loss weighting.*got 2',
    ),
    (
      {'task_devices': 2, 'method': 'stl'},
      r"parallel\.task_devices.*model\.sharing.*2 and 'separate'",
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
