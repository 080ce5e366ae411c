"""Convolution, pooling and dense layers that are fast on every backend.

XLA's CPU backend has slow paths for exactly the shapes of small images: the
gradient of `reduce_window`, convolutions on images of 2x2 or 3x3, the gradient
of a convolution with a stride, and wide kernels over few channels. On CPU those
are written here in other operations; on GPU and TPU the native one is used.

It also brings convolutions into the one layout that its fast path knows, but
not inside loops, where those that differentiation makes take many times longer.
On CPU the derivative of a convolution is therefore given here, in that layout.
It is one of reverse mode (`jax.custom_vjp`): `jax.jvp` of a gradient works
there, `jax.jvp` of the convolution itself does not.

The choice is made by `jax.default_backend()` while tracing.
`jax.lax.platform_dependent` would choose while lowering, but it is a
conditional: its derivative keeps the intermediate values of both branches. The
price is that a computation sent to the CPU of a machine with an accelerator
gets the native operation: the same numbers, slower.
"""

from collections.abc import Sequence
import functools
import math

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp

# Above these sizes the copies or the zeros of the matrix products cost more
# than the native convolution.
_MAX_BAND_CHANNELS = 16
_MAX_BAND_WIDTH = 40
_MAX_PATCHES = 16
_MAX_STRIDED_PATCHES = 400


def dense(features: int, fan_in: int, name: str | None = None) -> nn.Dense:
  """A dense layer with PyTorch's default initialization.

  Kernel and bias are uniform in +-1/sqrt(fan_in), as in `torch.nn.Linear`.

  Args:
    features: number of outputs.
    fan_in: number of inputs, which the layer cannot tell when it draws its
      bias.
    name: name of the layer inside a compact module.

  Returns:
    The layer.
  """
  return nn.Dense(
    features,
    kernel_init=nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform'),
    bias_init=_symmetric_uniform(fan_in**-0.5),
    name=name,
  )


def conv(
  features: int,
  kernel_size: int,
  *,
  stride: int = 1,
  padding: int = 0,
  kernel_init=None,
  bias_fan_in: int | None = None,
  name: str | None = None,
) -> nn.Conv:
  """A square convolution, padded alike on all sides as in PyTorch.

  `'SAME'` with a stride of 2 pads an even image on one side only, which is
  another function.

  Args:
    features: number of output channels.
    kernel_size: height and width of the kernel.
    stride: stride in both directions.
    padding: zeros on each side.
    kernel_init: initializer of the kernel; by default PyTorch's, uniform in
      +-1/sqrt(fan_in).
    bias_fan_in: the kernel's fan-in (height x width x input channels), with
      which a bias is drawn uniformly in +-1/sqrt(fan_in); None for no bias.
    name: name of the layer inside a compact module.

  Returns:
    The layer.
  """
  return nn.Conv(
    features,
    (kernel_size, kernel_size),
    strides=(stride, stride),
    padding=[(padding, padding), (padding, padding)],
    use_bias=bias_fan_in is not None,
    kernel_init=kernel_init
    or nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform'),
    bias_init=_symmetric_uniform((bias_fan_in or 1) ** -0.5),
    conv_general_dilated=conv_general_dilated,
    name=name,
  )


def conv_general_dilated(
  inputs: jax.Array,
  kernel: jax.Array,
  strides: Sequence[int],
  padding,
  *,
  lhs_dilation=None,
  rhs_dilation=None,
  dimension_numbers=None,
  feature_group_count: int = 1,
  precision=None,
) -> jax.Array:
  """`jax.lax.conv_general_dilated`, in another form where CPUs need it.

  For `flax.linen.Conv(conv_general_dilated=...)`.

  Args:
    inputs: images [B, H, W, C].
    kernel: [height, width, C, features].
    strides: stride in each direction.
    padding: a pair of amounts for each direction, or a string of `lax`.
    lhs_dilation: see `jax.lax.conv_general_dilated`; leads to that function.
    rhs_dilation: likewise.
    dimension_numbers: layout, understood here as NHWC, HWIO, NHWC.
    feature_group_count: likewise; groups lead to `jax.lax`.
    precision: precision of the products.

  Returns:
    Images [B, H', W', features].
  """
  plain = (
    inputs.ndim == 4
    and not isinstance(padding, str)
    and feature_group_count == 1
    and all(d == 1 for d in (*(lhs_dilation or ()), *(rhs_dilation or ())))
  )
  if plain and jax.default_backend() == 'cpu':
    strides, padding = tuple(strides), tuple(map(tuple, padding))
    form = _cpu_form(inputs.shape, kernel.shape, strides, padding)
    return form(inputs, kernel, strides, padding, precision)
  return lax.conv_general_dilated(
    inputs,
    kernel,
    strides,
    padding,
    lhs_dilation=lhs_dilation,
    rhs_dilation=rhs_dilation,
    dimension_numbers=dimension_numbers,
    feature_group_count=feature_group_count,
    precision=precision,
  )


