"""The tensorflow-datasets builder for Multi-MNIST and its two relatives.

It runs without TensorFlow: images are zlib-packed tensors, and examples are in
array_record files.
"""

from collections.abc import Iterator
import dataclasses
import os
import urllib.request

import numpy as np
import tensorflow_datasets as tfds

from mtl_jax.data import idx
from mtl_jax.data import pairs

IMAGE_SIZE = 28
SHIFT = 8
ROUNDS = 2
# 5,000 from MNIST's 60,000.
_HELD_OUT_SHARE = 12
_CHUNK = 1000


@dataclasses.dataclass(kw_only=True)
class MultiMnistConfig(tfds.core.BuilderConfig):
  """The choice of images that are overlapped.

  Attributes:
    first: the dataset of the images at the top left, 'mnist' or
      'fashion_mnist'.
    second: the dataset of the images at the bottom right.
  """

  first: str
  second: str


class MultiMnist(tfds.core.GeneratorBasedBuilder):
  """Two 28x28 images overlapped on 36x36, and the label of each."""

  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES = {'1.0.0': 'First version.'}  # noqa: RUF012
  BUILDER_CONFIGS = [  # noqa: RUF012
    MultiMnistConfig(
      name='multi_mnist',
      description='A digit over a digit.',
      first='mnist',
      second='mnist',
    ),
    MultiMnistConfig(
      name='multi_fashion',
      description='A piece of clothing over a piece of clothing.',
      first='fashion_mnist',
      second='fashion_mnist',
    ),
    MultiMnistConfig(
      name='multi_fashion_and_mnist',
      description='A piece of clothing over a digit.',
      first='mnist',
      second='fashion_mnist',
    ),
  ]

  def __init__(self, *, source_dir: str | os.PathLike | None = None, **kwargs):
    """Makes the builder.

    Args:
      source_dir: a folder of raw files with `mnist/` and `fashion_mnist/`; None
        to download them.
      **kwargs: arguments of `tfds.core.GeneratorBasedBuilder`.
    """
    self._source_dir = source_dir
    super().__init__(file_format='array_record', **kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    side = IMAGE_SIZE + SHIFT
    return tfds.core.DatasetInfo(
      builder=self,
      description=(
        'Pairs of images of MNIST and Fashion-MNIST: one at the top left, the '
        'other at the bottom right, the brighter pixel where they overlap. '
        'task_1 is the label of the first, task_2 that of the second. '
        "'train_holdout' and 'validation' are made of disjoint parts of the "
        "base images of 'train'."
      ),
      features=tfds.features.FeaturesDict(
        {
          'image': tfds.features.Tensor(
            shape=(side, side, 1), dtype=np.uint8, encoding='zlib'
          ),
          'task_1': tfds.features.Scalar(np.int32),
          'task_2': tfds.features.Scalar(np.int32),
        }
      ),
      # Filled with the fingerprints of the source files while preparing.
      metadata=tfds.core.MetadataDict(sources={}),
      # The order of pairs is already random, and batches are drawn at random.
      disable_shuffling=True,
    )

  def _split_generators(self, dl_manager):
    config = self.builder_config
    train, test = {}, {}
    for name in dict.fromkeys((config.first, config.second)):
      paths = self._source_files(dl_manager, name)
      self.info.metadata['sources'].update(
        {f'{name}/{file}': idx.fingerprint(p) for file, p in paths.items()}
      )
      train[name] = idx.read_images(
        paths[idx.TRAIN_IMAGES], paths[idx.TRAIN_LABELS]
      )
      test[name] = idx.read_images(
        paths[idx.TEST_IMAGES], paths[idx.TEST_LABELS]
      )
    for part, images in (('training', train), ('test', test)):
      sizes = {name: len(base.labels) for name, base in images.items()}
      if len(set(sizes.values())) > 1:
        raise ValueError(
          f'{config.name} needs equal numbers of {part} images from both '
          f'datasets, found {sizes}'
        )
    num_train = len(train[config.first].labels)
    # A tiny source also has a hold-out, with the three images that pairs need.
    held_out = max(num_train // _HELD_OUT_SHARE, ROUNDS + 1)
    kept, taken = pairs.hold_out(num_train, held_out)
    everything = np.arange(num_train)
    return {
      'train': self._generate_examples(train, everything),
      'train_holdout': self._generate_examples(train, kept),
      'validation': self._generate_examples(train, taken),
      'test': self._generate_examples(
        test, np.arange(len(test[config.first].labels))
      ),
    }

  def _generate_examples(self, images, base_indices) -> Iterator:
    """The pairs from the base images at `base_indices`, with their number."""
    first = images[self.builder_config.first].take(base_indices)
    second = images[self.builder_config.second].take(base_indices)
    left, right = pairs.pair_indices(len(base_indices), ROUNDS)
    for start in range(0, len(left), _CHUNK):
      chunk = slice(start, start + _CHUNK)
      examples = pairs.paired_examples(
        first, second, left[chunk], right[chunk], shift=SHIFT
      )
      labels = examples['labels']
      for row, image in enumerate(examples['image']):
        yield (
          start + row,
          {
            'image': image,
            'task_1': labels['task_1'][row],
            'task_2': labels['task_2'][row],
          },
        )

  def _source_files(self, dl_manager, name):
    """Paths of the source files of a dataset, `{file: path}`."""
    if self._source_dir is not None:
      return idx.find_source(self._source_dir, name)
    urls = {file: f'{idx.URLS[name]}{file}.gz' for file in idx.FILES}
    try:
      # Without a network tensorflow-datasets retries for minutes; a single
      # request first shows that at once.
      question = urllib.request.Request(urls[idx.TEST_LABELS], method='HEAD')
      urllib.request.urlopen(question, timeout=30).close()
      paths = dl_manager.download(urls)
    except (OSError, tfds.download.DownloadError) as error:
      files = ', '.join(f'{file}.gz' for file in idx.FILES)
      raise ConnectionError(
        f'{name} cannot be downloaded from {idx.URLS[name]}: {error}. Where '
        f'there is no network, put {files} into a folder {name}/ and name the '
        f'folder that holds it by --source_dir or {idx.SOURCE_DIR_VARIABLE}'
      ) from error
    for file, path in paths.items():
      found, expected = idx.fingerprint(path), idx.SHA256[name][file]
      if found != expected:
        raise ValueError(
          f'{urls[file]} is not the original file: the SHA-256 of its '
          f'content is {found}, expected {expected}; delete {path} to '
          'download it again'
        )
    return paths
