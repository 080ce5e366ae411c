"""Convolution and pooling in forms that XLA's CPU backend is fast at.

It has slow paths for exactly the shapes of small images: the gradient of
`reduce_window`, convolutions on images of 2x2 or 3x3, the gradient of a
convolution with a stride, and wide kernels over few channels. Its convolutions
also multiply by the zeros of the padding, which are most of what a 3x3 kernel
meets on an image of 2x2.

It also brings convolutions into the one layout that its fast path knows, but
not inside loops, where those that differentiation makes take many times longer.
The derivative of a convolution is therefore given here, in that layout, and
that of pooling from the places of the maxima. They are of reverse mode
(`jax.custom_vjp`): `jax.jvp` of a gradient works, `jax.jvp` of the operations
themselves does not.
"""

from collections.abc import Callable
import functools
import math
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

# Above these sizes the copies, sums or zeros of the matrix products cost more
# than the native convolution.
_MAX_NARROW = 16
_MAX_BAND_WIDTH = 40
_MAX_BAND_OUTPUTS = 160
_MAX_OUTPUTS = 16
_MAX_ROW_CHANNELS = 64
_ROW_OUTPUTS = range(49, 145)

_NO_PADDING = ((0, 0), (0, 0))
_MAX_STRIDED_OUTPUTS = 400


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
  outputs = math.prod(_out_size(shape, kernel_shape, strides, padding))
  if outputs <= (_MAX_STRIDED_OUTPUTS if strided else _MAX_OUTPUTS):
    return _conv_by_patches if narrow else _conv_by_taps
  if channels <= _MAX_ROW_CHANNELS and not strided and outputs in _ROW_OUTPUTS:
    return _conv_by_rows
  return _conv_in_layout


def _out_size(shape, kernel_shape, strides, padding):
  return tuple(
    (shape[1 + i] + sum(padding[i]) - kernel_shape[i]) // strides[i] + 1
    for i in range(2)
  )


def _windows(x, kernel_shape, strides, out_size):
  """Yields, for each place in the window, its value at all outputs."""
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


def _conv_by_patches(x, kernel, strides, padding, precision):
  """One product of all patches [B, H', W', patch] with the kernel."""
  x = _patches(x, kernel.shape, strides, padding)
  kernel = kernel.reshape(1, 1, -1, kernel.shape[-1])
  return _conv_by_taps(x, kernel, (1, 1), _NO_PADDING, precision)


def _conv_by_rows(x, kernel, strides, padding, precision):
  """One product for each row of the kernel, of patches that are one row."""
  height, width, channels, features = kernel.shape
  across = (1, strides[1]), ((0, 0), padding[1])
  x = _patches(x, (1, width, channels, features), *across)
  kernel = kernel.reshape(height, 1, width * channels, features)
  down = (strides[0], 1), (padding[0], (0, 0))
  return _conv_by_taps(x, kernel, *down, precision)


