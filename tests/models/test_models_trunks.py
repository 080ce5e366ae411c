"""LeNet, ResNet, MLP and ViT against the architectures they are named after."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import numpy_layers
import pytest

from mtl_jax import models

_RTOL = {'rtol': 2e-5, 'atol': 2e-5}


def _shapes(trunk, image_shape=(36, 36, 1)):
  image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
  return jax.eval_shape(trunk.init, jax.random.key(0), image)


def _size(tree):
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _values(variables, seed):
  """Values for these shapes: variances are positive, nothing is 0 or 1."""
  rng = np.random.default_rng(seed)
  kernel = lambda s: rng.normal(size=s.shape) / math.prod(s.shape[:-1]) ** 0.5
  other = lambda s: rng.uniform(0.5, 1.5, s.shape)
  return jax.tree.map(
    lambda s: np.float32((kernel if len(s.shape) > 1 else other)(s)), variables
  )


def test_lenet_has_the_parameters_of_its_layers():
  # 9 9 10 + 10, 5 5 10 20 + 20, 5 5 20 50 + 50.
  assert _size(_shapes(models.LeNet())) == 820 + 5_020 + 25_050


def test_resnet18_has_the_parameters_of_its_layers():
  # Kernels, then two values of BatchNorm a channel; the shortcuts in brackets.
  first = 7 * 7 * 64 + 2 * 64
  stage_1 = 4 * 9 * 64 * 64 + 4 * 2 * 64
  stage_2 = 9 * 64 * 128 + 3 * 9 * 128 * 128 + 4 * 256 + (64 * 128 + 256)
  stage_3 = 9 * 128 * 256 + 3 * 9 * 256 * 256 + 4 * 512 + (128 * 256 + 512)
  stage_4 = 9 * 256 * 512 + 3 * 9 * 512 * 512 + 4 * 1024 + (256 * 512 + 1024)
  dense = 512 * 100 + 100
  total = first + stage_1 + stage_2 + stage_3 + stage_4 + dense
  assert total == 11_221_540
  variables = _shapes(models.by_name('resnet18'))
  assert _size(variables['params']) == total
  # A mean and a variance for each channel that is normalized.
  channels = 64 * 5 + 128 * 5 + 256 * 5 + 512 * 5
  assert _size(variables['batch_stats']) == 2 * channels


def test_lenet_is_its_layers_one_after_another():
  trunk = models.LeNet()
  image = np.random.default_rng(0).random((3, 36, 36, 1), np.float32)
  variables = _values(_shapes(trunk), seed=1)
  params = variables['params']
  x = image
  for name in ('conv_1', 'conv_2'):
    x = numpy_layers.conv(x, params[name]['kernel'])
    x = numpy_layers.relu(x + np.float64(params[name]['bias']))
    x = numpy_layers.max_pool(x, 2, 2)
  assert x.shape == (3, 5, 5, 20)
  x = numpy_layers.dense(x.reshape(3, 500), params['dense'])
  np.testing.assert_allclose(
    jax.jit(trunk.apply)(variables, image), numpy_layers.relu(x), **_RTOL
  )


def test_image_too_small_for_lenet_is_an_error():
  # 20 - 8 = 12, halved 6, 6 - 4 = 2, halved 1: the least that leaves a pixel.
  assert _size(_shapes(models.LeNet(), (20, 20, 1))) == 5_840 + 20 * 50 + 50
  with pytest.raises(ValueError, match=r'20x20, got \(36, 19\)'):
    _shapes(models.LeNet(), (36, 19, 1))


@pytest.fixture(scope='module')
def small_resnet():
  """A ResNet of two stages, its variables and images of an uneven size."""
  trunk = models.ResNet(widths=(4, 6), blocks=(1, 2), features=5)
  image = np.random.default_rng(0).random((8, 22, 22, 1), np.float32)
  return trunk, _values(_shapes(trunk, image.shape[1:]), seed=1), image


def _small_resnet_in_numpy(variables, x, norm):
  params, stats = variables['params'], variables['batch_stats']
  relu = numpy_layers.relu

  def conv(x, block, name, stride, padding):
    return numpy_layers.conv(x, block[name]['kernel'], stride, padding)

  def block(x, name, stride):
    mine = params[name]
    scale = lambda x, layer: norm(x, mine[layer], stats[name][layer])
    y = relu(scale(conv(x, mine, 'conv_1', stride, 1), 'norm_1'))
    y = scale(conv(y, mine, 'conv_2', 1, 1), 'norm_2')
    if stride > 1:
      x = scale(conv(x, mine, 'conv_shortcut', stride, 0), 'norm_shortcut')
    return relu(y + x)

  x = conv(x, params, 'conv', 2, 3)
  x = relu(norm(x, params['norm'], stats['norm']))
  x = numpy_layers.max_pool(x, 3, 2, 1)
  x = block(x, 'block_1_1', 1)
  x = block(x, 'block_2_1', 2)
  x = block(x, 'block_2_2', 1)
  return relu(numpy_layers.dense(x.mean((1, 2)), params['dense']))


def _normalize(x, layer, mean, variance):
  scale, bias = np.float64(layer['scale']), np.float64(layer['bias'])
  return (x - mean) / np.sqrt(variance + 1e-5) * scale + bias


def test_resnet_is_its_layers_one_after_another_with_running_statistics(
  small_resnet,
):
  trunk, variables, image = small_resnet

  def norm(x, layer, stats):
    return _normalize(
      x, layer, np.float64(stats['mean']), np.float64(stats['var'])
    )

  np.testing.assert_allclose(
    jax.jit(trunk.apply)(variables, image),
    _small_resnet_in_numpy(variables, image, norm),
    **_RTOL,
  )


def test_resnet_trains_on_the_batch_and_moves_its_statistics_by_a_tenth(
  small_resnet,
):
  trunk, variables, image = small_resnet
  moved = []

  def norm(x, layer, stats):
    mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2))
    moved.append(
      {
        'mean': 0.9 * np.float64(stats['mean']) + 0.1 * mean,
        'var': 0.9 * np.float64(stats['var']) + 0.1 * variance,
      }
    )
    return _normalize(x, layer, mean, variance)

  expected = _small_resnet_in_numpy(variables, image, norm)
  train = jax.jit(
    lambda *args: trunk.apply(*args, train=True, mutable=['batch_stats'])
  )
  out, state = train(variables, image)
  np.testing.assert_allclose(out, expected, rtol=2e-4, atol=2e-4)
  stats = state['batch_stats']
  in_order = [stats['norm']] + [
    stats[block][layer]
    for block, layers in (
      ('block_1_1', ('norm_1', 'norm_2')),
      ('block_2_1', ('norm_1', 'norm_2', 'norm_shortcut')),
      ('block_2_2', ('norm_1', 'norm_2')),
    )
    for layer in layers
  ]
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4),
    in_order,
    moved,
  )


def test_resnet_starts_with_the_variances_of_torchvision():
  trunk = models.ResNet(widths=(32, 48), blocks=(1, 1), features=100)
  variables = jax.jit(trunk.init)(jax.random.key(0), jnp.zeros((1, 16, 16, 1)))
  params = variables['params']
  block = params['block_2_1']
  for kernel, fan_out in (
    (params['block_1_1']['conv_1'], 9 * 32),
    (block['conv_1'], 9 * 48),
    (block['conv_shortcut'], 48),
  ):
    deviation = np.std(kernel['kernel'])
    np.testing.assert_allclose(deviation, (2 / fan_out) ** 0.5, rtol=0.06)
    # Not a uniform or truncated normal distribution.
    assert np.abs(kernel['kernel']).max() > 2.8 * deviation
  # The first convolution and the dense layer were replaced by their authors.
  assert 0.9 / 7 < np.abs(params['conv']['kernel']).max() <= 1 / 7
  bound = 48**-0.5
  assert 0.9 * bound < np.abs(params['dense']['kernel']).max() <= bound
  norm = block['norm_2']
  np.testing.assert_array_equal(norm['scale'], np.ones(48))
  np.testing.assert_array_equal(norm['bias'], np.zeros(48))


def test_resnet_with_stages_that_do_not_match_is_an_error():
  trunk = models.ResNet(widths=(4, 6), blocks=(1,))
  with pytest.raises(ValueError, match=r'widths \(4, 6\) and blocks \(1,\)'):
    _shapes(trunk)


def test_mlp_is_its_layers_one_after_another():
  trunk = models.MLP(widths=(7, 4))
  image = np.random.default_rng(0).random((3, 4, 5, 2), np.float32)
  variables = _values(_shapes(trunk, image.shape[1:]), seed=1)
  x = image.reshape(3, 40)
  for name in ('dense_1', 'dense_2'):
    x = numpy_layers.relu(numpy_layers.dense(x, variables['params'][name]))
  np.testing.assert_allclose(trunk.apply(variables, image), x, **_RTOL)


@pytest.mark.parametrize('dropout', [-0.1, 1.0, 2])
def test_dropout_that_is_no_probability_is_an_error(dropout):
  with pytest.raises(ValueError, match=f'dropout.*{dropout}'):
    _shapes(models.MLP(dropout=dropout))


def test_vit_s_has_the_parameters_of_its_layers():
  projection = 16 * 16 * 3 * 384 + 384
  places = 14 * 14 * 384
  attention = 4 * (384 * 384 + 384)
  perceptron = 384 * 1536 + 1536 + 1536 * 384 + 384
  total = projection + places + 12 * (attention + perceptron + 4 * 384) + 768
  assert total == 21_664_896
  trunk = models.by_name('vit_s', patch_size=16)
  assert _size(_shapes(trunk, (224, 224, 3))) == total


def test_vit_is_its_layers_one_after_another():
  trunk = models.ViT(patch_size=2, width=6, blocks=2, heads=3, hidden=5)
  image = np.random.default_rng(0).random((2, 4, 6, 2), np.float32)
  variables = _values(_shapes(trunk, image.shape[1:]), seed=1)
  params = jax.tree.map(np.float64, variables['params'])

  def norm(x, layer):
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-6) * layer['scale'] + layer[
      'bias'
    ]

  def attend(x, layer):
    query, key, value = (
      np.einsum('pi,ihd->hpd', x, layer[name]['kernel'])
      + layer[name]['bias'][:, None]
      for name in ('query', 'key', 'value')
    )
    out = np.zeros(x.shape)
    for head in range(3):
      scores = np.exp(query[head] @ key[head].T / 2**0.5)
      mixed = scores / scores.sum(1, keepdims=True) @ value[head]
      out += mixed @ layer['out']['kernel'][head]
    return out + layer['out']['bias']

  gelu = np.vectorize(lambda x: x * (1 + math.erf(x / 2**0.5)) / 2)
  expected = []
  for picture in image:
    patches = [
      picture[i : i + 2, j : j + 2].ravel()
      for i in range(0, 4, 2)
      for j in range(0, 6, 2)
    ]
    x = numpy_layers.dense(np.float64(patches), params['projection'])
    x = x + params['places'][0]
    for index in (1, 2):
      block = params[f'block_{index}']
      x = x + attend(norm(x, block['norm_1']), block['attention'])
      y = numpy_layers.dense(norm(x, block['norm_2']), block['dense_1'])
      x = x + numpy_layers.dense(gelu(y), block['dense_2'])
    expected.append(norm(x, params['norm']).mean(0))
  np.testing.assert_allclose(
    jax.jit(trunk.apply)(variables, image), expected, **_RTOL
  )


@pytest.mark.parametrize(
  ('kwargs', 'message'),
  [
    ({'patch_size': 5}, 'patch_size must divide the image of 36x36, got 5'),
    ({'heads': 7}, 'heads must divide width 384, got 7'),
  ],
)
def test_vit_whose_sizes_do_not_divide_is_an_error(kwargs, message):
  with pytest.raises(ValueError, match=message):
    _shapes(models.ViT(**kwargs))
