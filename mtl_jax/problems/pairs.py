"""The common parts of problems with two overlapped images."""

from collections.abc import Callable
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from mtl_jax import types
from mtl_jax.data import pipeline
from mtl_jax.data import synthetic
from mtl_jax.losses import classification as losses
from mtl_jax.metrics import classification as metrics

# Number of synthetic examples in each split, and its seed: one dataset, whose
# splits have no example in common.
_SYNTHETIC = {'train': (1024, 0), 'validation': (256, 1), 'test': (256, 2)}


def pair_problem(
  name: str,
  *,
  image_shape: tuple[int, int, int],
  task_names: tuple[str, ...],
  num_classes: int,
  max_pixel: int,
  load_real: Callable[..., types.Source],
  prepare: Callable[..., None] | None = None,
  baselines: Mapping[str, float] | None = None,
  baselines_source: str = '',
) -> types.Problem:
  """A problem with one image and one class label a task.

  Args:
    name: name of the problem.
    image_shape: (height, width, channels).
    task_names: the tasks.
    num_classes: number of classes of each task.
    max_pixel: brightest value of a stored image; images go to the model divided
      by it.
    load_real: `(split, **options) -> Source`, the real data.
    prepare: see `types.Problem`.
    baselines: single-task scores, `{'task/accuracy': share}`.
    baselines_source: their source.

  Returns:
    A `types.Problem` whose `load` is called as `load(split, *, kind='real',
    **options)`. `kind='synthetic'` gives small generated data of the same form
    and ignores the options.
  """
  tasks = tuple(
    types.Task(task, num_classes, losses.cross_entropy, (metrics.accuracy(),))
    for task in task_names
  )

  def load(split: str, *, kind: str = 'real', **options: Any) -> types.Source:
    if kind == 'real':
      return load_real(split, **options)
    if kind != 'synthetic':
      raise ValueError(f"kind must be 'real' or 'synthetic', got {kind!r}")
    if split not in _SYNTHETIC:
      raise ValueError(
        f'split must be one of {tuple(_SYNTHETIC)}, got {split!r}'
      )
    size, seed = _SYNTHETIC[split]
    source = synthetic.synthetic_source(
      image_shape, task_names, num_classes, size, seed
    )
    examples = dict(source.__getitems__(range(size)))
    # The brightest byte represents the brightest pixel in the real images.
    examples['image'] = examples['image'] // (256 // (max_pixel + 1))
    return pipeline.ArraySource(examples)

  def preprocess(batch: types.Batch) -> types.Batch:
    return {**batch, 'image': batch['image'].astype(jnp.float32) / max_pixel}

  return types.Problem(
    name=name,
    tasks=tasks,
    image_shape=image_shape,
    load=load,
    preprocess=preprocess,
    prepare=prepare,
    baselines=baselines or {},
    baselines_source=baselines_source,
  )
