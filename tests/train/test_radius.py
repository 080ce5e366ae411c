"""A radius that rounding swallows is warned of, once, before the first step."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import multi_digits
from mtl_jax.train import experiment as experiments
from mtl_jax.train import loop
from mtl_jax.train import radius


def _config(rho=1e-4, compute_dtype='bfloat16', adaptive=False):
  config = multi_digits.get_config('runlocal,method=f_linear')
  config.method.flat.update(rho=rho, adaptive=adaptive)
  config.compute_dtype = compute_dtype
  return config


def _shared():
  rng = np.random.default_rng(0)
  return {
    'kernel': rng.normal(size=(40, 30)).astype(np.float32),
    'bias': np.zeros(30, np.float32),
  }


@pytest.mark.parametrize('adaptive', [False, True])
def test_rounding_is_what_a_cast_and_back_changes(adaptive):
  w = _shared()['kernel']
  error = w - w.astype(jnp.bfloat16).astype(np.float32)
  expected = np.linalg.norm(error / w if adaptive else error)
  actual = radius.rounding(_shared(), 7, adaptive)
  np.testing.assert_allclose(actual, expected, rtol=1e-5)
  # About a fifth of the distance between two numbers, at a random place.
  length = w.size**0.5 if adaptive else np.linalg.norm(w)
  assert 0.15 < actual / (2**-7 * length) < 0.25


@pytest.mark.parametrize(
  ('platform', 'compute_dtype', 'precision', 'bits'),
  [
    ('cpu', 'float32', 'default', 23),
    ('cpu', 'bfloat16', 'highest', 7),
    ('gpu', 'float32', 'default', 10),
    ('gpu', 'float32', 'highest', 23),
    ('tpu', 'float32', 'default', 7),
    ('tpu', 'float32', 'highest', 23),
  ],
)
def test_bits_are_those_of_the_products(
  platform, compute_dtype, precision, bits
):
  config = _config(compute_dtype=compute_dtype)
  config.precision = precision
  assert radius.mantissa_bits(config, platform) == bits


@pytest.mark.parametrize('adaptive', [False, True])
def test_warned_of_is_a_radius_below_a_third_of_rounding_alone(
  adaptive, caplog
):
  least = radius.rounding(_shared(), 7, adaptive) / 3
  for rho, dtype, warned in (
    (0.9 * least, 'bfloat16', True),
    (1.1 * least, 'bfloat16', False),
    (1e-3 * least, 'float32', False),
    (0.0, 'bfloat16', False),
  ):
    caplog.clear()
    radius.warn_if_too_small(_config(rho, dtype, adaptive), _shared())
    assert ('method.flat.rho is' in caplog.text) == warned


def test_run_warns_before_it_compiles(tmp_path, monkeypatch, caplog):
  def stop(self, state):
    raise KeyboardInterrupt

  monkeypatch.setattr(experiments.Experiment, 'compile_step', stop)
  with caplog.at_level(logging.WARNING), pytest.raises(KeyboardInterrupt):
    loop.train(_config(), tmp_path)
  (record,) = [r for r in caplog.records if r.name == 'mtl_jax.train.radius']
  assert 'rounding to 7 bits (compute_dtype bfloat16' in record.getMessage()


def test_evaluation_is_in_the_compute_dtype_too():
  experiment = experiments.make_experiment(_config())
  params, model_state = jax.eval_shape(
    lambda: experiment.init().train[1:3],
  )
  batch = experiment.sources['test'].__getitems__(np.arange(16))
  text = experiment.eval_step.lower(
    params, model_state, batch, experiment.empty_sums
  ).as_text()
  products = [line for line in text.splitlines() if 'dot_general' in line]
  assert products
  assert all('bf16' in line for line in products)
