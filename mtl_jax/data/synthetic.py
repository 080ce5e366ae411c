"""Synthetic images with several labels, a substitute for any dataset."""

from collections.abc import Sequence

import numpy as np

from mtl_jax.data import pipeline
from mtl_jax.data import shuffle

# Far from the small stream numbers for the shuffling of epochs.
_LABELS = 2**62
_NOISE = 2**62 + 1
_PROTOTYPES = 2**62 + 2
_CELLS = 6


def synthetic_source(
  image_shape: tuple[int, int, int],
  task_names: Sequence[str],
  num_classes: int,
  num_examples: int,
  seed: int = 0,
) -> pipeline.ArraySource:
  """Images from which the labels of all tasks can be learned.

  Every class of every task has a prototype, a pattern of at most 6 x 6 dark and
  bright cells. An image is mid-grey plus the prototypes of its labels plus
  noise. Prototypes depend only on the task's place and on `image_shape`, so
  that sources with different seeds are splits of one dataset.

  Args:
    image_shape: (height, width, channels).
    task_names: names of the tasks.
    num_classes: number of classes of each task.
    num_examples: number of images.
    seed: determines labels and noise.

  Returns:
    A source with images uint8 [H, W, C] in 0 .. 255 and uniform labels.

  Raises:
    ValueError: if a size is not positive.
  """
  sizes = (*image_shape, len(task_names), num_classes, num_examples)
  if min(sizes) < 1:
    raise ValueError(
      'image_shape, task_names, num_classes and num_examples must be positive, '
      f'got {image_shape}, {tuple(task_names)}, {num_classes}, {num_examples}'
    )
  num_tasks, num_pixels = len(task_names), int(np.prod(image_shape))
  bits = shuffle.random_bits(num_tasks * num_examples, seed, _LABELS)
  labels = (bits % num_classes).reshape(num_tasks, num_examples)
  # The sum of the patterns stays within 96 of mid-grey, and noise within 24.
  amplitude = 96 // num_tasks
  noise = shuffle.random_bits(num_examples * num_pixels, seed, _NOISE) % 49
  image = 104 + noise.astype(np.int16).reshape(num_examples, *image_shape)
  for task in range(num_tasks):
    prototypes = _prototypes(image_shape, num_classes, task)
    image += amplitude * prototypes[labels[task]]
  return pipeline.ArraySource(
    {
      'image': image.astype(np.uint8),
      'labels': {
        name: labels[task].astype(np.int32)
        for task, name in enumerate(task_names)
      },
    }
  )


def _prototypes(image_shape, num_classes, task):
  """Patterns of -1 and 1, int16 [num_classes, H, W, C]."""
  height, width, channels = image_shape
  bits = shuffle.random_bits(
    num_classes * _CELLS * _CELLS * channels, task, _PROTOTYPES
  )
  cells = (bits >> np.uint64(63)).astype(np.int16) * 2 - 1
  cells = cells.reshape(num_classes, _CELLS, _CELLS, channels)
  rows = np.arange(height) * _CELLS // height
  columns = np.arange(width) * _CELLS // width
  return cells[:, rows][:, :, columns]
