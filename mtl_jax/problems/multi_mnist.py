"""Multi-MNIST, Multi-Fashion and Multi-Fashion+MNIST."""

import functools
from typing import Any

from mtl_jax import types
from mtl_jax.data import multi_mnist as data
from mtl_jax.data import prepare as prepare_data
from mtl_jax.problems import pairs

NAMES = data.NAMES

# Single-task accuracy of ResNet-18 on each task.
_BASELINES = {
  'multi_mnist': (0.9533, 0.9416),
  'multi_fashion': (0.8710, 0.8620),
  'multi_fashion_and_mnist': (0.9840, 0.8942),
}


def multi_mnist(name: str = 'multi_mnist') -> types.Problem:
  """Two tasks: the item at the top left and the item at the bottom right.

  Args:
    name: one of `NAMES`.

  Returns:
    A `types.Problem`; its `load` takes `data_dir`, `source_dir` and
    `split_scheme` of `mtl_jax.data.multi_mnist.load_multi_mnist`.

  Raises:
    ValueError: if `name` is not in `NAMES`.

  References:
    Phan et al., `Improving Multi-task Learning via Seeking Task-based Flat
    Regions <https://arxiv.org/abs/2211.13723>`_, 2022, Table 1 (baselines)
  """
  if name not in NAMES:
    raise ValueError(f'name must be one of {NAMES}, got {name!r}')

  def prepare(*, data_dir: str | None, source_dir: str | None, **unused: Any):
    del unused
    prepare_data.prepare(name, data_dir, source_dir)

  return pairs.pair_problem(
    name,
    image_shape=data.IMAGE_SHAPE,
    task_names=data.TASK_NAMES,
    num_classes=data.NUM_CLASSES,
    max_pixel=data.MAX_PIXEL,
    load_real=functools.partial(data.load_multi_mnist, name),
    prepare=prepare,
    baselines={
      f'{task}/accuracy': value
      for task, value in zip(data.TASK_NAMES, _BASELINES[name], strict=True)
    },
    baselines_source='arXiv 2211.13723, Table 1, ResNet-18, 200 epochs',
  )
