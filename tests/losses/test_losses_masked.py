"""What has no label reaches neither a loss nor a gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import losses

_MASK = jnp.array([1.0, 0.0, 1.0, 0.0])


def _squared(prediction, label):
  return jnp.square(prediction - label)


@pytest.mark.parametrize('bad', [jnp.nan, jnp.inf, -jnp.inf])
def test_mean_is_over_present_values_whatever_the_others_are(bad):
  values = jnp.array([1.0, bad, 5.0, bad])
  value, gradient = jax.value_and_grad(losses.masked_mean)(values, _MASK)
  assert value == 3.0
  np.testing.assert_array_equal(gradient, [0.5, 0.0, 0.5, 0.0])


def test_mean_of_nothing_is_zero_with_zero_gradient():
  values = jnp.array([jnp.nan, 1.0])
  value, gradient = jax.value_and_grad(losses.masked_mean)(values, jnp.zeros(2))
  assert value == 0.0
  np.testing.assert_array_equal(gradient, [0.0, 0.0])


def test_mean_over_pixels_counts_pixels():
  values = jnp.arange(8.0).reshape(2, 2, 2)
  # The second image alone, then one pixel of each image.
  assert losses.masked_mean(values, jnp.array([0.0, 1.0])) == 5.5
  mask = jnp.zeros((2, 2, 2)).at[0, 0, 1].set(1).at[1, 1, 1].set(1)
  assert losses.masked_mean(values, mask) == 4.0


@pytest.mark.parametrize('bad', [jnp.nan, jnp.inf])
@pytest.mark.parametrize('where', ['label', 'prediction'])
def test_gradient_is_finite_where_an_absent_row_is_not(bad, where):
  prediction = jnp.array([1.0, 2.0, 3.0, 4.0])
  label = jnp.array([0.0, 0.0, 1.0, 0.0])
  spoil = lambda x: x.at[1].set(bad).at[3].set(bad)
  if where == 'label':
    label = spoil(label)
  else:
    prediction = spoil(prediction)
  value, gradient = jax.value_and_grad(
    lambda p: losses.masked_loss(_squared, p, label, _MASK)
  )(prediction)
  assert value == 2.5  # (1 + 4) / 2
  np.testing.assert_array_equal(gradient, [1.0, 0.0, 2.0, 0.0])


def test_mean_after_the_loss_alone_would_let_nan_through():
  # Why `masked_loss` replaces the inputs too.
  label = jnp.array([0.0, jnp.nan, 1.0, jnp.nan])

  def root(prediction, label):
    return jnp.sqrt(jnp.square(prediction - label))

  def gradient(mean):
    return jax.grad(mean)(jnp.array([1.0, 2.0, 3.0, 4.0]))

  late = gradient(lambda p: losses.masked_mean(root(p, label), _MASK))
  early = gradient(lambda p: losses.masked_loss(root, p, label, _MASK))
  assert np.isnan(late).any()
  np.testing.assert_array_equal(early, [0.5, 0.0, 0.5, 0.0])


def test_masked_loss_of_images_takes_a_mask_of_images_or_of_pixels():
  rng = np.random.default_rng(0)
  prediction = jnp.asarray(rng.normal(size=(2, 3, 3)), jnp.float32)
  label = jnp.asarray(rng.normal(size=(2, 3, 3)), jnp.float32)
  label = label.at[1].set(jnp.nan)
  expected = np.square(np.float64(prediction[0]) - np.float64(label[0])).mean()
  for mask in (
    jnp.array([1.0, 0.0]),
    jnp.broadcast_to(jnp.array([[[1.0]], [[0.0]]]), (2, 3, 3)),
  ):
    value = losses.masked_loss(_squared, prediction, label, mask)
    np.testing.assert_allclose(value, expected, rtol=1e-6)


def test_masked_loss_of_classes_ignores_nan_logits_of_absent_rows():
  logits = jnp.array([[0.0, 0.0], [jnp.nan, 1.0]])
  value, gradient = jax.value_and_grad(
    lambda x: losses.masked_loss(
      losses.cross_entropy, x, jnp.array([1, -1]), jnp.array([1.0, 0.0])
    )
  )(logits)
  np.testing.assert_allclose(value, np.log(2), rtol=1e-6)
  np.testing.assert_allclose(gradient, [[0.5, -0.5], [0, 0]], atol=1e-7)


@pytest.mark.parametrize('shape', [(3,), (1,), (4, 1), (4, 2)])
def test_mask_that_would_broadcast_is_an_error(shape):
  with pytest.raises(ValueError, match='mask'):
    losses.masked_mean(jnp.zeros(4), jnp.ones(shape))


def test_loss_never_sees_what_has_no_label():
  # So that a search for NaN (`jax_debug_nans`) finds only real ones.
  seen = []

  def loss(prediction, label):
    seen.extend([prediction, label])
    return _squared(prediction, label)

  bad = jnp.array([1.0, jnp.nan, 2.0, jnp.inf])
  losses.masked_loss(loss, bad, bad, _MASK)
  for array in seen:
    np.testing.assert_array_equal(array, [1.0, 0.0, 2.0, 0.0])
