"""The joint update as a whole: problem, model, method and devices together."""

import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from mtl_jax import losses
from mtl_jax import models
from mtl_jax import problems
from mtl_jax.train import optimizer
from mtl_jax.train import step as steps

METHODS = ('linear', 'mgda', 'pcgrad', 'cagrad', 'imtl_g')
_FLAT = {
  'rho': 0.1,
  'rho_heads': None,
  'adaptive': False,
  'norm': 'separate',
  'combine': 'separate',
  'head_scale': 'none',
}


def _config(name, **flat):
  aggregator = name.removeprefix('f_').replace('stl', 'linear')
  return ml_collections.ConfigDict(
    {
      'method': {
        'aggregator': aggregator,
        'weighting': None,
        'kwargs': {'c': 0.4} if aggregator == 'cagrad' else {},
        'head_scale': 'none' if name == 'stl' else None,
        'flat': {**_FLAT, **flat} if name.startswith('f_') else None,
      },
      'optimizer': {
        'learning_rate': 1e-2,
        'schedule': 'constant',
        'clip': None,
        'weight_decay': 0.0,
        'skip_nonfinite': None,
      },
      'seed': 0,
    }
  )


@functools.cache
def _problem():
  return problems.by_name('multi_digits')


@functools.cache
def _batch(size=16):
  problem = _problem()
  batch = dict(problem.load('train').__getitems__(np.arange(size)))
  batch['mask'] = {
    task: np.ones(size, np.float32) for task in problem.task_names
  }
  return jax.tree.map(jnp.asarray, batch)


def _model(trunk='mlp', sharing='shared', **kwargs):
  kwargs = kwargs or {'widths': (12,)}
  return models.make_model(
    models.by_name(trunk, **kwargs), _problem().tasks, sharing=sharing
  )


def _setup(name, model=None, *, flat=None, **options):
  problem = _problem()
  if model is None:
    model = _model(sharing='separate' if name.endswith('stl') else 'shared')
  tx = optimizer.make_optimizer(
    _config(name, **(flat or {})), problem.task_names, total_steps=10
  ).tx
  state = steps.init_state(problem, model, tx, seed=0, batch=_batch())
  step = jax.jit(steps.make_train_step(problem, model, tx, **options))
  return model, state, step


class _Normalised(nn.Module):
  """The smallest trunk with running statistics."""

  @nn.compact
  def __call__(self, image, *, train):
    x = image.reshape(image.shape[0], -1)
    x = nn.Dense(6)(x)
    return nn.BatchNorm(use_running_average=not train)(x)


def _close(actual, expected, rtol=2e-5, atol=2e-6):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol),
    actual,
    expected,
  )


