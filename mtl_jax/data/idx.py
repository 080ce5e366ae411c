"""IDX files, the format of MNIST and Fashion-MNIST, and their sources.

An IDX file is a header, two zero bytes, a type code, the number of dimensions
and each dimension as a big-endian 32-bit integer, followed by the values.

References:
  LeCun et al., `The MNIST database <http://yann.lecun.com/exdb/mnist/>`_

  Xiao et al., `Fashion-MNIST <https://arxiv.org/abs/1708.07747>`_, 2017
"""

from collections.abc import Mapping
import functools
import gzip
import hashlib
import os
import pathlib
import zlib

import numpy as np

from mtl_jax.data import pairs

SOURCE_DIR_VARIABLE = 'MTL_JAX_SOURCE_DIR'

TRAIN_IMAGES = 'train-images-idx3-ubyte'
TRAIN_LABELS = 'train-labels-idx1-ubyte'
TEST_IMAGES = 't10k-images-idx3-ubyte'
TEST_LABELS = 't10k-labels-idx1-ubyte'
FILES = (TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS)

# The download address of a dataset's files: a URL and `<file>.gz`.
URLS: Mapping[str, str] = {
  'mnist': 'https://storage.googleapis.com/cvdf-datasets/mnist/',
  'fashion_mnist': (
    'http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/'
  ),
}

# SHA-256 of the unpacked original files: a file can be gzipped in many ways.
SHA256: Mapping[str, Mapping[str, str]] = {
  'mnist': {
    TRAIN_IMAGES: (
      'ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db'
    ),
    TRAIN_LABELS: (
      '65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5'
    ),
    TEST_IMAGES: (
      '0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7'
    ),
    TEST_LABELS: (
      'ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2'
    ),
  },
  'fashion_mnist': {
    TRAIN_IMAGES: (
      'c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888'
    ),
    TRAIN_LABELS: (
      'bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9'
    ),
    TEST_IMAGES: (
      '5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b'
    ),
    TEST_LABELS: (
      '0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34'
    ),
  },
}

_UNSIGNED_BYTE = 0x08


def source_folder(source_dir: str | os.PathLike | None) -> pathlib.Path | None:
  """The folder with raw files that the user names.

  Args:
    source_dir: a folder holding `mnist/` and `fashion_mnist/`, or None for the
      one in the environment variable `MTL_JAX_SOURCE_DIR`.

  Returns:
    The folder, or None if neither names one.
  """
  source_dir = source_dir or os.environ.get(SOURCE_DIR_VARIABLE)
  return pathlib.Path(source_dir).expanduser() if source_dir else None


def find_source(
  source_dir: str | os.PathLike, name: str
) -> dict[str, pathlib.Path]:
  """The files of a dataset in a folder with raw files.

  Args:
    source_dir: a folder holding a folder `name`.
    name: 'mnist' or 'fashion_mnist'.

  Returns:
    `{file: path}` for each of `FILES`, gzipped or plain.

  Raises:
    FileNotFoundError: if files are missing; the message names them, the folder
      and the download address.
    ValueError: if there is no such dataset, or if a file is known to be another
      file from either dataset.
  """
  if name not in URLS:
    raise ValueError(f'name must be one of {tuple(URLS)}, got {name!r}')
  folder = pathlib.Path(source_dir) / name
  found = {}
  for file in FILES:
    for path in (folder / f'{file}.gz', folder / file):
      if path.is_file():
        found[file] = path
        break
  missing = [f'{file}.gz' for file in FILES if file not in found]
  if missing:
    raise FileNotFoundError(
      f'{name}: {len(missing)} of {len(FILES)} source files are missing in '
      f'{folder}: {", ".join(missing)}. Download them from {URLS[name]} '
      f'(such as {URLS[name]}{missing[0]}). The source folder, named by '
      f'--source_dir or {SOURCE_DIR_VARIABLE}, must hold {name}/ with them.'
    )
  known = {
    digest: f'{file} of {dataset}'
    for dataset, digests in SHA256.items()
    for file, digest in digests.items()
  }
  for file, path in found.items():
    expected = f'{file} of {name}'
    if known.get(fingerprint(path), expected) != expected:
      raise ValueError(
        f'{path} is {known[fingerprint(path)]}, expected {expected}'
      )
  return found


