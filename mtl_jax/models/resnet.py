"""ResNets with basic blocks, as torchvision builds them."""

from collections.abc import Sequence
import functools

from flax import linen as nn
import jax

from mtl_jax.models import layers
from mtl_jax.models import remat as remats

_kaiming_fan_out = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')


class ResNet(nn.Module):
  """A residual network with basic blocks; ResNet-18 by default.

  A 7x7 convolution with stride 2, BatchNorm, ReLU, a 3x3 maximum with stride 2;
  stages of basic blocks, where every stage except the first halves the image;
  the mean over the image; a dense layer; ReLU. All paddings are symmetric, as
  in torchvision.

  For images of 36x36x1 this is the network of Phan et al.'s Multi-MNIST
  experiments: 11,221,540 parameters, torchvision's `resnet18` with a new first
  convolution and a new last layer. The initial values are also the same:
  convolutions are normal with variance 2 / fan_out (He et al., 2015). The first
  convolution and the dense layer have PyTorch's default, uniform in
  +-1/sqrt(fan_in).

  BatchNorm has epsilon 1e-5 and moves its statistics by a tenth a step. Its
  running variance is the batch's; PyTorch multiplies that by n / (n - 1), with
  n the number of values in a channel.

  Attributes:
    widths: channels of each stage; the first convolution has the first of them.
    blocks: number of basic blocks of each stage.
    features: width of the output.
    remat: `'blocks'` computes each block again in the backward pass, once for
      every task, instead of keeping its values; `'none'` keeps them.
    batch_norm_axis: for training inside `shard_map` or `pmap`: the mapped axis
      over which BatchNorm takes its statistics; None for statistics over the
      local rows.

  References:
    He et al., `Deep Residual Learning for Image Recognition
    <https://arxiv.org/abs/1512.03385>`_, 2016

    Phan et al., `Improving Multi-task Learning via Seeking Task-based Flat
    Regions <https://arxiv.org/abs/2211.13723>`_, 2022
  """

  widths: Sequence[int] = (64, 128, 256, 512)
  blocks: Sequence[int] = (2, 2, 2, 2)
  features: int = 100
  remat: str = 'none'
  batch_norm_axis: str | None = None

  @nn.compact
  def __call__(self, image: jax.Array, *, train: bool = False) -> jax.Array:
    """Features [B, features] from images [B, H, W, C]."""
    if len(self.widths) != len(self.blocks):
      raise ValueError(
        f'widths {tuple(self.widths)} and blocks {tuple(self.blocks)} must have'
        ' one entry for each stage'
      )
    make_block = remats.of_block(_BasicBlock, self.remat)
    x = layers.conv(self.widths[0], 7, stride=2, padding=3, name='conv')(image)
    x = nn.relu(_batch_norm(train, self.batch_norm_axis, 'norm')(x))
    x = layers.max_pool(x, 3, 2, 1)
    for stage, (width, count) in enumerate(
      zip(self.widths, self.blocks, strict=True)
    ):
      for block in range(count):
        stride = 2 if stage > 0 and block == 0 else 1
        x = make_block(
          width,
          stride,
          self.batch_norm_axis,
          name=f'block_{stage + 1}_{block + 1}',
        )(x, train)
    x = x.mean((1, 2))
    return nn.relu(layers.dense(self.features, x.shape[-1], 'dense')(x))


class _BasicBlock(nn.Module):
  """Two 3x3 convolutions around a shortcut, 1x1 where the shape changes."""

  width: int
  stride: int
  batch_norm_axis: str | None

  @nn.compact
  def __call__(self, x, train):
    norm = functools.partial(_batch_norm, train, self.batch_norm_axis)
    shortcut = x
    if self.stride != 1 or x.shape[-1] != self.width:
      shortcut = self._conv(1, self.stride, 0, 'conv_shortcut')(x)
      shortcut = norm('norm_shortcut')(shortcut)
    x = self._conv(3, self.stride, 1, 'conv_1')(x)
    x = nn.relu(norm('norm_1')(x))
    x = self._conv(3, 1, 1, 'conv_2')(x)
    return nn.relu(norm('norm_2')(x) + shortcut)

  def _conv(self, size, stride, padding, name):
    return layers.conv(
      self.width,
      size,
      stride=stride,
      padding=padding,
      kernel_init=_kaiming_fan_out,
      name=name,
    )


def _batch_norm(train, axis, name):
  return nn.BatchNorm(
    use_running_average=not train,
    momentum=0.9,
    epsilon=1e-5,
    # The fast variance is a difference of two large numbers: this network's
    # gradients were off by 1.5e-3 with it, and are off by 2e-4 without it, like
    # PyTorch's.
    use_fast_variance=False,
    axis_name=axis,
    name=name,
  )
