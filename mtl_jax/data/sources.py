"""Sources of examples in memory and, by tensorflow-datasets, on disk."""

from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import numpy as np

from mtl_jax import types


class ArraySource:
  """Examples in memory.

  Attributes:
    arrays: all examples as one batch, masks included.
  """

  def __init__(self, arrays: Mapping[str, Any]):
    """Takes the arrays of all examples; they are not copied.

    Args:
      arrays: `{'image': [N, H, W, C], 'labels': {task: [N, ...]}, 'mask':
        {task: [N, ...]}}`. Without `'mask'` every label is present.

    Raises:
      ValueError: if there is no example, the number of examples differs between
        arrays, or labels and masks have different tasks.
    """
    image, labels = arrays['image'], dict(arrays['labels'])
    mask = arrays.get('mask')
    if mask is None:
      mask = {
        task: np.ones(np.shape(label), np.float32)
        for task, label in labels.items()
      }
    if set(mask) != set(labels):
      raise ValueError(
        'labels and mask must be of the same tasks, got '
        f'{sorted(labels)} and {sorted(mask)}'
      )
    lengths = {len(a) for a in (image, *labels.values(), *mask.values())}
    if len(lengths) != 1 or 0 in lengths:
      raise ValueError(
        'image, labels and mask must hold the same number of examples, at '
        f'least one, got {sorted(lengths)}'
      )
    self.arrays: types.Batch = {
      'image': image,
      'labels': labels,
      'mask': dict(mask),
    }

  def __len__(self) -> int:
    """Number of examples."""
    return len(self.arrays['image'])

  def __getitems__(self, indices: np.ndarray) -> types.Batch:
    """The examples of `indices` [B] as one batch of NumPy arrays."""
    return {
      'image': np.take(self.arrays['image'], indices, axis=0),
      'labels': _take(self.arrays['labels'], indices),
      'mask': _take(self.arrays['mask'], indices),
    }


class TfdsSource:
  """Examples from a prepared dataset, read from disk one by one.

  Reading an example takes tens of microseconds; `in_memory` pays that once.
  """

  def __init__(
    self, records: Sequence[Mapping[str, Any]], task_names: Sequence[str]
  ):
    """Wraps the result of `builder.as_data_source(split)`.

    Args:
      records: a data source of tensorflow-datasets, whose examples hold
        'image' and, under the name of each task, its integer label.
      task_names: names of the tasks.
    """
    self._records = records
    self._task_names = tuple(task_names)

  def __len__(self) -> int:
    """Number of examples."""
    return len(self._records)

  def __getitems__(self, indices: np.ndarray) -> types.Batch:
    """The examples of `indices` [B] as one batch of NumPy arrays."""
    examples = self._records.__getitems__(np.asarray(indices).tolist())
    labels = {
      task: np.array([example[task] for example in examples], np.int32)
      for task in self._task_names
    }
    return {
      'image': np.stack([example['image'] for example in examples]),
      'labels': labels,
      'mask': {
        task: np.ones(label.shape, np.float32) for task, label in labels.items()
      },
    }


def in_memory(source: types.Source, chunk: int = 4096) -> ArraySource:
  """Reads a whole source into memory, in its own dtypes.

  Args:
    source: the examples.
    chunk: number of examples to read at a time.

  Returns:
    The same examples in the same order.
  """
  size = len(source)
  whole: Any = None
  for start in range(0, size, chunk):
    stop = min(start + chunk, size)
    part = source.__getitems__(np.arange(start, stop))
    if whole is None:
      whole = {
        'image': _room(part['image'], size),
        'labels': {k: _room(v, size) for k, v in part['labels'].items()},
        'mask': {k: _room(v, size) for k, v in part['mask'].items()},
      }
    whole['image'][start:stop] = part['image']
    for key in ('labels', 'mask'):
      for task, values in part[key].items():
        whole[key][task][start:stop] = values
  return ArraySource(whole)


def _take(arrays, indices):
  return {name: np.take(a, indices, axis=0) for name, a in arrays.items()}


def _room(part, size):
  return np.empty((size, *part.shape[1:]), part.dtype)
