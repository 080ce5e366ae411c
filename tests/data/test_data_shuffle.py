import numpy as np
import pytest

from mtl_jax.data import shuffle

_WORD = 2**64 - 1


def _philox4x64(counter, key):
  """Philox4x64-10 as Salmon et al. (2011) define it, in Python integers."""
  c0, c1, c2, c3 = counter
  k0, k1 = key
  for _ in range(10):
    product0 = 0xD2E7470EE14C6C93 * c0
    product1 = 0xCA5A826395121157 * c2
    c0, c1, c2, c3 = (
      (product1 >> 64) ^ c1 ^ k0,
      product1 & _WORD,
      (product0 >> 64) ^ c3 ^ k1,
      product0 & _WORD,
    )
    k0 = (k0 + 0x9E3779B97F4A7C15) & _WORD
    k1 = (k1 + 0xBB67AE8584CAA73B) & _WORD
  return [c0, c1, c2, c3]


def test_reference_philox_gives_the_published_known_answer():
  # The first line for philox4x64 in the known answers of Random123.
  assert _philox4x64((0, 0, 0, 0), (0, 0)) == [
    0x16554D9ECA36314C,
    0xDB20FE9D672D0FDC,
    0xD7E772CEE186176B,
    0x7E68B68AEC7BA23B,
  ]


@pytest.mark.parametrize('seed, stream', [(0, 0), (7, 3), (2**63, 2**64 - 1)])
def test_permutation_sorts_the_outputs_of_philox(seed, stream):
  words = []
  for block in range(1, 11):  # NumPy counts up before the first block.
    words += _philox4x64((block, 0, 0, 0), (seed, stream))
  for size in (1, 10, 40):
    expected = sorted(range(size), key=lambda i: words[i])
    assert shuffle.permutation(size, seed, stream).tolist() == expected


def test_permutation_differs_between_seeds_and_between_streams():
  orders = [
    tuple(shuffle.permutation(100, seed, stream))
    for seed in (0, 1)
    for stream in (0, 1)
  ]
  assert len(set(orders)) == 4


@pytest.mark.parametrize(
  'seed, stream, name', [(-1, 0, 'seed'), (2**64, 0, 'seed'), (0, -1, 'stream')]
)
def test_numbers_outside_64_bits_are_refused(seed, stream, name):
  with pytest.raises(ValueError, match=f'{name} must be in'):
    shuffle.permutation(3, seed, stream)


def test_random_bits_are_the_same_however_many_are_asked_for():
  np.testing.assert_array_equal(
    shuffle.random_bits(5, 1, 2), shuffle.random_bits(9, 1, 2)[:5]
  )
