"""The CPU's forms of convolution and pooling are the native operations."""

import collections
import functools

from flax import linen as nn
import jax
import jax.extend.core
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import numpy_layers
import pytest

from mtl_jax import models
from mtl_jax.models import layers

_LAYOUT = ('NHWC', 'HWIO', 'NHWC')

# (image, input channels, features, kernel size, stride, padding)
_CONVS = {
  'lenet_1': ((36, 36), 1, 10, 9, 1, 0),
  'lenet_2': ((14, 14), 10, 20, 5, 1, 0),
  'resnet_first': ((36, 36), 1, 4, 7, 2, 3),
  'resnet_wide': ((9, 9), 20, 8, 3, 1, 1),
  'resnet_next': ((5, 5), 20, 8, 3, 1, 1),
  'resnet_halving': ((9, 9), 20, 24, 3, 2, 1),
  'resnet_shortcut': ((5, 5), 20, 24, 1, 2, 0),
  'image_3x3': ((3, 3), 20, 16, 3, 1, 1),
  'image_2x2': ((2, 2), 20, 16, 3, 1, 1),
  'image_1x1': ((1, 1), 20, 16, 3, 1, 1),
  'narrow_padded': ((7, 5), 3, 4, 3, 1, 1),
  # 17 columns of 12 features: strips of 9, the last with one too many.
  'narrow_strips': ((3, 19), 2, 12, 3, 1, 0),
  'not_square': ((6, 9), 20, 8, 3, 2, 1),
}


def _native(x, kernel, stride, padding):
  return jax.lax.conv_general_dilated(
    x,
    kernel,
    (stride, stride),
    [(padding, padding)] * 2,
    dimension_numbers=_LAYOUT,
  )


def _ours(x, kernel, stride, padding):
  return layers.conv_general_dilated(
    x,
    kernel,
    (stride, stride),
    [(padding, padding)] * 2,
    dimension_numbers=_LAYOUT,
  )


def _inputs(size, channels, features, kernel_size, batch=3):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(batch, *size, channels))
  kernel = rng.normal(size=(kernel_size, kernel_size, channels, features))
  return jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32)


def _cotangent(out):
  return jnp.sin(jnp.arange(1.0, out.size + 1).reshape(out.shape))


def _close(actual, expected, tolerance=3e-6):
  scale = np.abs(expected).max()
  np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * scale)


def _gradients(function, x, kernel, *options):
  out, back = jax.vjp(lambda x, k: function(x, k, *options), x, kernel)
  return back(_cotangent(out))


def _transposed(function, x, kernel, *options):
  """The gradient by a map over kernels and a transposition."""

  def run(kernel):
    out, linear = jax.linearize(lambda k: function(x, k, *options), kernel)
    return jax.linear_transpose(linear, kernel)(_cotangent(out))[0]

  return jax.vmap(run)(jnp.stack([kernel, 2 * kernel]))


def _hessian_product(function, x, kernel, *options):
  def loss(x, kernel):
    return jnp.sum(jnp.sin(function(x, kernel, *options)))

  gradient = jax.grad(loss, argnums=(0, 1))
  return jax.jvp(gradient, (x, kernel), (x, kernel))[1]


# The one function of a problem that is compiled asks all of them.
_TRANSPOSED = ('lenet_2', 'resnet_halving', 'image_2x2')
_TWICE = ('lenet_2', 'resnet_wide', 'resnet_halving')


@functools.cache
def _found(name):
  """By ours and the native convolution, whatever is asked of this problem."""
  size, channels, features, kernel_size, *options = _CONVS[name]
  x, kernel = _inputs(size, channels, features, kernel_size)

  @jax.jit
  def run(x, kernel):
    ask = lambda question: [
      question(f, x, kernel, *options) for f in (_ours, _native)
    ]
    found = {'out': _ours(x, kernel, *options), 'gradients': ask(_gradients)}
    if name in _TRANSPOSED:
      found['transposed'] = ask(_transposed)
    if name in _TWICE:
      found['hessian'] = ask(_hessian_product)
    return found

  return x, kernel, options, run(x, kernel)