def _patches(x, kernel_shape, strides, padding):
  """What the kernel meets at every output [B, H', W', height width C]."""
  out_size = _out_size(x.shape, kernel_shape, strides, padding)
  x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
  windows = _windows(x, kernel_shape, strides, out_size)
  return jnp.concatenate(list(windows), axis=-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _conv_by_taps(x, kernel, strides, padding, precision):
  """The sum over places in the kernel of one product each.

  A product has those inputs alone that the place meets, so that nothing is
  multiplied by the zeros of the padding.
  """
  return _sum_over_taps(x, kernel, strides, padding, precision)


def _sum_over_taps(x, kernel, strides, padding, precision):
  wide = jnp.promote_types(x.dtype, jnp.float32)
  out_size = _out_size(x.shape, kernel.shape, strides, padding)
  out = jnp.zeros((x.shape[0], *out_size, kernel.shape[-1]), wide)
  for tap in _taps(x.shape, kernel.shape, strides, padding):
    value = jnp.matmul(
      tap.inputs_of(x),
      kernel[tap.place],
      precision=precision,
      preferred_element_type=wide,
    )
    out += tap.among_outputs(value, out_size)
  return out.astype(x.dtype)


def _conv_by_taps_forward(x, kernel, strides, padding, precision):
  return _sum_over_taps(x, kernel, strides, padding, precision), (x, kernel)


def _conv_by_taps_backward(strides, padding, precision, saved, cotangent):
  """Both gradients, tap by tap."""
  x, kernel = saved
  wide = jnp.promote_types(x.dtype, jnp.float32)
  product = functools.partial(
    jnp.matmul, precision=precision, preferred_element_type=wide
  )
  rows = lambda value: value.reshape(-1, value.shape[-1])
  of_x = jnp.zeros(x.shape, wide)
  of_kernel = {}
  for tap in _taps(x.shape, kernel.shape, strides, padding):
    outputs = tap.outputs_of(cotangent)
    of_kernel[tap.place] = product(rows(tap.inputs_of(x)).T, rows(outputs))
    value = product(outputs, kernel[tap.place].T)
    of_x += tap.among_inputs(value, x.shape)
  zeros = jnp.zeros(kernel.shape[2:], wide)
  places = np.ndindex(*kernel.shape[:2])
  stacked = jnp.stack([of_kernel.get(place, zeros) for place in places])
  return (
    of_x.astype(x.dtype),
    stacked.reshape(kernel.shape).astype(kernel.dtype),
  )


_conv_by_taps.defvjp(_conv_by_taps_forward, _conv_by_taps_backward)


class _Tap(NamedTuple):
  """A place in the kernel, and the outputs that have an input there.

  Attributes:
    place: (row, column) in the kernel.
    first_in: the first input that it meets, (row, column).
    first_out: the first output that it is part of.
    count: how many there are of them, by row and column.
    strides: from one of the inputs to the next.
  """

  place: tuple[int, int]
  first_in: tuple[int, int]
  first_out: tuple[int, int]
  count: tuple[int, int]
  strides: tuple[int, int]

  def inputs_of(self, x):
    last = [self.first_in[i] + self._span(i) for i in range(2)]
    return lax.slice(
      x,
      (0, *self.first_in, 0),
      (x.shape[0], *last, x.shape[3]),
      (1, *self.strides, 1),
    )

  def outputs_of(self, out):
    last = [self.first_out[i] + self.count[i] for i in range(2)]
    return lax.slice(
      out, (0, *self.first_out, 0), (out.shape[0], *last, out.shape[3])
    )

  def among_inputs(self, value, shape):
    """`value` where `inputs_of` takes it from, zero elsewhere."""
    space = [
      (low, shape[1 + i] - low - self._span(i), self.strides[i] - 1)
      for i, low in enumerate(self.first_in)
    ]
    return _pad(value, space)

  def among_outputs(self, value, out_size):
    space = [
      (low, out_size[i] - low - self.count[i], 0)
      for i, low in enumerate(self.first_out)
    ]
    return _pad(value, space)

  def _span(self, i):
    return (self.count[i] - 1) * self.strides[i] + 1


def _pad(value, space):
  none = (0, 0, 0)
  return lax.pad(value, jnp.zeros((), value.dtype), (none, *space, none))


def _taps(shape, kernel_shape, strides, padding):
  """Yields the taps that meet an input at all."""
  out_size = _out_size(shape, kernel_shape, strides, padding)
  for place in np.ndindex(*kernel_shape[:2]):
    ends = []
    for i in range(2):
      offset = place[i] - padding[i][0]
      first = max(0, -(offset // strides[i]))
      last = min(out_size[i] - 1, (shape[1 + i] - 1 - offset) // strides[i])
      ends.append((offset + first * strides[i], first, last - first + 1))
    first_in, first_out, count = zip(*ends, strict=True)
    if min(count) > 0:
      yield _Tap(place, first_in, first_out, count, strides)


def _conv_by_bands(x, kernel, strides, padding, precision):
  """A convolution over the height alone, with banded matrices over the width.

  Some columns of a row of the image are one vector of their W x C channels. At
  every height in the kernel a matrix [W x C, W' x features] holds that row of
  the kernel once for each output column. It multiplies by zeros too, but has
  wide channels, which the native convolution is fast for.
  """
  del strides  # ones
  height, kernel_width, channels, features = kernel.shape
  rows_out, columns_out = _out_size(x.shape, kernel.shape, (1, 1), padding)
  # Fewer columns at once have fewer zeros, and more have wider products.
  strips = math.ceil(columns_out * features / _MAX_BAND_OUTPUTS)
  strips = min(strips, columns_out)
  columns = math.ceil(columns_out / strips)
  width = columns + kernel_width - 1
  # The last one may be of columns that no output has.
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
  # With one axis of space: as images one column wide it takes twice as long.
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
  """The native convolution, over one or two axes of space."""
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
  # From the first to the last output, in steps of the input; a stride leaves
  # rows between them and, where it does not divide, rows behind the last.
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def max_pool(x: jax.Array, window: int, stride: int, padding: int) -> jax.Array:
  """Maximum over square windows, see `layers.max_pool`."""
  return _max_and_place(x, window, stride, padding)[0]


def _max_and_place(x, window, stride, padding):
  """The maximum of every window, and where in the window it is first."""
  shape = (window,) * 2
  strides, pads = (stride,) * 2, ((padding,) * 2,) * 2
  out_size = _out_size(x.shape, shape, strides, pads)
  x = jnp.pad(x, ((0, 0), *pads, (0, 0)), constant_values=-jnp.inf)
  first, *rest = _windows(x, shape, strides, out_size)
  place = jnp.zeros(first.shape, jnp.int16)
  for number, value in enumerate(rest, 1):
    larger = (value > first) | (jnp.isnan(value) & ~jnp.isnan(first))
    first = jnp.where(larger, value, first)
    place = jnp.where(larger, jnp.int16(number), place)
  return first, place


def _max_pool_forward(x, window, stride, padding):
  out, place = _max_and_place(x, window, stride, padding)
  return out, (place, x)


def _max_pool_backward(window, stride, padding, saved, cotangent):
  place, x = saved
  sizes = [n + 2 * padding for n in x.shape[1:3]]
  total = jnp.zeros((x.shape[0], *sizes, x.shape[3]), cotangent.dtype)
  for number, lows in enumerate(np.ndindex(window, window)):
    space = [
      (
        low,
        sizes[i] - low - (cotangent.shape[1 + i] - 1) * stride - 1,
        stride - 1,
      )
      for i, low in enumerate(lows)
    ]
    total += _pad(jnp.where(place == number, cotangent, 0), space)
  ends = [padding + n for n in x.shape[1:3]]
  inside = (0, padding, padding, 0), (x.shape[0], *ends, x.shape[3])
  return (lax.slice(total, *inside),)


max_pool.defvjp(_max_pool_forward, _max_pool_backward)