@pytest.mark.parametrize('name', [p + m for p in ('', 'f_') for m in METHODS])
def test_one_device_and_eight_devices_give_the_same_parameters(name):
  _, state, step = _setup(name)
  auto = jax.sharding.AxisType.Auto
  mesh = jax.make_mesh((8,), ('data',), axis_types=(auto,))
  spec = jax.sharding.PartitionSpec
  sharded = jax.device_put(
    _batch(), jax.sharding.NamedSharding(mesh, spec('data'))
  )
  spread = jax.device_put(state, jax.sharding.NamedSharding(mesh, spec()))
  assert len(sharded['image'].sharding.device_set) == 8
  for _ in range(3):
    state, metrics = step(state, _batch())
    spread, spread_metrics = step(spread, sharded)
  # Adam divides by tiny second moments, so its steps keep fewer digits.
  _close(spread.params, state.params, rtol=1e-3, atol=1e-5)
  _close(spread_metrics, metrics, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize('name', ['f_cagrad', 'f_stl'])
def test_statistics_move_in_the_unperturbed_pass_only(name):
  model = models.make_model(
    _Normalised(),
    _problem().tasks,
    sharing='separate' if name == 'f_stl' else 'shared',
  )
  # A radius that changes what a perturbed pass would see beyond recognition.
  _, state, step = _setup(name, model, flat={'rho': 5.0})
  _, expected = model.apply(
    state.params,
    state.model_state,
    _problem().preprocess(_batch()),
    train=True,
  )
  after, _ = step(state, _batch())
  _close(after.model_state, expected)
  changed = jax.tree.map(
    lambda a, b: float(jnp.max(jnp.abs(a - b))),
    after.model_state,
    state.model_state,
  )
  assert min(jax.tree.leaves(changed)) > 0


def test_reported_losses_are_those_of_the_unperturbed_parameters():
  model, state, step = _setup('f_cagrad', flat={'rho': 5.0})
  batch = _problem().preprocess(_batch())
  predictions, _ = model.apply(
    state.params, state.model_state, batch, train=False
  )
  _, metrics = step(state, _batch())
  for task in _problem().task_names:
    expected = losses.cross_entropy(predictions[task], batch['labels'][task])
    np.testing.assert_allclose(
      metrics[f'{task}/loss'], expected.mean(), rtol=1e-5
    )


def test_dropout_draws_the_same_mask_in_both_passes():
  # With radius 0 both passes differ by their masks alone, if at all.
  model = _model('mlp', widths=(32,), dropout=0.5)
  _, state, plain = _setup('linear', model)
  _, flat_state, flat = _setup(
    'f_linear', model, flat={'rho': 0.0, 'head_scale': 'weights'}
  )
  state, metrics = plain(state, _batch())
  flat_state, flat_metrics = flat(flat_state, _batch())
  _close(flat_state.params, state.params, rtol=1e-3, atol=1e-5)
  assert float(flat_metrics['task_1/flat_gradient_norm']) < 1e-5
  # The masks of the next step are others: the same batch has another loss.
  state = state._replace(params=flat_state.params)
  _, next_metrics = plain(state, _batch())
  assert float(next_metrics['loss']) != float(metrics['loss'])


@pytest.mark.parametrize('name', ['cagrad', 'f_cagrad', 'linear', 'f_mgda'])
def test_a_task_without_labels_changes_nothing(name):
  _, state, step = _setup(name)
  batch = dict(_batch())
  batch['mask'] = {
    'task_1': batch['mask']['task_1'],
    'task_2': jnp.zeros_like(batch['mask']['task_2']),
  }
  batch['labels'] = {**batch['labels'], 'task_2': jnp.full(16, -1)}
  after, metrics = step(state, batch)
  shown = {k: float(v) for k, v in metrics.items() if 'task_2' not in k}
  assert np.isfinite(list(shown.values())).all()
  assert shown['loss'] == shown['task_1/loss']
  assert shown['task_1/present'] == 1
  assert float(metrics['task_2/present']) == 0
  _close(after.params['heads']['task_2'], state.params['heads']['task_2'])

  other = dict(batch)
  other['labels'] = {**batch['labels'], 'task_2': jnp.full(16, 7)}
  again, _ = step(state, other)
  _close(again.params, after.params, rtol=0, atol=0)
  moved = jnp.max(
    jnp.abs(
      jax.tree.leaves(after.params['shared'])[0]
      - jax.tree.leaves(state.params['shared'])[0]
    )
  )
  assert float(moved) > 0


@pytest.mark.parametrize('name', ['pcgrad', 'f_cagrad'])
def test_micro_batches_give_the_update_of_the_whole_batch(name):
  _, state, step = _setup(name)
  _, _, sliced = _setup(name, micro_batches=4)
  batch = dict(_batch())
  # Uneven counts: a mean of means over slices would be another number.
  mask = jnp.where(jnp.arange(16) < 5, 0.0, 1.0)
  batch['mask'] = {**batch['mask'], 'task_2': mask}
  whole, metrics = step(state, batch)
  parts, sliced_metrics = sliced(state, batch)
  _close(parts.params, whole.params, rtol=1e-3, atol=1e-5)
  _close(sliced_metrics, metrics, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize('engine', ['vmap', 'scan'])
@pytest.mark.parametrize('name', ['cagrad', 'f_cagrad', 'f_stl'])
def test_engines_give_the_same_update(name, engine):
  _, state, step = _setup(name)
  _, _, other = _setup(name, engine=engine)
  expected, expected_metrics = step(state, _batch())
  actual, metrics = other(state, _batch())
  _close(actual.params, expected.params, rtol=1e-3, atol=1e-5)
  _close(metrics, expected_metrics, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize('flat', [False, True])
def test_single_task_networks_train_as_if_each_were_alone(flat):
  model, state, step = _setup('f_stl' if flat else 'stl')
  problem = _problem()
  batch = problem.preprocess(_batch())

  def loss(params, task):
    heads = {**state.params['heads'], task: params}
    predictions, _ = model.apply(
      {'shared': {}, 'heads': heads}, state.model_state, batch, train=False
    )
    return losses.cross_entropy(predictions[task], batch['labels'][task]).mean()

  after, metrics = step(state, _batch())
  for task in problem.task_names:
    params = state.params['heads'][task]
    grads = jax.grad(loss)(params, task)
    if flat:
      scale = 0.1 / optax.tree.norm(grads)
      moved = jax.tree.map(lambda p, g, s=scale: p + s * g, params, grads)
      grads = jax.grad(loss)(moved, task)
    adam = optax.adam(1e-2)
    updates, _ = adam.update(grads, adam.init(params))
    _close(
      after.params['heads'][task],
      optax.apply_updates(params, updates),
      rtol=1e-3,
      atol=1e-5,
    )
  assert all(np.isfinite(float(value)) for value in metrics.values())


def test_evaluation_counts_each_present_label_once():
  model, state, _ = _setup('linear')
  problem = _problem()
  evaluate = jax.jit(steps.make_eval_step(problem, model))
  batch = dict(_batch())
  mask = jnp.where(jnp.arange(16) < 11, 1.0, 0.0)
  batch['mask'] = {'task_1': batch['mask']['task_1'], 'task_2': mask}
  halves = [
    jax.tree.map(lambda x, i=i: x[8 * i : 8 * i + 8], batch) for i in range(2)
  ]
  sums = [evaluate(state.params, state.model_state, half) for half in halves]
  values = steps.finish_eval(problem, jax.tree.map(jnp.add, *sums))

  predictions, _ = model.apply(
    state.params, state.model_state, problem.preprocess(batch), train=False
  )
  for task, count in (('task_1', 16), ('task_2', 11)):
    logits = np.asarray(predictions[task], np.float64)[:count]
    label = np.asarray(batch['labels'][task])[:count]
    log_z = np.log(np.exp(logits).sum(1))
    loss = (log_z - logits[np.arange(count), label]).mean()
    np.testing.assert_allclose(values[f'{task}/loss'], loss, rtol=1e-5)
    right = (logits.argmax(1) == label).mean()
    np.testing.assert_allclose(values[f'{task}/accuracy'], right, rtol=1e-6)


def test_the_log_of_single_task_networks_shows_no_conflict():
  _, state, step = _setup('stl')
  _, metrics = step(state, _batch())
  assert set(metrics) == {'loss'} | {
    f'{task}/{name}'
    for task in _problem().task_names
    for name in ('loss', 'accuracy', 'present')
  }


def test_the_log_shows_what_the_aggregator_saw():
  model, state, step = _setup('f_mgda')
  del model
  _, metrics = step(state, _batch())
  weights = [float(metrics[f'{t}/weight']) for t in _problem().task_names]
  np.testing.assert_allclose(sum(weights), 1, rtol=1e-5)
  for name in ('conflict', 'flat/conflict'):
    assert float(metrics[name]) in (0.0, 1.0)
  for name in ('gradient_norm', 'flat_gradient_norm', 'flat_weight'):
    assert float(metrics[f'task_1/{name}']) > 0
