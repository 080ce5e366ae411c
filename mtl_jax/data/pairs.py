"""Overlapped pairs of images, the construction of Multi-MNIST, in NumPy.

Two images of h x w are placed on a canvas of (h + shift) x (w + shift), the
first in the top left corner, the second in the bottom right corner. Where they
overlap the brighter pixel is kept.
"""

from collections.abc import Mapping
import itertools
from typing import NamedTuple

import numpy as np

from mtl_jax.data import shuffle

# Streams of random numbers. They are far from the small numbers for the
# shuffling of epochs, so that the two never share a stream.
_ORDER = 2**63
_OFFSETS = 2**63 + 1
_HOLD_OUT = 2**63 + 2


class BaseImages(NamedTuple):
  """The images from which pairs are made.

  Attributes:
    images: uint8 [N, h, w].
    labels: integers [N].
  """

  images: np.ndarray
  labels: np.ndarray

  def take(self, indices: np.ndarray) -> 'BaseImages':
    """The base images at `indices`."""
    return BaseImages(self.images[indices], self.labels[indices])


def overlap(first: np.ndarray, second: np.ndarray, shift: int) -> np.ndarray:
  r"""Lays each image in `second`, shifted, over the one in `first`.

  .. math::
    y_{rc} = \max(a_{rc}, b_{r-s,c-s})

  with pixels outside an image counted as zero. The public code of Sener and
  Koltun also takes the maximum; Sabour et al. add the two and clip at 255. Here
  the second image is flush with the bottom right corner (28x28 on 36x36 is a
  shift of 8), as in the dataset of Lin et al.; Sener and Koltun shift by 6 and
  scale the canvas down to 28x28.

  Args:
    first: images for the top left corner, [N, h, w].
    second: images for the bottom right corner, [N, h, w].
    shift: how far, in pixels, the second lies below and right of the first.

  Returns:
    Images [N, h + shift, w + shift] of the dtype of `first`.

  Raises:
    ValueError: if the shapes differ or `shift` is negative.

  References:
    Sener and Koltun, `Multi-Task Learning as Multi-Objective Optimization
    <https://arxiv.org/abs/1810.04650>`_, 2018

    Lin et al., `Pareto Multi-Task Learning
    <https://arxiv.org/abs/1912.12854>`_, 2019

    Sabour et al., `Dynamic Routing Between Capsules
    <https://arxiv.org/abs/1710.09829>`_, 2017
  """
  if first.shape != second.shape or first.ndim != 3:
    raise ValueError(
      'first and second must have one shape [N, h, w], got '
      f'{first.shape} and {second.shape}'
    )
  if shift < 0:
    raise ValueError(f'shift must not be negative, got {shift}')
  num, height, width = first.shape
  canvas = np.zeros((num, height + shift, width + shift), first.dtype)
  canvas[:, :height, :width] = first
  corner = canvas[:, shift:, shift:]
  np.maximum(corner, second, out=corner)
  return canvas


def pair_indices(
  num_base: int, rounds: int, *, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
  """The indices of the first and the second base image in each pair.

  The base images are put in a random circle, and each is paired with the one a
  number of places further. Every round has a different random number of places.
  Each base image is thus used exactly `rounds` times in either position, none
  is paired with itself and no pair occurs twice.

  Args:
    num_base: number of base images.
    rounds: number of pairs for each base image.
    seed: a function of this and the sizes alone, on any NumPy version.

  Returns:
    Two integer arrays [rounds * num_base]: first and second.

  Raises:
    ValueError: if `rounds` is not in [1, num_base - 1].
  """
  if not 1 <= rounds < num_base:
    raise ValueError(
      f'rounds must be at least 1 and less than num_base={num_base}, '
      f'got {rounds}'
    )
  circle = shuffle.permutation(num_base, seed, _ORDER)
  offsets = 1 + shuffle.permutation(num_base - 1, seed, _OFFSETS)[:rounds]
  second = np.concatenate([np.roll(circle, -offset) for offset in offsets])
  return np.tile(circle, rounds), second


def hold_out(
  num_base: int, *sizes: int, seed: int = 0
) -> tuple[np.ndarray, ...]:
  """Splits base images at random, before any pair is made.

  Args:
    num_base: number of base images.
    *sizes: number of images for each further split.
    seed: a function of this and `num_base` alone, on any NumPy version.

  Returns:
    Sorted disjoint index arrays: the rest first, then one for each of `sizes`.

  Raises:
    ValueError: if a size is not positive or nothing would be left.
  """
  if min(sizes, default=1) < 1 or sum(sizes) >= num_base:
    raise ValueError(
      f'sizes must be positive and sum to less than num_base={num_base}, '
      f'got {sizes}'
    )
  order = shuffle.permutation(num_base, seed, _HOLD_OUT)
  bounds = np.cumsum((0, *sizes))
  rest = np.sort(order[bounds[-1] :])
  taken = [
    np.sort(order[start:stop]) for start, stop in itertools.pairwise(bounds)
  ]
  return (rest, *taken)


def paired_examples(
  first: BaseImages,
  second: BaseImages,
  first_indices: np.ndarray,
  second_indices: np.ndarray,
  *,
  shift: int,
) -> Mapping[str, np.ndarray]:
  """The pairs of the given indices as images with two labels.

  Args:
    first: base images for the top left corner.
    second: base images for the bottom right corner.
    first_indices: indices into `first`, [B].
    second_indices: indices into `second`, [B].
    shift: how far, in pixels, the second lies below and right of the first.

  Returns:
    `{'image': uint8 [B, h + shift, w + shift, 1], 'labels': {'task_1': [B],
    'task_2': [B]}}`; task_1 is the label of the first, int32.
  """
  image = overlap(
    first.images[first_indices], second.images[second_indices], shift
  )
  return {
    'image': image[..., np.newaxis],
    'labels': {
      'task_1': first.labels[first_indices].astype(np.int32),
      'task_2': second.labels[second_indices].astype(np.int32),
    },
  }
