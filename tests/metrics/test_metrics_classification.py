"""Accuracy, against counts made by hand."""

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax import metrics

# The largest scores are those of classes 2, 0, 1, 1.
_SCORES = np.array(
  [[0.1, 0.2, 0.7], [0.5, 0.3, 0.2], [0.1, 0.8, 0.1], [0.2, 0.6, 0.2]],
  np.float32,
)
_LABEL = np.array([2, 0, 1, 0], np.int32)


def _accuracy(scores, label, mask):
  metric = metrics.accuracy()
  sums = jax.jit(metric.accumulate)(scores, label, mask)
  return float(metric.finish(sums))


def test_accuracy_is_the_share_of_labels_with_the_largest_score():
  assert _accuracy(_SCORES, _LABEL, np.ones(4, np.float32)) == 0.75


def test_labels_without_a_mask_do_not_count():
  mask = np.array([1, 0, 0, 1], np.float32)
  assert _accuracy(_SCORES, _LABEL, mask) == 0.5


def test_nan_scores_and_foreign_labels_under_a_zero_mask_do_not_count():
  scores = _SCORES.copy()
  scores[1] = np.nan
  label = np.array([2, -1, 255, 0], np.int32)
  mask = np.array([1, 0, 0, 1], np.float32)
  assert _accuracy(scores, label, mask) == 0.5


def test_accuracy_without_labels_is_nan():
  assert np.isnan(_accuracy(_SCORES, _LABEL, np.zeros(4, np.float32)))


def test_sums_of_batches_add_up_to_the_sums_of_the_split():
  metric = metrics.accuracy()
  mask = np.array([1, 0, 1, 1], np.float32)
  parts = [
    metric.accumulate(_SCORES[part], _LABEL[part], mask[part])
    for part in (slice(0, 3), slice(3, 4))
  ]
  total = jax.tree.map(jnp.add, *parts)
  # Batches of unequal size: the mean of their accuracies would be 1 / 2.
  np.testing.assert_allclose(metric.finish(total), 2 / 3, rtol=1e-6)


def test_pixels_of_present_images_all_count():
  scores = np.stack([_SCORES, _SCORES])
  label = np.stack([_LABEL, np.zeros(4, np.int32)])
  assert _accuracy(scores, label, np.array([0, 1], np.float32)) == 0.25


def test_mask_of_pixels_selects_pixels():
  mask = np.array([[0, 0, 0, 1], [1, 1, 0, 0]], np.float32)
  scores = np.stack([_SCORES, _SCORES])
  label = np.stack([_LABEL, np.zeros(4, np.int32)])
  np.testing.assert_allclose(_accuracy(scores, label, mask), 1 / 3, rtol=1e-6)


def test_average_of_a_value_is_its_mean_over_present_labels():
  metric = metrics.average(
    'error', lambda p, y: jnp.abs(p - y), higher_is_better=False
  )
  prediction = np.array([1.0, 2.0, np.nan], np.float32)
  label = np.array([0.0, 5.0, 1.0], np.float32)
  sums = metric.accumulate(prediction, label, np.array([1.0, 1.0, 0.0]))
  assert float(metric.finish(sums)) == 2.0
  assert (metric.name, metric.higher_is_better) == ('error', False)
