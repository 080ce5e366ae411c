"""The joint update and the optimizer that a config stands for."""

import digits
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from configs import methods
import mtl_jax
from mtl_jax.train import build

NAMES = ('a', 'b')
PARAMS = {
  'shared': jnp.array([1.0, -2.0]),
  'heads': {'a': jnp.array(3.0), 'b': jnp.array(-1.0)},
}
# Of the two tasks' losses below.
GRADS = {
  'shared': jnp.array([[3.0, 0.0], [0.0, 4.0]]),
  'heads': {'a': jnp.array(2.0), 'b': jnp.array(-5.0)},
}


def loss_fn(params, batch):
  del batch
  shared, heads = params['shared'], params['heads']
  return {
    'a': 3 * shared[0] + 2 * heads['a'],
    'b': 4 * shared[1] - 5 * heads['b'],
  }


HERE = mtl_jax.task_losses(loss_fn, NAMES, engine='unroll').on(())


def _joint(config):
  return build.joint_update(config, NAMES)


def _first_moment(config):
  """Adam's first moment, over the share of one step: what Adam was given."""
  joint, tx = _joint(config), build.optimizer(config, total_steps=10)
  found, _ = joint.update(HERE, PARAMS, joint.init(PARAMS))
  _, state = tx.update(found.grads, tx.init(PARAMS), PARAMS)
  (adam,) = (part for part in state if hasattr(part, 'mu'))
  heads = adam.mu['heads']
  return 10 * np.array([*adam.mu['shared'], heads['a'], heads['b']])


def test_clipping_acts_on_the_aggregated_gradient():
  # The mean is (1.5, 2) and half of each head's gradient, which is 3.67 long.
  # Each task's own is 3.6 and 6.4 long.
  mean = np.array([1.5, 2.0, 1.0, -2.5])
  length = np.linalg.norm(mean)
  for clip, factor in ((4.0, 1.0), (2.0, 2 / length)):
    found = _first_moment(digits.config(clip=clip))
    np.testing.assert_allclose(found, factor * mean, rtol=1e-5)


@pytest.mark.parametrize(
  ('name', 'shared', 'heads'),
  [
    # Perpendicular gradients of lengths 3 and 4. The weights 1 / |g_i| make
    # both parts 1, and the clip shortens (1, 1) but not the heads.
    ('nash_mtl', (0.5**0.5, 0.5**0.5), (2 / 3, -5 / 4)),
    # The weights |g_i|^(-4/3).
    (
      'fairgrad',
      (3 ** (-1 / 3), 4 ** (-1 / 3)),
      (2 * 3 ** (-4 / 3), -5 * 4 ** (-4 / 3)),
    ),
  ],
)
def test_plain_entry_is_the_run_of_a_public_code(name, shared, heads):
  config = digits.config()
  config.method = ml_collections.ConfigDict(methods.entry(name))
  np.testing.assert_allclose(
    _first_moment(config), [*shared, *heads], rtol=1e-5
  )


def test_decay_is_decoupled_from_the_gradient():
  grads = jax.tree.map(jnp.ones_like, PARAMS)

  def updates(decay):
    tx = build.optimizer(digits.config(weight_decay=decay), total_steps=10)
    return tx.update(grads, tx.init(PARAMS), PARAMS)[0]

  difference = jax.tree.map(jnp.subtract, updates(0.5), updates(0.0))
  jax.tree.map(
    lambda d, p: np.testing.assert_allclose(d, -0.01 * 0.5 * p, rtol=1e-4),
    difference,
    PARAMS,
  )


@pytest.mark.parametrize(
  ('schedule', 'expected'),
  [('constant', (0.1, 0.1)), ('cosine', (0.05, 0.0)), ('step', (0.05, 0.05))],
)
def test_schedule_at_half_and_end_of_the_run(schedule, expected):
  rate = build.learning_rate_schedule(
    digits.config(schedule=schedule, learning_rate=0.1).optimizer, 10
  )
  np.testing.assert_allclose(float(rate(0)), 0.1, rtol=1e-6)
  found = [float(rate(5)), float(rate(10))]
  np.testing.assert_allclose(found, expected, atol=1e-8)


