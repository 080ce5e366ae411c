"""The LeNet for the Multi-MNIST experiments."""

from flax import linen as nn
import jax

from mtl_jax.models import layers


class LeNet(nn.Module):
  """Two convolutions and a dense layer, 30,890 parameters for 36x36x1.

  Convolution 9x9 with 10 channels, ReLU, 2x2 maximum; convolution 5x5 with 20
  channels, ReLU, 2x2 maximum; dense layer of 50, ReLU. No padding. Follow-up
  work to Sener and Koltun (2018) trains this network on Multi-MNIST. The
  initialization is PyTorch's default (uniform in +-1/sqrt(fan_in), biases too),
  as in the public code of Phan et al.

  Attributes:
    features: width of the output.

  References:
    Sener and Koltun, `Multi-Task Learning as Multi-Objective Optimization
    <https://arxiv.org/abs/1810.04650>`_, 2018

    Phan et al., `Improving Multi-task Learning via Seeking Task-based Flat
    Regions <https://arxiv.org/abs/2211.13723>`_, 2022
  """

  features: int = 50

  @nn.compact
  def __call__(self, image: jax.Array, *, train: bool = False) -> jax.Array:
    """Features [B, features] from images [B, H, W, C]; `train` is unused."""
    if min(image.shape[1:3]) < 20:
      raise ValueError(
        f'LeNet needs images of at least 20x20, got {image.shape[1:3]}'
      )
    x = image
    for index, (channels, size) in enumerate(((10, 9), (20, 5))):
      x = layers.conv(
        channels,
        size,
        bias_fan_in=size * size * x.shape[-1],
        name=f'conv_{index + 1}',
      )(x)
      # This order rectifies the smaller image and gives the same function.
      x = nn.relu(layers.max_pool(x, 2, 2))
    x = x.reshape(x.shape[0], -1)
    return nn.relu(layers.dense(self.features, x.shape[-1], 'dense')(x))
