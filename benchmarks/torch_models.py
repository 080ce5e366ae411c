"""The benchmarks' models in PyTorch, with the project's names and parameters.

Modules have the same names as in `mtl_jax`, so that parameters map by path. The
functions are the same: the benchmark compares losses and gradients before the
timing.
"""

from collections.abc import Sequence
import itertools
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from benchmarks import cases


class MultiTask(nn.Module):
  """A trunk from images [B, C, H, W] to features [B, F], and a head a task.

  Attributes:
    shared: the trunk.
    heads: the heads, in the order of the tasks.
  """

  def __init__(self, trunk: nn.Module, features: int, num_tasks: int):
    super().__init__()
    self.shared = trunk
    self.heads = nn.ModuleList(
      nn.Linear(features, cases.NUM_CLASSES) for _ in range(num_tasks)
    )


def make(case: cases.Case, params: Any, device: str) -> MultiTask:
  """The case's model with given parameters.

  Args:
    case: the case.
    params: the project's parameters, NumPy arrays.
    device: `'cpu'` or `'cuda'`.

  Returns:
    The model, in training mode.
  """
  height, width, channels = case.image_shape
  trunk, features = _TRUNKS[case.model](height, width, channels, **case.options)
  model = MultiTask(trunk, features, case.tasks)
  with torch.no_grad():
    for name, value in cases.by_name(params).items():
      model.get_parameter(name).copy_(torch.from_numpy(value.copy()))
  return model.to(device).train()


def has_model(name: str) -> bool:
  """Whether this module has the model with that name."""
  return name in _TRUNKS


class _LeNet(nn.Module):
  def __init__(self, height, width, channels, features=50):
    super().__init__()
    self.conv_1 = nn.Conv2d(channels, 10, 9)
    self.conv_2 = nn.Conv2d(10, 20, 5)
    left = [((side - 8) // 2 - 4) // 2 for side in (height, width)]
    self.dense = nn.Linear(20 * left[0] * left[1], features)

  def forward(self, x):
    for conv in (self.conv_1, self.conv_2):
      x = functional.max_pool2d(functional.relu(conv(x)), 2)
    # The project's order of features. The copy of 20 x 5 x 5 numbers is free.
    x = x.permute(0, 2, 3, 1).flatten(1)
    return functional.relu(self.dense(x))


class _MLP(nn.Module):
  def __init__(self, sizes):
    super().__init__()
    for i, (before, after) in enumerate(itertools.pairwise(sizes)):
      self.add_module(f'dense_{i + 1}', nn.Linear(before, after))

  def forward(self, x):
    x = x.permute(0, 2, 3, 1).flatten(1)
    for layer in self.children():
      x = functional.relu(layer(x))
    return x


class _BasicBlock(nn.Module):
  def __init__(self, before, width, stride):
    super().__init__()
    self.conv_1 = nn.Conv2d(before, width, 3, stride, 1, bias=False)
    self.norm_1 = nn.BatchNorm2d(width)
    self.conv_2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
    self.norm_2 = nn.BatchNorm2d(width)
    self.shaped = stride != 1 or before != width
    if self.shaped:
      self.conv_shortcut = nn.Conv2d(before, width, 1, stride, bias=False)
      self.norm_shortcut = nn.BatchNorm2d(width)

  def forward(self, x):
    shortcut = self.norm_shortcut(self.conv_shortcut(x)) if self.shaped else x
    x = functional.relu(self.norm_1(self.conv_1(x)))
    return functional.relu(self.norm_2(self.conv_2(x)) + shortcut)


class _ResNet(nn.Module):
  def __init__(self, channels, widths, blocks, features):
    super().__init__()
    self.conv = nn.Conv2d(channels, widths[0], 7, 2, 3, bias=False)
    self.norm = nn.BatchNorm2d(widths[0])
    self.blocks = []
    before = widths[0]
    for stage, (width, count) in enumerate(zip(widths, blocks, strict=True)):
      for block in range(count):
        stride = 2 if stage > 0 and block == 0 else 1
        name = f'block_{stage + 1}_{block + 1}'
        self.add_module(name, _BasicBlock(before, width, stride))
        self.blocks.append(name)
        before = width
    self.dense = nn.Linear(before, features)

  def forward(self, x):
    x = functional.relu(self.norm(self.conv(x)))
    x = functional.max_pool2d(x, 3, 2, 1)
    for name in self.blocks:
      x = self.get_submodule(name)(x)
    return functional.relu(self.dense(x.mean((2, 3))))


def _lenet(height, width, channels, features=50):
  return _LeNet(height, width, channels, features), features


def _mlp(height, width, channels, widths: Sequence[int] = (128, 64)):
  return _MLP((height * width * channels, *widths)), widths[-1]


def _resnet(
  height,
  width,
  channels,
  widths=(64, 128, 256, 512),
  blocks=(2, 2, 2, 2),
  features=100,
):
  del height, width
  return _ResNet(channels, widths, blocks, features), features


_TRUNKS = {'lenet': _lenet, 'mlp': _mlp, 'resnet18': _resnet}