@pytest.mark.parametrize(
  ('key', 'value'),
  [
    ('learning_rate', 0.0),
    ('schedule', 'linear'),
    ('clip', -1.0),
    ('weight_decay', -0.1),
  ],
)
def test_a_value_out_of_range_is_named(key, value):
  with pytest.raises(ValueError, match=rf'{key}.*{value}'):
    build.optimizer(digits.config(**{key: value}), total_steps=10)


def test_a_clip_of_the_shared_part_out_of_range_is_named():
  config = digits.config()
  with config.unlocked():
    config.method.clip_shared = 0.0
  with pytest.raises(ValueError, match=r'method\.clip_shared .* got 0\.0'):
    build.optimizer(config, total_steps=10)


@pytest.mark.parametrize(
  'name',
  [
    *('cagrade', 'diagnostics', 'Solution', 'ParamLabels', 'default_labels'),
    *('flat_minima', 'shared_only', 'from_gram', 'Aggregator'),
    *('every', 'weighted', 'per_group', 'uncertainty'),
  ],
)
def test_a_name_that_is_no_aggregators_is_refused_with_those_there_are(name):
  config = digits.config()
  config.method.aggregator = name
  with pytest.raises(
    ValueError,
    match=rf"method.aggregator must be one of \(.*'pcgrad'.*\), got '{name}'",
  ):
    _joint(config)


def test_head_scale_that_a_flat_method_does_not_use_is_refused():
  config = digits.config()
  with config.unlocked():
    config.method.head_scale = 'mean'
    config.method.flat = {'rho': 0.1}
  with pytest.raises(ValueError, match=r"'mean'.*set method\.flat\.head_scale"):
    _joint(config)


@pytest.mark.parametrize(
  ('aggregator', 'kwargs', 'message'),
  [
    ('pcgrad', {'c': 0.4}, "kwargs.c is no argument of 'pcgrad', which takes"),
    ('cagrad', {'num_tasks': 2}, 'kwargs.num_tasks is no argument'),
    ('cagrad', {'c': 'x'}, "kwargs.c of 'cagrad' must be a number, got 'x'"),
    ('cagrad', {'c': True}, 'must be a number, got True'),
    ('linear', {'weights': (1, 'x')}, 'must be a tuple of numbers or None'),
    ('krum', {'num_selected': 1.5}, 'must be an integer, got 1.5'),
    ('graddrop', {'leak': None}, 'must be a number or a tuple of numbers, got'),
  ],
)
def test_argument_that_a_factory_does_not_take_is_named(
  aggregator, kwargs, message
):
  config = digits.config()
  with config.unlocked():
    config.method.aggregator = aggregator
    config.method.kwargs = kwargs
  with pytest.raises(ValueError, match=message):
    _joint(config)


def test_argument_that_a_factory_needs_is_named():
  config = _with_weighting('static_weights')
  with pytest.raises(ValueError, match="'static_weights' must hold 'weights'"):
    _joint(config)
  with config.unlocked():
    config.method.kwargs = {'weights': [1, 0.5]}
    config.method.flat = {'rh': 0.1}
  with pytest.raises(ValueError, match=r'method\.flat\.rh is no argument'):
    _joint(config)


def test_a_random_method_draws_from_the_seed_of_the_run():
  config = digits.config()
  config.method.aggregator = 'pcgrad'
  keys = []
  for seed in (0, 1):
    config.seed = seed
    state = _joint(config).init(PARAMS)
    (key,) = [
      leaf
      for leaf in jax.tree.leaves(state)
      if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    ]
    keys.append(jax.random.key_data(key).tolist())
  assert keys[0] != keys[1]


def _with_weighting(name, flat=None, **kwargs):
  config = digits.config()
  with config.unlocked():
    config.method.aggregator = None
    config.method.weighting = name
    config.method.kwargs = kwargs
    config.method.flat = flat
  return config