@pytest.mark.parametrize('name', _CONVS)
def test_convolution_is_the_sum_of_its_definition(name):
  x, kernel, options, found = _found(name)
  _close(found['out'], numpy_layers.conv(x, kernel, *options))


@pytest.mark.parametrize('name', _CONVS)
def test_gradients_of_convolution_are_those_of_the_native_one(name):
  jax.tree.map(_close, *_found(name)[-1]['gradients'])


@pytest.mark.parametrize('name', _TRANSPOSED)
def test_convolution_maps_over_kernels_and_transposes(name):
  _close(*_found(name)[-1]['transposed'])


@pytest.mark.parametrize('name', _TWICE)
def test_hessian_vector_products_are_those_of_the_native_convolution(name):
  # The second derivative of a sine of large sums is itself ill conditioned.
  close = functools.partial(_close, tolerance=1e-4)
  jax.tree.map(close, *_found(name)[-1]['hessian'])


@pytest.mark.parametrize(
  'option',
  [
    {'feature_group_count': 3},
    {'lhs_dilation': (2, 2)},
    {'rhs_dilation': (2, 2)},
  ],
)
def test_convolution_honours_groups_and_dilation(option):
  x, _ = _inputs((5, 5), 3, 6, 3)
  groups = option.get('feature_group_count', 1)
  _, kernel = _inputs((5, 5), 3 // groups, 6, 3)
  arguments = (x, kernel, (1, 1), [(1, 1)] * 2)
  options = {'dimension_numbers': _LAYOUT, **option}
  np.testing.assert_array_equal(
    layers.conv_general_dilated(*arguments, **options),
    jax.lax.conv_general_dilated(*arguments, **options),
  )


def test_padding_by_name_is_that_of_the_native_convolution():
  x, kernel = _inputs((6, 6), 3, 4, 3)
  options = {'dimension_numbers': _LAYOUT}
  np.testing.assert_array_equal(
    layers.conv_general_dilated(x, kernel, (2, 2), 'SAME', **options),
    jax.lax.conv_general_dilated(x, kernel, (2, 2), 'SAME', **options),
  )


# (image, window, stride, padding)
_POOLS = {
  'lenet': ((8, 6), 2, 2, 0),
  'odd': ((7, 5), 2, 2, 0),
  'resnet': ((9, 8), 3, 2, 1),
  'small': ((1, 2), 3, 2, 1),
}


def _tied(size):
  """Few values, so that most windows have several maxima."""
  return np.random.default_rng(0).integers(0, 3, (2, *size, 3)) * 1.0


@pytest.mark.parametrize('backend', ['cpu', 'gpu'])
def test_maximum_and_its_gradient_agree_on_all_backends(backend, monkeypatch):
  monkeypatch.setattr(jax, 'default_backend', lambda: backend)
  images = {name: _tied(size) for name, (size, *_) in _POOLS.items()}

  @jax.jit
  def pooled(images):
    found = {}
    for name, x in images.items():
      _, *options = _POOLS[name]
      pool = lambda x, options=options: layers.max_pool(x, *options)
      out, back = jax.vjp(pool, x)
      cotangent = jnp.arange(1.0, out.size + 1).reshape(out.shape)
      found[name] = out, cotangent, back(cotangent)[0]
    return found

  found = pooled(jax.tree.map(np.float32, images))
  for name, (out, cotangent, gradient) in found.items():
    x, (_, *options) = images[name], _POOLS[name]
    np.testing.assert_array_equal(
      out, numpy_layers.max_pool(x, *options), err_msg=name
    )
    np.testing.assert_array_equal(
      gradient,
      numpy_layers.max_pool_gradient(x, cotangent, *options),
      err_msg=name,
    )


def test_gradient_of_ties_adds_up_to_the_cotangent():
  x = jnp.zeros((1, 4, 4, 1))
  gradient = jax.jit(jax.grad(lambda x: layers.max_pool(x, 2, 2).sum()))(x)
  assert gradient.sum() == 4.0
  np.testing.assert_array_equal(gradient[0, :2, :2, 0], [[1, 0], [0, 0]])


def test_nan_in_a_window_is_its_maximum():
  # An image for each place in the window.
  x = np.ones((3, 4, 4, 1), np.float32)
  x[0, 0, 0] = x[1, 0, 1] = x[2, 1, 1] = np.nan
  for out in jax.jit(lambda x: layers.max_pool(x, 2, 2))(x):
    np.testing.assert_array_equal(out[:, :, 0], [[np.nan, 1], [1, 1]])


def test_padding_wider_than_half_a_window_is_an_error():
  with pytest.raises(ValueError, match=r'padding.*got 2'):
    layers.max_pool(jnp.zeros((1, 4, 4, 1)), 3, 2, 2)


def _operations(jaxpr, into):
  for equation in jaxpr.eqns:
    into.append(equation)
    for inner in jax.extend.core.jaxprs_in_params(equation.params):
      _operations(inner, into)
  return into


def _gradient_operations(name):
  trunk = models.by_name(name)
  image = jax.ShapeDtypeStruct((2, 36, 36, 1), jnp.float32)
  variables = jax.eval_shape(trunk.init, jax.random.key(0), image)

  def loss(variables, image):
    mutable = [key for key in variables if key != 'params']
    out, _ = trunk.apply(variables, image, train=True, mutable=mutable)
    return out.sum()

  jaxpr = jax.make_jaxpr(jax.grad(loss))(variables, image).jaxpr
  return _operations(jaxpr, [])


@pytest.mark.parametrize('name', ['lenet', 'resnet18'])
def test_gradient_on_cpu_has_none_of_the_slow_operations(name):
  for equation in _gradient_operations(name):
    operation = equation.primitive.name
    assert not operation.startswith(('reduce_window', 'select_and'))
    if operation == 'conv_general_dilated':
      image, *_ = equation.invars
      assert image.aval.ndim == 3 or min(image.aval.shape[1:3]) > 4
      # The layout whose fast path is there inside loops too.
      layout, last = equation.params['dimension_numbers'], image.aval.ndim - 1
      space = tuple(range(1, last))
      assert layout.lhs_spec == layout.out_spec == (0, last, *space)
      assert layout.rhs_spec == (last, last - 1, *(i - 1 for i in space))


@pytest.mark.parametrize('backend', ['gpu', 'tpu'])
def test_accelerators_get_the_native_operations(backend, monkeypatch):
  monkeypatch.setattr(jax, 'default_backend', lambda: backend)
  found = collections.Counter(
    equation.primitive.name for equation in _gradient_operations('resnet18')
  )
  # Forward: 17 convolutions and 3 shortcuts. Backward: two for each, less the
  # gradient with respect to the image.
  assert found['conv_general_dilated'] == 20 + 2 * 20 - 1
  assert found['select_and_scatter_add'] == 1


def test_initial_values_are_uniform_within_the_inverse_root_of_the_fan_in():
  x = jnp.zeros((1, 9, 9, 5))
  conv = jax.jit(layers.conv(300, 4, bias_fan_in=80).init)
  dense = jax.jit(layers.dense(500, 80).init)
  values = (
    conv(jax.random.key(0), x),
    dense(jax.random.key(1), jnp.zeros((1, 80))),
  )
  for leaf in jax.tree.leaves(values):
    bound = 80**-0.5
    assert np.abs(leaf).max() <= bound
    # The deviation of a uniform distribution; within five standard errors.
    np.testing.assert_allclose(
      np.std(leaf), bound / 3**0.5, rtol=5 * 0.45 / leaf.size**0.5
    )


def test_dense_layers_of_the_given_parameters_are_intercepted():
  trunk = models.by_name('mlp', widths=(5, 3))
  image = jnp.asarray(
    np.random.default_rng(0).random((2, 4, 4, 1)), jnp.float32
  )
  params = jax.jit(trunk.init)(jax.random.key(0), image)['params']
  plain = jax.jit(trunk.apply)({'params': params}, image)
  seen = []

  def dense(x, kernel):
    seen.append(kernel)
    return x @ kernel

  with models.intercept_dense(dense, params):
    out = trunk.apply({'params': params}, image)
    # Of another tree.
    trunk.apply({'params': jax.tree.map(jnp.copy, params)}, image)
  trunk.apply({'params': params}, image)
  np.testing.assert_allclose(out, plain, rtol=1e-6)
  kernels = [params[f'dense_{i}']['kernel'] for i in (1, 2)]
  assert [id(x) for x in seen] == [id(x) for x in kernels]


@pytest.mark.parametrize('dtype', [None, 'float32', 'bfloat16'])
@pytest.mark.parametrize('of_input', ['float32', 'bfloat16'])
def test_intercepted_layer_computes_in_its_own_dtype(of_input, dtype):
  layer = nn.Dense(3, use_bias=False, dtype=dtype)
  x = jnp.ones((2, 4), of_input)
  params = layer.init(jax.random.key(0), x)
  multiply = lambda x, kernel: x @ kernel.astype(x.dtype)
  with models.intercept_dense(multiply, params):
    out = layer.apply(params, inputs=x)
  plain = layer.apply(params, x)
  assert out.dtype == plain.dtype
  np.testing.assert_array_equal(out, plain)


class _Doubled(nn.Dense):
  """A layer with a product of its own."""

  def __call__(self, inputs):
    return 2 * super().__call__(inputs)


@pytest.mark.parametrize(
  'layer',
  [
    _Doubled(3),
    nn.Dense(3, precision='highest'),
    nn.Dense(3, dot_general=lambda *args, **options: jnp.ones((2, 3))),
  ],
)
def test_layers_with_a_product_of_their_own_are_not_intercepted(layer):
  x = jnp.ones((2, 4))
  params = layer.init(jax.random.key(0), x)
  plain = layer.apply(params, x)
  with pytest.raises(ValueError, match='of 2 leaves no layer'):
    with models.intercept_dense(lambda x, kernel: 0 * (x @ kernel), params):
      out = layer.apply(params, x)
  np.testing.assert_array_equal(out, plain)


@pytest.mark.parametrize('name', ['narrow_padded', 'image_2x2'])
def test_no_images_are_no_results(name):
  size, channels, features, kernel_size, stride, padding = _CONVS[name]
  x, kernel = _inputs(size, channels, features, kernel_size, batch=0)

  @jax.jit
  def run(x, kernel):
    ours = lambda *args: _ours(*args, stride, padding)
    out, pull = jax.vjp(ours, x, kernel)
    return out, pull(out)[1], _native(x, kernel, stride, padding)

  out, gradient, native = run(x, kernel)
  assert out.shape == native.shape
  np.testing.assert_array_equal(gradient, np.zeros(kernel.shape))


@pytest.mark.parametrize('name', ['narrow_padded', 'resnet_next', 'image_2x2'])
def test_replicas_sum_the_gradient_of_a_kernel_that_they_share(name):
  size, channels, features, kernel_size, *options = _CONVS[name]
  x, kernel = _inputs(size, channels, features, kernel_size, batch=8)
  mesh = jax.make_mesh(
    (8,), ('batch',), axis_types=(jax.sharding.AxisType.Auto,)
  )

  def gradient(function, x, kernel):
    loss = lambda kernel: jnp.sum(jnp.sin(function(x, kernel, *options)))
    return jax.grad(loss)(kernel)

  def mapped(check_vma):
    def on_a_replica(x, kernel):
      found = gradient(_ours, x, kernel)
      return found if check_vma else jax.lax.psum(found, 'batch')

    return jax.shard_map(
      on_a_replica,
      mesh=mesh,
      in_specs=(P('batch'), P()),
      out_specs=P(),
      check_vma=check_vma,
    )

  by_hand, by_vma = jax.jit(
    lambda *args: (mapped(False)(*args), mapped(True)(*args))
  )(x, kernel)
  expected = jax.jit(functools.partial(gradient, _native))(x, kernel)
  _close(by_hand, expected, 1e-5)
  _close(by_vma, expected, 1e-5)


def test_inside_native_layers_a_model_has_a_forward_mode_derivative():
  x, kernel = _inputs((6, 6), 3, 4, 3)
  forward = lambda x: layers.max_pool(_ours(x, kernel, 1, 1), 2, 2)
  with pytest.raises(TypeError, match='custom_vjp'):
    jax.jvp(forward, (x,), (x,))
  with models.native_layers():
    out, tangent = jax.jvp(forward, (x,), (x,))
  # Without a bias both are linear where no maximum changes.
  _close(tangent, out, 1e-5)
  _close(out, forward(x), 1e-5)
