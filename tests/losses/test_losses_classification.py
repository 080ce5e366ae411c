"""Cross-entropy, against its definition in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import losses


def _reference(logits, label):
  logits = np.asarray(logits, np.float64)
  log_sum = np.log(np.exp(logits).sum(-1))
  return log_sum - np.take_along_axis(logits, label[..., None], -1)[..., 0]


@pytest.mark.parametrize('shape', [(6,), (2, 3, 4)])
def test_cross_entropy_is_minus_the_log_probability_of_the_label(shape):
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(*shape, 5)).astype(np.float32) * 3
  label = rng.integers(0, 5, shape)
  loss = losses.cross_entropy(jnp.asarray(logits), jnp.asarray(label))
  assert loss.shape == shape
  np.testing.assert_allclose(loss, _reference(logits, label), rtol=1e-5)


def test_cross_entropy_of_huge_logits_is_finite():
  logits = jnp.array([[1e30, 0.0], [0.0, -1e30]])
  loss = losses.cross_entropy(logits, jnp.array([0, 0]))
  np.testing.assert_array_equal(loss, [0.0, 0.0])


@pytest.mark.parametrize('foreign', [-1, -3, 3, 255])
def test_label_that_is_no_class_is_seen_where_it_is_not_masked(foreign):
  loss = losses.cross_entropy(jnp.zeros((2, 3)), jnp.array([foreign, 0]))
  assert np.isnan(loss[0])
  assert np.isfinite(loss[1])


@pytest.mark.parametrize('foreign', [-1, -3, 3, 255])
def test_label_that_is_no_class_reaches_nothing_under_a_zero_mask(foreign):
  rng = np.random.default_rng(1)
  logits = jnp.asarray(rng.normal(size=(3, 3)), jnp.float32)
  mask = jnp.array([1.0, 0.0, 1.0])

  def mean(logits, label):
    return losses.masked_mean(losses.cross_entropy(logits, label), mask)

  value, gradient = jax.value_and_grad(mean)(logits, jnp.array([0, foreign, 2]))
  expected, expected_gradient = jax.value_and_grad(mean)(
    logits, jnp.array([0, 1, 2])
  )
  assert value == expected
  np.testing.assert_array_equal(gradient, expected_gradient)


def test_labels_that_are_not_integers_are_an_error():
  with pytest.raises(TypeError, match=r'label.*float32'):
    losses.cross_entropy(jnp.zeros((2, 3)), jnp.zeros(2))


@pytest.mark.parametrize('shape', [(2, 3), (2, 1), (3,), ()])
def test_labels_that_would_broadcast_are_an_error(shape):
  with pytest.raises(ValueError, match='label'):
    losses.cross_entropy(jnp.zeros((2, 3)), jnp.zeros(shape, jnp.int32))