def read_idx(
  path: str | os.PathLike, shape: tuple[int | None, ...]
) -> np.ndarray:
  """Reads an IDX file of bytes, gzipped or plain.

  Args:
    path: the file.
    shape: its required dimensions, with None for any.

  Returns:
    uint8 array of the file's shape, read-only.

  Raises:
    ValueError: if the file is cut short or damaged, is not an IDX file, or
      holds another type or shape; the message names the file, the found and the
      expected value.
  """
  data = _content(path)
  if len(data) < 4 or data[:2] != b'\0\0':
    raise ValueError(
      f'{path} is not an IDX file: it starts with {data[:4].hex(" ")!r}, '
      f'expected {_magic(len(shape)).hex(" ")!r}'
    )
  if data[2] != _UNSIGNED_BYTE or data[3] != len(shape):
    raise ValueError(
      f'{path} is an IDX file of type 0x{data[2]:02x} with {data[3]} '
      f'dimensions, expected unsigned bytes (0x{_UNSIGNED_BYTE:02x}) with '
      f'{len(shape)}'
    )
  start = 4 + 4 * len(shape)
  if len(data) < start:
    raise ValueError(
      f'{path} is cut short: {len(data)} bytes, expected a header of {start}'
    )
  found = tuple(int(n) for n in np.frombuffer(data[4:start], '>u4'))
  if any(want not in (None, n) for want, n in zip(shape, found, strict=True)):
    raise ValueError(
      f'{path} holds an array of shape {found}, expected {_show(shape)}'
    )
  size = int(np.prod(found, dtype=np.int64))
  if len(data) - start != size:
    raise ValueError(
      f'{path} holds {len(data) - start} values, expected {size} for the shape '
      f'{found} in its header'
    )
  return np.frombuffer(data, np.uint8, offset=start).reshape(found)


def read_images(
  images_path: str | os.PathLike,
  labels_path: str | os.PathLike,
  *,
  image_shape: tuple[int, int] = (28, 28),
  num_classes: int = 10,
) -> pairs.BaseImages:
  """Reads a file of images and the file of their labels.

  Args:
    images_path: IDX file of shape [N, h, w].
    labels_path: IDX file of shape [N].
    image_shape: h and w.
    num_classes: labels must be smaller.

  Returns:
    The images, uint8 [N, h, w], and their labels, uint8 [N].

  Raises:
    ValueError: as `read_idx`, and if the numbers of images and labels differ,
      there are none, or a label is too large.
  """
  images = read_idx(images_path, (None, *image_shape))
  labels = read_idx(labels_path, (None,))
  if len(images) != len(labels) or not len(images):
    raise ValueError(
      f'{images_path} holds {len(images)} images and {labels_path} '
      f'{len(labels)} labels, expected equal numbers of at least one'
    )
  if labels.max() >= num_classes:
    raise ValueError(
      f'{labels_path} holds the label {labels.max()}, expected less than '
      f'{num_classes}'
    )
  return pairs.BaseImages(images, labels)


def fingerprint(path: str | os.PathLike) -> str:
  """SHA-256 of a file's content, unpacked, in hexadecimal.

  Args:
    path: the file, gzipped or plain.

  Returns:
    64 hexadecimal digits.

  Raises:
    ValueError: if the file is cut short or damaged.
  """
  stat = os.stat(path)
  return _fingerprint(os.fspath(path), stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _fingerprint(path, size, modified):
  del size, modified  # Part of the key only: a changed file is read again.
  return hashlib.sha256(_content(path)).hexdigest()


def _content(path):
  """The bytes of a file, unpacked if gzipped, for any file name."""
  data = pathlib.Path(path).read_bytes()
  if data[:2] != b'\x1f\x8b':
    return data
  try:
    return gzip.decompress(data)
  except (EOFError, zlib.error, gzip.BadGzipFile) as error:
    raise ValueError(
      f'{path} is a gzip file cut short or damaged: {len(data)} bytes found, '
      f'and unpacking them ends with {error}'
    ) from error


def _magic(num_dimensions):
  return bytes((0, 0, _UNSIGNED_BYTE, num_dimensions))


def _show(shape):
  return '(' + ', '.join('any' if n is None else str(n) for n in shape) + ')'
