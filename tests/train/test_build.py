"""The optimizer that a config stands for."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from configs import methods
from mtl_jax.train import optimizer

NAMES = ('a', 'b')
PARAMS = {
  'shared': jnp.array([1.0, -2.0]),
  'heads': {'a': jnp.array(3.0), 'b': jnp.array(-1.0)},
}
GRADS = {
  'shared': jnp.array([[3.0, 0.0], [0.0, 4.0]]),
  'heads': {'a': jnp.array(0.0), 'b': jnp.array(0.0)},
}


def _config(**optimizer_values):
  return ml_collections.ConfigDict(
    {
      'method': {
        'aggregator': 'linear',
        'weighting': None,
        'kwargs': {},
        'head_scale': None,
        'flat': None,
      },
      'optimizer': {
        'learning_rate': 0.1,
        'schedule': 'constant',
        'clip': None,
        'weight_decay': 0.0,
        'skip_nonfinite': None,
        **optimizer_values,
      },
      'seed': 0,
    }
  )


def _updates(config, steps=1):
  tx = optimizer.make_optimizer(config, NAMES, total_steps=10).tx
  state = tx.init(PARAMS)
  for _ in range(steps):
    updates, state = tx.update(GRADS, state, PARAMS)
  return updates


def test_clipping_acts_on_the_aggregated_gradient():
  # The mean (1.5, 2) has norm 2.5, each task's gradient 3 and 4. Clipped to
  # 2.5 or more the mean is left alone; the first Adam step shows only signs,
  # so the second moments tell, after a step with the gradient doubled.
  tx = optimizer.make_optimizer(_config(clip=2.5), NAMES, total_steps=10).tx
  _, state = tx.update(GRADS, tx.init(PARAMS), PARAMS)
  moments = [
    leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    if '.mu' in jax.tree_util.keystr(path) and leaf.shape == (2,)
  ]
  np.testing.assert_allclose(moments[0], 0.1 * jnp.array([1.5, 2.0]), rtol=1e-6)


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
  config = _config()
  config.method = ml_collections.ConfigDict(methods.entry(name))
  tx = optimizer.make_optimizer(config, NAMES, total_steps=10).tx
  grads = {
    'shared': GRADS['shared'],
    'heads': {'a': jnp.array(2.0), 'b': jnp.array(-5.0)},
  }
  _, state = tx.update(grads, tx.init(PARAMS), PARAMS)
  (adam,) = (part for part in state if hasattr(part, 'mu'))
  found = [*adam.mu['shared'], adam.mu['heads']['a'], adam.mu['heads']['b']]
  np.testing.assert_allclose(
    found, 0.1 * np.array([*shared, *heads]), rtol=1e-5
  )


def test_decay_is_decoupled_from_the_gradient():
  plain = _updates(_config())
  decayed = _updates(_config(weight_decay=0.5))
  difference = jax.tree.map(jnp.subtract, decayed, plain)
  jax.tree.map(
    lambda d, p: np.testing.assert_allclose(d, -0.1 * 0.5 * p, rtol=1e-5),
    difference,
    PARAMS,
  )


@pytest.mark.parametrize(
  ('schedule', 'expected'),
  [('constant', (0.1, 0.1)), ('cosine', (0.05, 0.0)), ('step', (0.05, 0.05))],
)
def test_schedule_at_half_and_end_of_the_run(schedule, expected):
  rate = optimizer.learning_rate_schedule(
    _config(schedule=schedule).optimizer, 10
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
    optimizer.make_optimizer(_config(**{key: value}), NAMES, total_steps=10)


def test_a_clip_of_the_shared_part_out_of_range_is_named():
  config = _config()
  with config.unlocked():
    config.method.clip_shared = 0.0
  with pytest.raises(ValueError, match=r'method\.clip_shared .* got 0\.0'):
    optimizer.make_optimizer(config, NAMES, total_steps=10)


@pytest.mark.parametrize(
  'name',
  [
    *('cagrade', 'diagnostics', 'Solution', 'ParamLabels', 'default_labels'),
    *('flat_minima', 'shared_only', 'from_gram', 'Aggregator'),
    *('every', 'weighted', 'per_group', 'uncertainty'),
  ],
)
def test_a_name_that_is_no_aggregators_is_refused_with_those_there_are(name):
  config = _config()
  config.method.aggregator = name
  with pytest.raises(
    ValueError,
    match=rf"method.aggregator must be one of \(.*'pcgrad'.*\), got '{name}'",
  ):
    optimizer.make_optimizer(config, NAMES, total_steps=10)


def test_head_scale_that_a_flat_method_does_not_use_is_refused():
  config = _config()
  with config.unlocked():
    config.method.head_scale = 'mean'
    config.method.flat = {'rho': 0.1}
  with pytest.raises(ValueError, match=r"'mean'.*set method\.flat\.head_scale"):
    optimizer.make_optimizer(config, NAMES, total_steps=10)


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
  config = _config()
  with config.unlocked():
    config.method.aggregator = aggregator
    config.method.kwargs = kwargs
  with pytest.raises(ValueError, match=message):
    optimizer.make_optimizer(config, NAMES, total_steps=10)


def test_argument_that_a_factory_needs_is_named():
  config = _with_weighting('static_weights')
  with pytest.raises(ValueError, match="'static_weights' must hold 'weights'"):
    optimizer.make_optimizer(config, NAMES, total_steps=10)
  with config.unlocked():
    config.method.kwargs = {'weights': [1, 0.5]}
    config.method.flat = {'rh': 0.1}
  with pytest.raises(ValueError, match=r'method\.flat\.rh is no argument'):
    optimizer.make_optimizer(config, NAMES, total_steps=10)


def test_a_random_method_draws_from_the_seed_of_the_run():
  config = _config()
  config.method.aggregator = 'pcgrad'
  keys = []
  for seed in (0, 1):
    config.seed = seed
    state = optimizer.make_optimizer(config, NAMES, total_steps=10).tx.init(
      PARAMS
    )
    (key,) = [
      leaf
      for leaf in jax.tree.leaves(state)
      if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    ]
    keys.append(jax.random.key_data(key).tolist())
  assert keys[0] != keys[1]


def _with_weighting(name, flat=None, **kwargs):
  config = _config()
  with config.unlocked():
    config.method.aggregator = None
    config.method.weighting = name
    config.method.kwargs = kwargs
    config.method.flat = flat
  return config


def test_a_weighting_alone_needs_no_task_gradients():
  made = optimizer.make_optimizer(_with_weighting('gls'), NAMES, total_steps=10)
  weights, _ = made.weighting.update(
    jnp.array([1.0, 2.0]), made.weighting.init(2)
  )
  root = 2**0.5
  np.testing.assert_allclose(weights, [root / 2, root / 4], rtol=1e-6)
  # The chain takes the gradient of the weighted loss, without a task axis.
  updates, _ = made.tx.update(PARAMS, made.tx.init(PARAMS), PARAMS)
  assert updates['shared'].shape == (2,)


def test_a_weighting_inside_flat_minima_is_told_the_losses_after_the_step():
  config = _with_weighting('famo', flat={'rho': 0.1})
  made = optimizer.make_optimizer(config, NAMES, total_steps=10)
  assert made.weighting is None
  losses = jnp.array([1.0, 2.0])
  _, state = made.tx.update(
    GRADS, made.tx.init(PARAMS), PARAMS, losses=losses, grad_fn=lambda _: GRADS
  )
  told = made.after_step(jnp.array([0.5, 2.0]), state, jnp.array([True, True]))
  for part in ('loss', 'flat'):
    logits = getattr(told[0], part).memory.weighting.logits
    assert logits[0] < 0 < logits[1]


def test_a_weighting_may_be_an_argument_by_its_name():
  config = _with_weighting(
    'first_then', first='equal_weights', steps=1, then='si'
  )
  weighting = optimizer.make_weighting(config.method)
  losses = jnp.array([1.0, 4.0])
  first, state = weighting.update(losses, weighting.init(2))
  then, _ = weighting.update(losses, state)
  np.testing.assert_allclose([first, then], [[0.5, 0.5], [1.0, 0.25]])


@pytest.mark.parametrize('name', ['cagrad', 'glss', 'weighted'])
def test_a_name_that_is_no_weightings_is_refused(name):
  with pytest.raises(ValueError, match=f"method.weighting .*got '{name}'"):
    optimizer.make_optimizer(_with_weighting(name), NAMES, total_steps=10)


def test_a_bilevel_weighting_has_no_flat_version():
  config = _with_weighting('auto_lambda', flat={'rho': 0.1})
  with pytest.raises(ValueError, match=r"'auto_lambda'.*no flat-minima"):
    optimizer.make_optimizer(config, NAMES, total_steps=10)


def test_a_step_that_is_not_finite_is_skipped_where_the_config_says_so():
  made = optimizer.make_optimizer(
    _config(skip_nonfinite=3), NAMES, total_steps=10
  )
  bad = {**GRADS, 'shared': GRADS['shared'] * jnp.nan}
  updates, state = made.tx.update(bad, made.tx.init(PARAMS), PARAMS)
  jax.tree.map(lambda u: np.testing.assert_array_equal(u, 0 * u), updates)
  assert int(state.skipped) == 1
