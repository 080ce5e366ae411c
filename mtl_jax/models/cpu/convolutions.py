"""Convolutions in forms that are fast on XLA's CPU backend.

That backend has slow paths for exactly the shapes of small images: convolutions
on images of 2x2 or 3x3, the gradient of a convolution with a stride, and wide
kernels over few channels. Its convolutions also multiply by the zeros of the
padding, which make up most of the input to a 3x3 kernel on an image of 2x2.

It brings convolutions into the one layout that its fast path knows, but not
inside loops. There the convolutions from differentiation take many times
longer. The derivative of a convolution is therefore given here, in that layout,
for reverse mode (`jax.custom_vjp`): `jax.jvp` of a gradient works, `jax.jvp` of
the convolution itself does not.
"""

from collections.abc import Callable
import functools
import math

import jax
from jax import lax
import jax.numpy as jnp

from mtl_jax.models.cpu import spans
from mtl_jax.models.cpu import taps

# Above these sizes the copies, sums or zeros of the matrix products cost more
# than the native convolution.
_MAX_NARROW = 16
_MAX_BAND_WIDTH = 40
_MAX_BAND_OUTPUTS = 160
_MAX_OUTPUTS = 16
_MAX_ROW_CHANNELS = 64
_ROW_OUTPUTS = range(49, 145)
_MAX_STRIDED_OUTPUTS = 400

_NO_PADDING = ((0, 0), (0, 0))


def fastest_conv(
  shape: tuple[int, ...],
  kernel_shape: tuple[int, ...],
  strides: tuple[int, int],
  padding: tuple[tuple[int, int], ...],
) -> Callable[..., jax.Array]:
  """The convolution that is fastest for these shapes.

  Args:
    shape: images [B, H, W, C].
    kernel_shape: [height, width, C, features].
    strides: stride in each direction.
    padding: zeros before and behind, in each direction.

  Returns:
    `(images, kernel, strides, padding, precision) -> [B, H', W', features]`.
  """
  _, _, width, channels = shape
  strided = strides != (1, 1)
  narrow = channels <= _MAX_NARROW
  if narrow and not strided and width <= _MAX_BAND_WIDTH:
    return _conv_by_bands
  outputs = math.prod(spans.out_size(shape, kernel_shape, strides, padding))
  if outputs <= (_MAX_STRIDED_OUTPUTS if strided else _MAX_OUTPUTS):
    return _conv_by_patches if narrow else taps.conv_by_taps
  if channels <= _MAX_ROW_CHANNELS and not strided and outputs in _ROW_OUTPUTS:
    return _conv_by_rows
  return _conv_in_layout


def _conv_by_patches(x, kernel, strides, padding, precision):
  """One product of all patches [B, H', W', patch] with the kernel."""
  x = _patches(x, kernel.shape, strides, padding)
  kernel = kernel.reshape(1, 1, -1, kernel.shape[-1])
  return taps.conv_by_taps(x, kernel, (1, 1), _NO_PADDING, precision)


def _conv_by_rows(x, kernel, strides, padding, precision):
  """One product for each row of the kernel, with patches of one row."""
  height, width, channels, features = kernel.shape
  across = (1, strides[1]), ((0, 0), padding[1])
  x = _patches(x, (1, width, channels, features), *across)
  kernel = kernel.reshape(height, 1, width * channels, features)
  down = (strides[0], 1), (padding[0], (0, 0))
  return taps.conv_by_taps(x, kernel, *down, precision)


def _patches(x, kernel_shape, strides, padding):
  """The kernel's input at every output [B, H', W', height width C]."""
  out_size = spans.out_size(x.shape, kernel_shape, strides, padding)
  x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
  windows = spans.windows(x, kernel_shape, strides, out_size)
  return jnp.concatenate(list(windows), axis=-1)


