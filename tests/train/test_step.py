"""The step as a whole: problem, model, method and devices together."""

import digits
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quick_compile

from mtl_jax import losses
from mtl_jax import types
from mtl_jax.train import build
from mtl_jax.train import evaluate

# Adam divides by tiny second moments, so its steps keep fewer digits.
_OF_ADAM = {'rtol': 1e-3, 'atol': 1e-5}


def test_one_device_and_eight_devices_give_the_same_parameters():
  cases = {
    name: digits.of_config(name) for name in ('linear', 'f_pcgrad', 'imtl_g')
  }
  # The engine of CPUs is a loop.
  cases['f_cagrad'] = digits.of_config('f_cagrad', engine='scan')
  mesh = jax.make_mesh(
    (8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,)
  )
  place = lambda tree, *axes: jax.device_put(
    tree,
    jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)),
  )
  sharded = place(digits.batch(), 'data')
  assert len(sharded['image'].sharding.device_set) == 8
  states = digits.start(cases)
  spread = place(states)
  step = quick_compile.jit(digits.step_of(cases))
  for _ in range(3):
    states, metrics = step(states, digits.batch())
    spread, spread_metrics = step(spread, sharded)
  for name in cases:
    digits.close(
      (spread[name].params, spread_metrics[name]),
      (states[name].params, metrics[name]),
      **_OF_ADAM,
      err_msg=name,
    )


def test_ways_to_evaluate_a_method_give_one_update():
  # Wide enough that `ghost_update` has something to save.
  its_model = digits.model('mlp', widths=(40,))
  ways = {
    'cagrad': ('stack', 'gram', 'ghost'),
    'f_cagrad': ('stack', 'gram', 'ghost'),
    # Linear in the gradients, so that it may be taken at the features.
    'linear': ('stack', 'features'),
  }
  cases = {
    f'{name} {way}': digits.of_config(
      name, joint_update=way, its_model=its_model
    )
    for name, of_name in ways.items()
    for way in of_name
  }
  states = digits.start(cases)
  step = quick_compile.jit(digits.step_of(cases))
  # All tasks, then one of them without labels.
  for batch in (digits.batch(), digits.masked('task_2', np.zeros(16))):
    states, metrics = step(states, batch)
  for name, of_name in ways.items():
    expected = f'{name} stack'
    for way in of_name:
      found = f'{name} {way}'
      digits.close(
        states[found].params, states[expected].params, **_OF_ADAM, err_msg=found
      )
      for key in ('loss', 'task_1/loss', 'task_1/accuracy', 'task_1/present'):
        np.testing.assert_allclose(
          metrics[found][key], metrics[expected][key], rtol=1e-5
        )


def test_a_model_that_lacks_what_an_update_asks_for_is_refused():
  heads = {task: {} for task in digits.names()}
  no_layer = types.Model(
    init=lambda key, batch: ({'shared': jnp.ones(()), 'heads': heads}, {}),
    apply=lambda params, state, batch, *, train, key=None: (
      dict.fromkeys(digits.names(), params['shared'] * jnp.ones((16, 10))),
      state,
    ),
    # The objective of a model without them has no dense form at all.
    features=lambda *args, **kwargs: None,
    heads=lambda *args: None,
  )
  for way, its_model, message in (
    (
      'features',
      digits.model(sharing='separate'),
      'feature_update needs gradients of features.*no features_fn',
    ),
    ('ghost', digits.model(sharing='separate'), 'ghost_update needs dense'),
    ('ghost', no_layer, 'no layer that was called uses one'),
  ):
    cases = {
      way: digits.of_config('mgda', joint_update=way, its_model=its_model)
    }
    states = digits.start(cases)
    with pytest.raises(ValueError, match=message):
      jax.eval_shape(digits.step_of(cases), states, digits.batch())


def test_statistics_move_in_the_unperturbed_pass_only():
  # A radius that changes what a perturbed pass would see beyond recognition.
  cases = {
    name: digits.of_config(
      name,
      flat={'rho': 5.0},
      its_model=digits.normalised('separate' if name == 'f_stl' else 'shared'),
    )
    for name in ('f_cagrad', 'f_stl')
  }
  states = digits.start(cases)

  @quick_compile.jit
  def both(states, batch):
    of_model = {}
    for name, case in cases.items():
      _, of_model[name] = case.model.apply(
        states[name].params,
        states[name].model_state,
        digits.problem().preprocess(batch),
        train=True,
      )
    return digits.step_of(cases)(states, batch)[0], of_model

  after, expected = both(states, digits.batch())
  for name in cases:
    found = after[name].model_state
    digits.close(found, expected[name])
    for new, old in zip(
      jax.tree.leaves(found),
      jax.tree.leaves(states[name].model_state),
      strict=True,
    ):
      assert np.any(new != old)


