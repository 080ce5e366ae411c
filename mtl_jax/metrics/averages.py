"""Metrics that are the mean of a value over all labels in a split."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax import types


def average(
  name: str,
  values: Callable[[Any, Any], jax.Array],
  *,
  higher_is_better: bool,
) -> types.Metric:
  """The mean of `values` over the present labels.

  Args:
    name: name of the metric.
    values: `(prediction [B, ...], label [B, ...]) -> [B, ...]`.
    higher_is_better: whether a larger value is a better one.

  Returns:
    A metric that sums `{'total', 'count'}` in float32; NaN without any label. A
    mask is [B], or has more of the values' leading axes.
  """

  def accumulate(prediction, label, mask):
    value = values(prediction, label)
    present = (mask != 0).reshape(mask.shape + (1,) * (value.ndim - mask.ndim))
    present = jnp.broadcast_to(present, value.shape)
    return {
      'total': jnp.where(present, value, 0).sum(dtype=jnp.float32),
      'count': present.sum(dtype=jnp.float32),
    }

  def finish(sums):
    return sums['total'] / sums['count']

  return types.Metric(name, accumulate, finish, higher_is_better)
