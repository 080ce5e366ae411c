"""Positions of windows over images, for the CPU's convolutions and pooling."""

from jax import lax
import jax.numpy as jnp


def out_size(shape, kernel_shape, strides, padding):
  """(H', W') for images [B, H, W, C] and a kernel [height, width, ...]."""
  return tuple(
    (shape[1 + i] + sum(padding[i]) - kernel_shape[i]) // strides[i] + 1
    for i in range(2)
  )


def windows(x, kernel_shape, strides, out_size):
  """Yields, for each place in the window, its values [B, H', W', C]."""
  for i in range(kernel_shape[0]):
    for j in range(kernel_shape[1]):
      yield lax.slice(
        x,
        (0, i, j, 0),
        (
          x.shape[0],
          i + (out_size[0] - 1) * strides[0] + 1,
          j + (out_size[1] - 1) * strides[1] + 1,
          x.shape[3],
        ),
        (1, *strides, 1),
      )


def pad(value, space):
  """Images with zeros before, behind and between, for each of two axes."""
  none = (0, 0, 0)
  return lax.pad(value, jnp.zeros((), value.dtype), (none, *space, none))