def test_reported_losses_are_those_of_the_unperturbed_parameters():
  cases = {'f_cagrad': digits.of_config('f_cagrad', flat={'rho': 5.0})}
  state = digits.start(cases)
  batch = digits.problem().preprocess(digits.batch())
  predictions, _ = cases['f_cagrad'].model.apply(
    state['f_cagrad'].params, {}, batch, train=False
  )
  _, metrics = quick_compile.jit(digits.step_of(cases))(state, digits.batch())
  for task in digits.names():
    expected = losses.cross_entropy(predictions[task], batch['labels'][task])
    np.testing.assert_allclose(
      metrics['f_cagrad'][f'{task}/loss'], expected.mean(), rtol=1e-5
    )


def test_dropout_draws_the_same_mask_in_both_passes():
  # With radius 0 both passes differ by their masks alone, if at all.
  its_model = digits.model('mlp', widths=(32,), dropout=0.5)
  flat = {'rho': 0.0, 'head_scale': 'weights'}
  cases = {
    'plain': digits.of_config('linear', its_model=its_model),
    'flat': digits.of_config('f_linear', flat=flat, its_model=its_model),
  }
  step = quick_compile.jit(digits.step_of(cases))
  states, metrics = step(digits.start(cases), digits.batch())
  params = states['flat'].params
  digits.close(params, states['plain'].params, **_OF_ADAM)
  assert metrics['flat']['task_1/gradient_norm'] > 0.1
  assert metrics['flat']['task_1/flat_gradient_norm'] < 1e-5
  # The masks of the next step are others: the parameters have another loss.
  states['plain'] = states['plain']._replace(
    params=digits.start(cases)['plain'].params
  )
  _, later = step(states, digits.batch())
  assert later['plain']['loss'] != metrics['plain']['loss']


def test_a_task_without_labels_changes_nothing():
  cases = {
    name: digits.of_config(name) for name in ('linear', 'cagrad', 'f_mgda')
  }
  states = digits.start(cases)
  step = quick_compile.jit(digits.step_of(cases))
  batch = digits.masked('task_2', np.zeros(16))
  with_label = lambda label: {
    **batch,
    'labels': {**batch['labels'], 'task_2': jnp.full(16, label)},
  }
  after, metrics = step(states, with_label(-1))
  again, _ = step(states, with_label(7))
  for name in cases:
    found, before = after[name].params, states[name].params
    shown = {k: float(v) for k, v in metrics[name].items() if 'task_2' not in k}
    assert np.isfinite(list(shown.values())).all()
    assert shown['loss'] == shown['task_1/loss']
    assert shown['task_1/present'] == 1
    assert metrics[name]['task_2/present'] == 0
    digits.close(found['heads']['task_2'], before['heads']['task_2'])
    digits.close(again[name].params, found, rtol=0, atol=0)
    moved = jax.tree.map(
      lambda a, b: float(jnp.max(jnp.abs(a - b))),
      found['shared'],
      before['shared'],
    )
    assert max(jax.tree.leaves(moved)) > 0


def test_micro_batches_and_engines_give_the_update_of_the_whole_batch():
  ways = {
    'pcgrad': ({'micro_batches': 4},),
    'f_cagrad': ({'micro_batches': 4, 'engine': 'scan'}, {'engine': 'vmap'}),
    'f_stl': ({'engine': 'vmap'},),
  }
  cases = {}
  for name, of_name in ways.items():
    its_model = digits.model(
      sharing='separate' if name == 'f_stl' else 'shared'
    )
    for options in ({}, *of_name):
      cases[f'{name} {options}'] = digits.of_config(
        name, its_model=its_model, **options
      )
  # Uneven counts: a mean of means over slices would be another number.
  batch = digits.masked('task_2', np.arange(16) >= 5)
  step = quick_compile.jit(digits.step_of(cases))
  states, metrics = step(digits.start(cases), batch)
  for name, of_name in ways.items():
    for options in of_name:
      pair = [
        (states[key].params, metrics[key])
        for key in (f'{name} {options}', f'{name} {{}}')
      ]
      digits.close(*pair, **_OF_ADAM, err_msg=f'{name} {options}')


