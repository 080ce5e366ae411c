"""Means over present labels."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
  """Mean of the values whose mask is not zero, and 0 without any.

  A masked-out value, even NaN, reaches neither the mean nor the gradient with
  respect to `values`. It can still reach gradients further back, because zero
  times NaN is NaN; `masked_loss` is safe there too.

  Args:
    values: [B, ...], such as the loss of each example or pixel.
    mask: 1 or 0; [B], or more of the leading axes of `values`.

  Returns:
    A scalar: the sum over present values divided by max(their count, 1). The
    mean is over all devices when `values` is a global array inside `jit`.

  Raises:
    ValueError: if the mask's shape is not a prefix of the shape of `values`.

  Examples:
    >>> import jax.numpy as jnp
    >>> from mtl_jax import losses
    >>> values = jnp.array([1.0, jnp.nan, 3.0])
    >>> float(losses.masked_mean(values, jnp.array([1.0, 0.0, 1.0])))
    2.0
  """
  present = jnp.broadcast_to(_present(mask, values, 'values'), values.shape)
  total = jnp.where(present, values, 0).sum()
  return total / jnp.maximum(present.sum(), 1).astype(total.dtype)


def masked_loss(
  loss: Callable[[Any, Any], jax.Array],
  prediction: jax.Array,
  label: jax.Array,
  mask: jax.Array,
) -> jax.Array:
  """Mean of a task's loss over its present labels.

  Masked-out predictions and labels are replaced by zeros before the loss. A
  selection after the loss would not suffice: the derivative of the loss at a
  NaN is NaN, and zero times NaN is NaN.

  Args:
    loss: `(prediction, label) -> [B, ...]`, like `Task.loss`.
    prediction: [B, ...].
    label: [B, ...].
    mask: 1 or 0; [B], or more of the leading axes that all three share.

  Returns:
    A scalar: the loss summed over present labels divided by max(count, 1).

  Raises:
    ValueError: if the mask's shape is not a prefix of the other shapes.
  """
  prediction = jnp.where(
    _present(mask, prediction, 'prediction'), prediction, 0
  )
  label = jnp.where(_present(mask, label, 'label'), label, 0)
  return masked_mean(loss(prediction, label), mask)


def _present(mask, values, name):
  """The mask as booleans, with the rank of `values`."""
  if mask.shape != values.shape[: mask.ndim]:
    raise ValueError(
      f'mask must have the leading axes of {name} {values.shape}, got'
      f' {mask.shape}'
    )
  return (mask != 0).reshape(mask.shape + (1,) * (values.ndim - mask.ndim))
