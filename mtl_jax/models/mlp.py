"""A multi-layer perceptron on flattened images."""

import functools

from flax import linen as nn
import jax

from mtl_jax.models import layers
from mtl_jax.models import remat as remats


class MLP(nn.Module):
  """Dense layers with ReLU and PyTorch's default initialization.

  Attributes:
    widths: width of each layer; the last is the output's width. Without any,
      the output is the flattened image.
    dropout: probability with which an activation is dropped in training, after
      every layer; the others are scaled by 1 / (1 - dropout).
    remat: `'blocks'` computes each layer again in the backward pass, once for
      every task, instead of keeping its values; `'none'` keeps them.
  """

  widths: tuple[int, ...] = (128, 64)
  dropout: float = 0.0
  remat: str = 'none'

  @nn.compact
  def __call__(self, image: jax.Array, *, train: bool = False) -> jax.Array:
    """Features [B, widths[-1]] of images [B, ...]."""
    if not 0 <= self.dropout < 1:
      raise ValueError(f'dropout must be in [0, 1), got {self.dropout}')
    x = image.reshape(image.shape[0], -1)
    for index, width in enumerate(self.widths):
      layer = functools.partial(_layer, index=index, width=width)
      x = remats.of_block(layer, self.remat)(self, x, train)
    return x


def _layer(mlp, x, train, *, index, width):
  x = layers.dense(width, x.shape[-1], f'dense_{index + 1}')(x)
  # Named, because automatic numbering would start again in every layer.
  dropout = nn.Dropout(
    mlp.dropout, deterministic=not train, name=f'Dropout_{index}'
  )
  return dropout(nn.relu(x))