def max_pool(
  x: jax.Array, window: int, stride: int, padding: int = 0
) -> jax.Array:
  """Maximum over square windows.

  The gradient of a window goes to its first maximum in row-major order, on
  every backend (as in PyTorch), so the gradients of the inputs add up to the
  cotangent. A NaN in a window is its maximum.

  Args:
    x: images [B, H, W, C], floating point.
    window: height and width of the window.
    stride: stride in both directions.
    padding: minus infinities on each side; at most half the window.

  Returns:
    Images [B, H', W', C] with H' = (H + 2 padding - window) // stride + 1.

  Raises:
    ValueError: if the padding exceeds half the window.
  """
  if padding > window // 2:
    raise ValueError(
      f'padding must be at most half the window {window}, got {padding}'
    )
  if jax.default_backend() == 'cpu':
    return _max_pool_by_slices(x, window, stride, padding)
  return nn.max_pool(
    x, (window, window), (stride, stride), [(padding, padding)] * 2
  )


def _symmetric_uniform(bound):
  def init(key, shape, dtype=jnp.float32):
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return init


def _cpu_form(shape, kernel_shape, strides, padding):
  """The form that is fastest for these shapes."""
  _, _, width, channels = shape
  strided = strides != (1, 1)
  narrow = channels <= _MAX_BAND_CHANNELS and width <= _MAX_BAND_WIDTH
  if narrow and not strided:
    return _conv_by_bands
  patches = math.prod(_out_size(shape, kernel_shape, strides, padding))
  if patches <= (_MAX_STRIDED_PATCHES if strided else _MAX_PATCHES):
    return _conv_by_patches
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
  out_size = _out_size(x.shape, kernel.shape, strides, padding)
  x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
  patches = jnp.concatenate(
    list(_windows(x, kernel.shape, strides, out_size)), axis=-1
  )
  return jnp.matmul(
    patches, kernel.reshape(-1, kernel.shape[-1]), precision=precision
  )


def _conv_by_bands(x, kernel, strides, padding, precision):
  """A convolution over the height alone, with banded matrices over the width.

  A row of the image is one vector of W x C channels. At every height in the
  kernel a matrix [W x C, W' x features] holds that row of the kernel once for
  each output column. It multiplies by zeros too, but has wide channels, which
  the native convolution is fast for.
  """
  del strides  # ones
  height, kernel_width, channels, features = kernel.shape
  out_size = _out_size(x.shape, kernel.shape, (1, 1), padding)
  x = jnp.pad(x, ((0, 0), (0, 0), padding[1], (0, 0)))
  batch, rows, width, _ = x.shape
  bands = jnp.stack(
    [
      jnp.pad(kernel, ((0, 0), (j, width - kernel_width - j), (0, 0), (0, 0)))
      for j in range(out_size[1])
    ],
    axis=3,
  )
  # With one axis of space: as images one column wide it takes twice as long.
  out = _conv_in_layout(
    x.reshape(batch, rows, width * channels),
    bands.reshape(height, width * channels, out_size[1] * features),
    (1,),
    padding[:1],
    precision,
  )
  return out.reshape(batch, *out_size, features)


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


def _max_pool_by_slices(x, window, stride, padding):
  """The running maximum of strided slices, by selections.

  `jnp.maximum` would split the gradient of a tie; a selection gives it to the
  first, which is what `reduce_window` does.
  """
  kernel_shape, strides, pads = (window,) * 2, (stride,) * 2, [(padding,) * 2]
  out_size = _out_size(x.shape, kernel_shape, strides, pads * 2)
  x = jnp.pad(x, ((0, 0), *pads * 2, (0, 0)), constant_values=-jnp.inf)
  first, *rest = _windows(x, kernel_shape, strides, out_size)
  for value in rest:
    first = jnp.where((value > first) | jnp.isnan(value), value, first)
  return first
