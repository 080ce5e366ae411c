"""Random orders that stay the same on every machine and NumPy version."""

import numpy as np


def permutation(size: int, seed: int, stream: int = 0) -> np.ndarray:
  """A random order of `size` things, a function of `seed` and `stream` only.

  The order sorts the first `size` outputs of the counter-based generator
  Philox4x64-10 under the key (`seed`, `stream`). NumPy promises that this
  stream of integers never changes. It does not promise this for
  `np.random.Generator.permutation`.

  Args:
    size: number of things to order.
    seed: first half of the key, 0 <= `seed` < 2**64.
    stream: second half of the key, with the same bounds; different streams of
      one seed are independent.

  Returns:
    A permutation of `0 .. size - 1`, int64 [size].

  Raises:
    ValueError: if `seed` or `stream` is out of bounds.

  References:
    Salmon et al., `Parallel random numbers: as easy as 1, 2, 3
    <https://doi.org/10.1145/2063384.2063405>`_, 2011
  """
  # Equal 64-bit outputs are nearly impossible; a stable sort orders even those
  # in the same way everywhere.
  return np.argsort(random_bits(size, seed, stream), kind='stable')


def random_bits(size: int, seed: int, stream: int = 0) -> np.ndarray:
  """The first `size` outputs of Philox4x64-10 under (`seed`, `stream`).

  Args:
    size: number of outputs.
    seed: first half of the key, 0 <= `seed` < 2**64.
    stream: second half of the key, with the same bounds.

  Returns:
    uint64 [size].

  Raises:
    ValueError: if `seed` or `stream` is out of bounds.
  """
  for name, value in (('seed', seed), ('stream', stream)):
    if not 0 <= value < 2**64:
      raise ValueError(f'{name} must be in [0, 2**64), got {value}')
  key = np.array([seed, stream], np.uint64)
  return np.random.Philox(key=key).random_raw(size)
