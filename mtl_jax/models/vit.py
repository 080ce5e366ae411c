"""A vision transformer on patches of the image."""

from flax import linen as nn
import jax

from mtl_jax.models import remat as remats

_xavier = nn.initializers.xavier_uniform()
_small = nn.initializers.normal(1e-6)


class ViT(nn.Module):
  """A vision transformer with mean pooling; ViT-S by default.

  The image is cut into square patches; each is projected to `width`, and a
  learned vector for its place is added. Blocks follow, each with self-attention
  and a perceptron that has one hidden layer with GELU. Both come after a
  LayerNorm and have a shortcut. The output is the mean over the patches after a
  last LayerNorm.

  The network is Dosovitskiy et al.'s except for the mean: they read a class
  token's features, and found that a mean does as well (appendix D.3). ViT-S is
  not among their sizes; it is from Touvron et al. For images of 224x224x3 in
  patches of 16 it has 21,664,896 parameters, 295,296 of them in the projection
  and 75,264 in the places. Initial kernels are uniform after Glorot and Bengio,
  except the projection's, which is truncated normal with variance 1 / fan_in.
  Places are normal with deviation 0.02. There is no dropout.

  Attributes:
    patch_size: height and width of a patch, which must divide the image's; 4
      makes 81 patches from an image of 36x36.
    width: width of the features, and of the output.
    blocks: number of blocks.
    heads: number of heads of the attention.
    hidden: width of the perceptron's hidden layer.
    remat: `'blocks'` computes each block again in the backward pass, once for
      every task, instead of keeping its values; `'none'` keeps them.

  References:
    Dosovitskiy et al., `An Image is Worth 16x16 Words: Transformers for Image
    Recognition at Scale <https://arxiv.org/abs/2010.11929>`_, 2021

    Touvron et al., `Training data-efficient image transformers & distillation
    through attention <https://arxiv.org/abs/2012.12877>`_, 2021
  """

  patch_size: int = 4
  width: int = 384
  blocks: int = 12
  heads: int = 6
  hidden: int = 1536
  remat: str = 'none'

  @nn.compact
  def __call__(self, image: jax.Array, *, train: bool = False) -> jax.Array:
    """Features [B, width] from images [B, H, W, C]; `train` has no effect."""
    if self.width % self.heads:
      raise ValueError(
        f'heads must divide width {self.width}, got {self.heads}'
      )
    x = nn.Dense(self.width, name='projection')(self._patches(image))
    x += self.param(
      'places', nn.initializers.normal(0.02), (1, *x.shape[1:]), x.dtype
    )
    make_block = remats.of_block(_Block, self.remat)
    for index in range(self.blocks):
      x = make_block(self.heads, self.hidden, name=f'block_{index + 1}')(
        x, train
      )
    return nn.LayerNorm(epsilon=1e-6, name='norm')(x).mean(1)

  def _patches(self, image):
    """The patches row by row, [B, number, values]."""
    batch, height, width, channels = image.shape
    size = self.patch_size
    if size < 1 or height % size or width % size:
      raise ValueError(
        f'patch_size must divide the image of {height}x{width}, got {size}'
      )
    x = image.reshape(
      batch, height // size, size, width // size, size, channels
    )
    return x.swapaxes(2, 3).reshape(batch, -1, size * size * channels)


class _Block(nn.Module):
  """Attention between patches, then a perceptron on each."""

  heads: int
  hidden: int

  @nn.compact
  def __call__(self, x, train):
    del train
    width = x.shape[-1]
    y = nn.LayerNorm(epsilon=1e-6, name='norm_1')(x)
    x += nn.MultiHeadDotProductAttention(
      self.heads,
      kernel_init=_xavier,
      # In the products' dtype the sum would lose a large part of them.
      force_fp32_for_softmax=True,
      name='attention',
    )(y)
    y = nn.LayerNorm(epsilon=1e-6, name='norm_2')(x)
    y = nn.Dense(
      self.hidden, kernel_init=_xavier, bias_init=_small, name='dense_1'
    )(y)
    y = nn.gelu(y, approximate=False)
    return x + nn.Dense(
      width, kernel_init=_xavier, bias_init=_small, name='dense_2'
    )(y)
