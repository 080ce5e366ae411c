"""Convolution, pooling and dense layers that are fast on every backend.

Convolutions and pooling have the forms from `models/cpu/` on CPU and the native
forms elsewhere and inside `native_layers()`. The choice follows
`jax.default_backend()` while tracing. `jax.lax.platform_dependent` would choose
while lowering, but it is a conditional, whose derivative keeps the intermediate
values of both branches. The price is that a computation on the CPU of a machine
with an accelerator gets the native operation: the same numbers, but slower.
"""

from collections.abc import Iterator
from collections.abc import Sequence
import contextlib
import contextvars

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp

from mtl_jax.models.cpu import convolutions
from mtl_jax.models.cpu import pooling

_native = contextvars.ContextVar('native', default=False)


@contextlib.contextmanager
def native_layers() -> Iterator[None]:
  """Context in which layers are traced in their native form on CPU too.

  The forms for CPU have only reverse-mode derivatives: `jax.jvp` of a model
  needs the native ones. The native forms also serve for comparisons of numbers
  and time. A function that was compiled outside keeps its form.

  Yields:
    Nothing.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> from mtl_jax import models
    >>> pool = lambda x: models.layers.max_pool(x, 2, 2)
    >>> x = jnp.arange(4.0).reshape(1, 2, 2, 1)
    >>> with models.native_layers():
    ...   _, tangent = jax.jvp(pool, (x,), (x,))
    >>> print(tangent.ravel())
    [3.]
  """
  token = _native.set(True)
  try:
    yield
  finally:
    _native.reset(token)


def _has_cpu_forms():
  return jax.default_backend() == 'cpu' and not _native.get()


def dense(features: int, fan_in: int, name: str | None = None) -> nn.Dense:
  """A dense layer with PyTorch's default initialization.

  Kernel and bias are uniform in +-1/sqrt(fan_in), as in `torch.nn.Linear`.

  Args:
    features: number of outputs.
    fan_in: number of inputs, which the layer does not know when it draws its
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
  """A square convolution with equal padding on all sides, as in PyTorch.

  `'SAME'` with a stride of 2 pads an even image on one side only, which is a
  different function.

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
  """`jax.lax.conv_general_dilated`, in another form if CPUs need it.

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
  if plain and _has_cpu_forms():
    strides, padding = tuple(strides), tuple(map(tuple, padding))
    inputs, kernel = _varying_alike(inputs, kernel)
    form = convolutions.fastest_conv(
      inputs.shape, kernel.shape, strides, padding
    )
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
  cotangent. A NaN in a window is its maximum. On CPU only the reverse-mode
  derivative exists.

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
  if _has_cpu_forms():
    return pooling.max_pool(x, window, stride, padding)
  return nn.max_pool(
    x, (window, window), (stride, stride), [(padding, padding)] * 2
  )


def _varying_alike(*arrays):
  """The arrays, inside shard_map varying over the union of their mapped axes.

  The transpose of this cast is the sum over replicas, which a custom derivative
  (`jax.custom_vjp`) must not contain.
  """
  axes = [jax.typeof(x).manual_axis_type.varying for x in arrays]
  union = frozenset().union(*axes)
  return [
    jax.lax.pcast(x, tuple(union - own), to='varying') if union - own else x
    for x, own in zip(arrays, axes, strict=True)
  ]


def _symmetric_uniform(bound):
  def init(key, shape, dtype=jnp.float32):
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return init
