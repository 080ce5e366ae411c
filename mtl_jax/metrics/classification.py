"""Metrics of classification tasks."""

import jax.numpy as jnp

from mtl_jax import types
from mtl_jax.metrics import averages


def accuracy() -> types.Metric:
  """Share of labels that have the largest score, from 0 to 1.

  Predictions are scores [B, ..., C], labels integers [B, ...], and the mask is
  [B] or has more of the labels' axes. Among equal scores the first class is
  taken.

  Returns:
    The metric `'accuracy'`; NaN without any label.

  Examples:
    >>> import jax.numpy as jnp
    >>> from mtl_jax import metrics
    >>> accuracy = metrics.accuracy()
    >>> scores = jnp.array([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]])
    >>> label, mask = jnp.array([1, 0, 1, 1]), jnp.ones(4)
    >>> float(accuracy.finish(accuracy.accumulate(scores, label, mask)))
    0.75
  """

  def correct(prediction, label):
    return jnp.argmax(prediction, axis=-1) == label

  return averages.average('accuracy', correct, higher_is_better=True)
