"""Multi-MNIST, Multi-Fashion and Multi-Fashion+MNIST, from a prepared dataset.

120,000 training and 20,000 test images of 36x36: two 28x28 images, one at the
top left and one at the bottom right, overlapped.

References:
  Lin et al., `Pareto Multi-Task Learning
  <https://arxiv.org/abs/1912.12854>`_, 2019

  Phan et al., `Improving Multi-task Learning via Seeking Task-based Flat
  Regions <https://arxiv.org/abs/2211.13723>`_, 2022
"""

import os
from typing import TYPE_CHECKING

from mtl_jax import types
from mtl_jax.data import idx
from mtl_jax.data import sources

if TYPE_CHECKING:
  from mtl_jax.data import multi_mnist_builder

NAMES = ('multi_mnist', 'multi_fashion', 'multi_fashion_and_mnist')
IMAGE_SHAPE = (36, 36, 1)
TASK_NAMES = ('task_1', 'task_2')
NUM_CLASSES = 10
MAX_PIXEL = 255

# The name of a split on disk under either scheme.
_STORED = {
  'holdout': {
    'train': 'train_holdout',
    'validation': 'validation',
    'test': 'test',
  },
  'paper': {'train': 'train', 'test': 'test'},
}


def load_multi_mnist(
  name: str,
  split: str,
  *,
  data_dir: str | os.PathLike | None = None,
  source_dir: str | os.PathLike | None = None,
  split_scheme: str = 'holdout',
  storage: str = 'memory',
) -> types.Source:
  """A split from one of the three datasets.

  'task_1' is the task for the image at the top left, 'task_2' for the image at
  the bottom right. In 'multi_fashion_and_mnist' the first is a digit from MNIST
  and the second an item from Fashion-MNIST. The published accuracies (98 and 89
  per cent) show this order.

  Args:
    name: 'multi_mnist', 'multi_fashion' or 'multi_fashion_and_mnist'.
    split: 'train', 'validation' or 'test'.
    data_dir: the folder of the prepared dataset; None is tensorflow-datasets'
      own default.
    source_dir: the folder with raw files from which it should have been
      prepared, None for the one in `MTL_JAX_SOURCE_DIR`, if any. If the folder
      is given, its files must be the dataset's source files.
    split_scheme: 'holdout' takes 5,000 base images out for validation before
      anything is paired (110,000 training and 10,000 validation pairs);
      'paper' trains on the pairs of all 60,000 (120,000) and has no validation
      split. The test split is the same.
    storage: 'memory' reads the whole split once (some seconds; 1.3 kB an
      example), 'disk' reads examples on demand.

  Returns:
    A source of images uint8 [36, 36, 1] in 0 .. 255 and int32 labels.

  Raises:
    ValueError: if there is no such name, split, scheme or storage, or if the
      dataset was made from other source files.
    FileNotFoundError: if the dataset has not been prepared; the message gives
      the command.
  """
  if storage not in ('memory', 'disk'):
    raise ValueError(f"storage must be 'memory' or 'disk', got {storage!r}")
  stored = _stored_split(split, split_scheme)
  builder = make_builder(name, data_dir)
  if not is_prepared(builder):
    command = f'python -m mtl_jax.data.prepare --dataset={name}'
    for flag, value in (('data_dir', data_dir), ('source_dir', source_dir)):
      command += f' --{flag}={value}' if value else ''
    raise FileNotFoundError(
      f'{name} has not been prepared in {builder.data_dir}; prepare it with\n'
      f'  {command}'
    )
  folder = idx.source_folder(source_dir)
  if folder is not None and folder.is_dir():
    check_source(builder, folder)
  source = sources.TfdsSource(builder.as_data_source(stored), TASK_NAMES)
  return sources.in_memory(source) if storage == 'memory' else source


def make_builder(
  name: str,
  data_dir: str | os.PathLike | None = None,
  source_dir: str | os.PathLike | None = None,
) -> 'multi_mnist_builder.MultiMnist':
  """The tensorflow-datasets builder for a dataset.

  Args:
    name: one of `NAMES`.
    data_dir: the folder in which it is or will be prepared.
    source_dir: a folder with raw files, or None to download them.

  Returns:
    The builder.

  Raises:
    ValueError: if there is no such dataset.
  """
  if name not in NAMES:
    raise ValueError(f'name must be one of {NAMES}, got {name!r}')
  # Imported here: other problems do without tensorflow-datasets.
  from mtl_jax.data import multi_mnist_builder

  return multi_mnist_builder.MultiMnist(
    config=name,
    data_dir=None if data_dir is None else os.path.expanduser(data_dir),
    source_dir=source_dir,
  )


def is_prepared(builder: 'multi_mnist_builder.MultiMnist') -> bool:
  """Whether a builder's dataset is complete on disk.

  The folder gets its name only when everything in it has been written.
  """
  return os.path.isdir(builder.data_dir)


def check_source(
  builder: 'multi_mnist_builder.MultiMnist', source_dir: str | os.PathLike
) -> None:
  """Checks that a prepared dataset was made from the files in a folder.

  Args:
    builder: the builder of the prepared dataset.
    source_dir: a folder of raw files.

  Raises:
    FileNotFoundError: if files are missing in the folder.
    ValueError: if the dataset was made from files with other content.
  """
  made_of = builder.info.metadata['sources']
  names = dict.fromkeys(key.partition('/')[0] for key in made_of)
  for name in names:
    for file, path in idx.find_source(source_dir, name).items():
      found, expected = idx.fingerprint(path), made_of[f'{name}/{file}']
      if found != expected:
        raise ValueError(
          f'{builder.data_dir} was not prepared from {path}: the SHA-256 of '
          f'its content is {found}, expected {expected}. Name another '
          'data_dir, or delete that folder to prepare it from the new files'
        )


def _stored_split(split, split_scheme):
  if split_scheme not in _STORED:
    raise ValueError(
      f'split_scheme must be one of {tuple(_STORED)}, got {split_scheme!r}'
    )
  if split_scheme == 'paper' and split == 'validation':
    raise ValueError(
      "split_scheme='paper' trains on all base images and leaves none for "
      "split='validation'; use split_scheme='holdout' to select models"
    )
  splits = _STORED[split_scheme]
  if split not in splits:
    raise ValueError(
      f'split must be one of {tuple(splits)} with '
      f'split_scheme={split_scheme!r}, got {split!r}'
    )
  return splits[split]
