"""The optimizer that a config stands for."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

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
    optimizer.make_optimizer(_config(**{key: value}), NAMES, total_steps=10).tx


@pytest.mark.parametrize(
  'name',
  [
    *('cagrade', 'diagnostics', 'Solution', 'ParamLabels', 'default_labels'),
    *('flat_minima', 'shared_only', 'from_gram', 'Aggregator'),
  ],
)
def test_a_name_that_is_no_aggregators_is_refused_with_those_there_are(name):
  config = _config()
  config.method.aggregator = name
  with pytest.raises(
    ValueError,
    match=r"\('cagrad', 'imtl_g', 'linear', 'mgda', 'pcgrad'\), got "
    f"'{name}'",
  ):
    optimizer.make_optimizer(config, NAMES, total_steps=10).tx


def test_head_scale_that_a_flat_method_does_not_use_is_refused():
  config = _config()
  with config.unlocked():
    config.method.head_scale = 'mean'
    config.method.flat = {'rho': 0.1}
  with pytest.raises(ValueError, match=r"'mean'.*set method\.flat\.head_scale"):
    optimizer.make_optimizer(config, NAMES, total_steps=10).tx


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