def test_a_weighting_alone_takes_the_gradient_of_the_weighted_loss():
  # Losses 9 and -3.
  config = _with_weighting('static_weights', weights=(2.0, 3.0))
  joint = _joint(config)
  found, state = joint.update(HERE, PARAMS, joint.init(PARAMS))
  np.testing.assert_allclose(found.grads['shared'], [6.0, 12.0])
  np.testing.assert_allclose(found.grads['heads']['b'], -15.0)
  np.testing.assert_allclose(state.task_weights, [2.0, 3.0])
  assert joint.after_step is None
  assert _joint(_with_weighting('famo')).after_step is not None


def test_a_weighting_inside_flat_minima_is_given_the_losses_after_the_step():
  joint = _joint(
    _with_weighting('famo', flat=digits.config('f_mgda').method.flat)
  )
  losses = mtl_jax.task_losses(
    lambda params, batch: {'a': params['shared'][0], 'b': jnp.float32(2)}, NAMES
  )
  _, state = joint.update(losses.on(()), PARAMS, joint.init(PARAMS))
  state = joint.after_step(
    jnp.array([0.5, 2.0]), state, active=jnp.array([True, True])
  )
  for part in (state.loss, state.flat):
    logits = part.memory.weighting.logits
    assert logits[0] < 0 < logits[1]


def test_a_weighting_may_be_an_argument_by_its_name():
  config = _with_weighting(
    'first_then', first='equal_weights', steps=1, then='si'
  )
  weighting = build.make_weighting(config.method)
  losses = jnp.array([1.0, 4.0])
  first, state = weighting.update(losses, weighting.init(2))
  then, _ = weighting.update(losses, state)
  np.testing.assert_allclose([first, then], [[0.5, 0.5], [1.0, 0.25]])


@pytest.mark.parametrize('name', ['cagrad', 'glss', 'weighted'])
def test_a_name_that_is_no_weightings_is_refused(name):
  with pytest.raises(ValueError, match=f"method.weighting .*got '{name}'"):
    _joint(_with_weighting(name))


def test_a_bilevel_weighting_has_no_flat_version():
  config = _with_weighting('auto_lambda', flat={'rho': 0.1})
  with pytest.raises(ValueError, match=r"'auto_lambda'.*no flat-minima"):
    _joint(config)


def test_a_step_that_is_not_finite_is_skipped_where_the_config_says_so():
  tx = build.optimizer(digits.config(skip_nonfinite=3), total_steps=10)
  bad = {**PARAMS, 'shared': PARAMS['shared'] * jnp.nan}
  updates, state = tx.update(bad, tx.init(PARAMS), PARAMS)
  jax.tree.map(lambda u: np.testing.assert_array_equal(u, 0 * u), updates)
  assert int(state.skipped) == 1


@pytest.mark.parametrize(
  ('how', 'change', 'message'),
  [
    ('stak', {}, "joint_update must be one of .*, got 'stak'"),
    *(
      (
        how,
        {'aggregator': None, 'weighting': weighting, 'flat': None},
        rf"joint_update is '{how}', but method\.weighting '{weighting}'",
      )
      for how in ('gram', 'ghost', 'features')
      for weighting in ('gls', 'auto_lambda')
    ),
    ('features', {}, r"joint_update='features'.*method\.flat must be None"),
    *(
      (how, {'combine': 'direct'}, rf"{how}_update.*combine='separate', got")
      for how in ('gram', 'ghost')
    ),
    ('gram', {'aggregator': 'graddrop'}, 'gram_update needs an aggregator'),
    (
      'ghost',
      {'adaptive': True},
      'flat.adaptive must be False for ghost_update',
    ),
  ],
)
def test_a_method_and_an_update_that_do_not_go_together_are_named(
  how, change, message
):
  config = digits.config('f_mgda', joint_update=how)
  with config.unlocked():
    for key, value in change.items():
      part = config.method if key in config.method else config.method.flat
      part[key] = value
  with pytest.raises(ValueError, match=message):
    _joint(config)
