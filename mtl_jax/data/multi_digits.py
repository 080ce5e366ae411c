"""Multi-Digits: pairs of scanned 8x8 digits, real data without a download.

The images are the 1797 digits that come with scikit-learn (the test part of
"Optical Recognition of Handwritten Digits"), overlapped on a 10x10 canvas in
the way that Multi-MNIST overlaps MNIST.

References:
  Alpaydin and Kaynak, `Optical Recognition of Handwritten Digits
  <https://doi.org/10.24432/C50P49>`_, 1998
"""

import functools

from mtl_jax.data import pairs
from mtl_jax.data import pipeline

IMAGE_SHAPE = (10, 10, 1)
TASK_NAMES = ('task_1', 'task_2')
NUM_CLASSES = 10
MAX_PIXEL = 16

SPLITS = ('train', 'validation', 'test')
_HELD_OUT = (300, 300)
_ROUNDS = 4
_SHIFT = 2


def load_multi_digits(split: str) -> pipeline.ArraySource:
  """A split of Multi-Digits, in memory.

  Base images are divided before pairing, always in the same way: 1197 for
  training, 300 for validation and 300 for test. Each is used four times in
  either position. This makes 4788, 1200 and 1200 pairs.

  Args:
    split: 'train', 'validation' or 'test'.

  Returns:
    A source of images uint8 [10, 10, 1] with values from 0 to 16, and of the
    labels of 'task_1' (the digit at the top left) and 'task_2' (the one at the
    bottom right).

  Raises:
    ValueError: if there is no such split.
  """
  if split not in SPLITS:
    raise ValueError(f'split must be one of {SPLITS}, got {split!r}')
  digits = base_digits()
  parts = pairs.hold_out(len(digits.labels), *_HELD_OUT)
  part = digits.take(parts[SPLITS.index(split)])
  first, second = pairs.pair_indices(len(part.labels), _ROUNDS)
  return pipeline.ArraySource(
    pairs.paired_examples(part, part, first, second, shift=_SHIFT)
  )


@functools.cache
def base_digits() -> pairs.BaseImages:
  """The 1797 base digits, uint8 [1797, 8, 8] with values 0 to 16."""
  # Imported here: scikit-learn takes a second to import and is rarely needed.
  from sklearn import datasets

  digits = datasets.load_digits()
  return pairs.BaseImages(digits.images.astype('uint8'), digits.target)
