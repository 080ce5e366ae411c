"""Multi-Digits: two overlapped digits of 8x8 pixels, without a download."""

from typing import Any

from mtl_jax import types
from mtl_jax.data import multi_digits as data
from mtl_jax.problems import pairs


def multi_digits() -> types.Problem:
  """Two tasks: the digit at the top left and the digit at the bottom right.

  The images are real scans from scikit-learn, overlapped in the way that
  Multi-MNIST overlaps MNIST; see `mtl_jax.data.multi_digits`. There are no
  published baselines.

  Returns:
    A `types.Problem`; its `load` raises a ValueError for another
    `split_scheme` than 'holdout'.
  """

  def load(
    split: str, *, split_scheme: str = 'holdout', **unused: Any
  ) -> types.Source:
    del unused  # Nothing is read from disk.
    if split_scheme != 'holdout':
      raise ValueError(
        'multi_digits has no split of a paper, and always holds its validation '
        f"split out: data.split must be 'holdout', got {split_scheme!r}"
      )
    return data.load_multi_digits(split)

  return pairs.pair_problem(
    'multi_digits',
    image_shape=data.IMAGE_SHAPE,
    task_names=data.TASK_NAMES,
    num_classes=data.NUM_CLASSES,
    max_pixel=data.MAX_PIXEL,
    load_real=load,
  )
