"""Convolution, pooling and dense layers that are fast on every backend.

On CPU convolutions and pooling have the forms of
`cpu_convolutions` and `cpu_pooling`, elsewhere the
native ones.

The choice is made by `jax.default_backend()` while tracing.
`jax.lax.platform_dependent` would choose while lowering, but it is a
conditional: its derivative keeps the intermediate values of both branches. The
price is that a computation sent to the CPU of a machine with an accelerator
gets the native operation: the same numbers, slower.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
import contextlib
from typing import Any

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp

from mtl_jax.models import cpu_convolutions
from mtl_jax.models import cpu_pooling


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
    inputs, kernel = _varying_alike(inputs, kernel)
    form = cpu_convolutions.fastest_conv(
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
  cotangent. A NaN in a window is its maximum. On CPU the derivative is of
  reverse mode alone.

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
    return cpu_pooling.max_pool(x, window, stride, padding)
  return nn.max_pool(
    x, (window, window), (stride, stride), [(padding, padding)] * 2
  )


@contextlib.contextmanager
def intercept_dense(
  multiply: Callable[[jax.Array, jax.Array], jax.Array], params: Any
) -> Iterator[None]:
  """Inside of it flax's dense layers multiply by way of `multiply`.

  Only `nn.Dense` itself is meant, with its usual product; subclasses, and
  layers with a `dot_general`, a `precision` or a `promote_dtype` of their own,
  stay as they are.

  Args:
    multiply: `(x [..., in], kernel [in, out]) -> [..., out]`, such as
      `mtl_jax.ghost_update` gives to a loss function.
    params: a tree; layers whose kernel is one of its leaves, the same object,
      are meant. What a model makes of its parameters first (casts, or the
      blocks of `remat`) is another object.

  Yields:
    Nothing.

  Raises:
    ValueError: at the end, if no such layer was called.

  Examples:
    >>> from flax import linen as nn
    >>> import jax, jax.numpy as jnp
    >>> from mtl_jax import models
    >>> model, x = nn.Dense(3), jnp.ones((1, 2))
    >>> params = model.init(jax.random.key(0), x)
    >>> with models.intercept_dense(lambda x, w: 0 * (x @ w) + 20, params):
    ...   print(model.apply(params, x))
    [[20. 20. 20.]]
  """
  kernels = jax.tree.leaves(params)
  called = []

  def call(next_call, args, keywords, context):
    module = context.module
    if context.method_name != '__call__' or not _is_usual_dense(module):
      return next_call(*args, **keywords)
    own = module.variables.get('params', {})
    if not any(own.get('kernel') is leaf for leaf in kernels):
      return next_call(*args, **keywords)
    called.append(module.name)
    (x,) = (*args, *keywords.values())
    kernel, bias = own['kernel'], own.get('bias')
    x, _, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=module.dtype)
    y = multiply(x, kernel)
    return y if bias is None else y + bias.reshape((1,) * (y.ndim - 1) + (-1,))

  with nn.intercept_methods(call):
    yield
  if not called:
    raise ValueError(
      'params must hold kernels of dense layers as the model uses them; of '
      f'{len(kernels)} leaves no layer that was called uses one'
    )


def _is_usual_dense(module):
  usual = nn.Dense(1, parent=None)
  names = 'precision', 'dot_general', 'dot_general_cls', 'promote_dtype'
  return type(module) is nn.Dense and all(
    getattr(module, name) is getattr(usual, name) for name in names
  )


def _varying_alike(*arrays):
  """Inside shard_map: the arrays as varying over the mapped axes of any.

  The transpose of that is the sum over replicas, which a derivative of its own
  (`jax.custom_vjp`) must not make.
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