def test_single_task_networks_train_as_if_each_were_alone():
  its_model = digits.model(sharing='separate')
  cases = {
    name: digits.of_config(name, its_model=its_model)
    for name in ('stl', 'f_stl')
  }
  states = digits.start(cases)
  batch = digits.problem().preprocess(digits.batch())
  begin = states['stl'].params

  def loss(params, task):
    heads = {**begin['heads'], task: params}
    predictions, _ = its_model.apply(
      {'shared': {}, 'heads': heads}, {}, batch, train=False
    )
    return losses.cross_entropy(predictions[task], batch['labels'][task]).mean()

  @quick_compile.jit
  def alone(params):
    found = {'stl': {}, 'f_stl': {}}
    adam = optax.adam(1e-2)
    for task, own in params['heads'].items():
      grads = jax.grad(loss)(own, task)
      scale = 0.1 / optax.tree.norm(grads)
      moved = jax.tree.map(lambda p, g, s=scale: p + s * g, own, grads)
      flat = jax.grad(loss)(moved, task)
      for name, g in (('stl', grads), ('f_stl', flat)):
        found[name][task] = optax.apply_updates(
          own, adam.update(g, adam.init(own))[0]
        )
    return found

  after, metrics = quick_compile.jit(digits.step_of(cases))(
    states, digits.batch()
  )
  for name, expected in alone(begin).items():
    digits.close(after[name].params['heads'], expected, **_OF_ADAM)
    assert all(np.isfinite(float(x)) for x in metrics[name].values())
  # Tasks without anything shared cannot conflict.
  assert set(metrics['stl']) == {'loss'} | {
    f'{task}/{name}'
    for task in digits.names()
    for name in ('loss', 'accuracy', 'present')
  }


def test_evaluation_counts_each_present_label_once():
  problem, its_model = digits.problem(), digits.model()
  params, state = its_model.init(
    jax.random.key(0), problem.preprocess(digits.batch())
  )
  step = quick_compile.jit(evaluate.make_eval_step(problem, its_model))
  batch = digits.masked('task_2', np.arange(16) < 11)
  halves = [
    jax.tree.map(lambda x, i=i: x[8 * i : 8 * i + 8], batch) for i in range(2)
  ]
  sums = [step(params, state, half) for half in halves]
  values = evaluate.finish_eval(problem, jax.tree.map(jnp.add, *sums))

  predictions, _ = its_model.apply(
    params, state, problem.preprocess(batch), train=False
  )
  for task, count in (('task_1', 16), ('task_2', 11)):
    logits = np.asarray(predictions[task], np.float64)[:count]
    label = np.asarray(batch['labels'][task])[:count]
    log_z = np.log(np.exp(logits).sum(1))
    loss = (log_z - logits[np.arange(count), label]).mean()
    np.testing.assert_allclose(values[f'{task}/loss'], loss, rtol=1e-5)
    right = (logits.argmax(1) == label).mean()
    np.testing.assert_allclose(values[f'{task}/accuracy'], right, rtol=1e-6)


def test_the_log_shows_what_the_aggregator_saw():
  cases = {'f_mgda': digits.of_config('f_mgda')}
  step = quick_compile.jit(digits.step_of(cases))
  metrics = step(digits.start(cases), digits.batch())[1]['f_mgda']
  weights = [float(metrics[f'{t}/weight']) for t in digits.names()]
  np.testing.assert_allclose(sum(weights), 1, rtol=1e-5)
  for name in ('conflict', 'flat/conflict'):
    assert float(metrics[name]) in (0.0, 1.0)
  for name in ('gradient_norm', 'flat_gradient_norm', 'flat_weight'):
    assert float(metrics[f'task_1/{name}']) > 0


def test_the_optimizer_is_asked_for_one_gradient():
  """What is clipped is what the method made, before Adam."""
  config = digits.config('mgda', clip=1e-3)
  cases = {
    'clipped': digits.case(
      build.joint_update(config, digits.names()),
      optax.chain(optax.clip_by_global_norm(1e-3), optax.sgd(1.0)),
    )
  }
  states = digits.start(cases)
  after, _ = quick_compile.jit(digits.step_of(cases))(states, digits.batch())
  way = jax.tree.map(
    jnp.subtract, after['clipped'].params, states['clipped'].params
  )
  np.testing.assert_allclose(optax.tree.norm(way), 1e-3, rtol=1e-3)