def _conv_by_bands(x, kernel, strides, padding, precision):
  """A convolution over the height only, with banded matrices over the width.

  Several columns in a row of the image are one vector of W x C channels. For
  every row of the kernel a matrix [W x C, W' x features] holds that row once
  for each output column. The product includes zeros, but it has wide channels,
  for which the native convolution is fast.
  """
  del strides  # ones
  height, kernel_width, channels, features = kernel.shape
  rows_out, columns_out = spans.out_size(x.shape, kernel.shape, (1, 1), padding)
  # Fewer columns at once have fewer zeros, and more have wider products.
  strips = math.ceil(columns_out * features / _MAX_BAND_OUTPUTS)
  strips = min(strips, columns_out)
  columns = math.ceil(columns_out / strips)
  width = columns + kernel_width - 1
  # The last band may contain columns without an output.
  low, high = padding[1]
  high += strips * columns - columns_out
  x = jnp.pad(x, ((0, 0), (0, 0), (low, high), (0, 0)))
  batch, rows, *_ = x.shape
  pieces = jnp.stack(
    [x[:, :, i * columns : i * columns + width] for i in range(strips)], axis=1
  )
  bands = jnp.stack(
    [
      jnp.pad(kernel, ((0, 0), (j, columns - 1 - j), (0, 0), (0, 0)))
      for j in range(columns)
    ],
    axis=3,
  )
  # With one spatial axis: images one column wide take twice as long.
  out = _conv_in_layout(
    pieces.reshape(batch * strips, rows, width * channels),
    bands.reshape(height, width * channels, columns * features),
    (1,),
    padding[:1],
    precision,
  )
  out = out.reshape(batch, strips, rows_out, columns, features)
  out = out.swapaxes(1, 2).reshape(batch, rows_out, strips * columns, features)
  return out[:, :, :columns_out]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _conv_in_layout(x, kernel, strides, padding, precision):
  """The native convolution, over one or two spatial axes."""
  return _native(x, kernel, padding, precision, strides=strides)


def _native(x, kernel, padding, precision, *, strides=None, **dilation):
  space = 'HW'[: x.ndim - 2]
  layout = f'N{space}C', f'{space}IO', f'N{space}C'
  return lax.conv_general_dilated(
    x,
    kernel,
    strides or (1,) * len(space),
    padding,
    dimension_numbers=layout,
    precision=precision,
    **dilation,
  )


def _conv_in_layout_forward(x, kernel, strides, padding, precision):
  out = _native(x, kernel, padding, precision, strides=strides)
  return out, (x, kernel)


def _conv_in_layout_backward(strides, padding, precision, saved, cotangent):
  """Both gradients as convolutions whose operands are transposed first."""
  x, kernel = saved
  axes = tuple(range(len(strides)))
  before = [low for low, _ in padding]
  # From the first to the last output, in steps of the input. A stride skips
  # rows between them and, if it does not divide, rows behind the last.
  spans = [(cotangent.shape[1 + i] - 1) * strides[i] + 1 for i in axes]
  mirrored = [kernel.shape[i] - 1 - before[i] for i in axes]
  of_x = _native(
    cotangent,
    jnp.flip(kernel, axes).swapaxes(-1, -2),
    [
      (low, x.shape[1 + i] + kernel.shape[i] - 1 - spans[i] - low)
      for i, low in enumerate(mirrored)
    ],
    precision,
    lhs_dilation=strides,
  )
  # Channels are the batch, and the batch is the channels.
  of_kernel = _native(
    jnp.swapaxes(x, 0, -1),
    jnp.moveaxis(cotangent, 0, -2),
    [
      (low, kernel.shape[i] - 1 + spans[i] - x.shape[1 + i] - low)
      for i, low in enumerate(before)
    ],
    precision,
    rhs_dilation=strides,
  )
  return of_x, jnp.moveaxis(of_kernel, 0, -2)


_conv_in_layout.defvjp(_conv_in_layout_forward, _conv_in_layout_backward)
