import numpy as np
import pytest

from mtl_jax.data import multi_digits
from mtl_jax.data import pairs


@pytest.fixture
def numbered_digits(monkeypatch):
  """Base images that show their number where no other image can lie."""
  number = np.arange(1797)
  images = np.zeros((1797, 8, 8), np.uint8)
  for row, column in ((0, 0), (7, 6)):
    images[:, row, column] = number % 16
    images[:, row, column + 1] = number // 16
  base = pairs.BaseImages(images, number % 10)
  monkeypatch.setattr(multi_digits, 'base_digits', lambda: base)


def _numbers(images):
  images = images.astype(int)[..., 0]
  first = images[:, 0, 0] + 16 * images[:, 0, 1]
  second = images[:, 9, 8] + 16 * images[:, 9, 9]
  return first, second


def test_no_base_image_is_in_the_pairs_of_two_splits(numbered_digits):
  used = []
  for split in multi_digits.SPLITS:
    arrays = multi_digits.load_multi_digits(split).arrays
    used.append(set(np.concatenate(_numbers(arrays['image'])).tolist()))
  assert [len(numbers) for numbers in used] == [1197, 300, 300]
  assert set.union(*used) == set(range(1797))


def test_labels_are_those_of_the_two_digits_in_their_corners(numbered_digits):
  arrays = multi_digits.load_multi_digits('train').arrays
  first, second = _numbers(arrays['image'])
  np.testing.assert_array_equal(arrays['labels']['task_1'], first % 10)
  np.testing.assert_array_equal(arrays['labels']['task_2'], second % 10)


@pytest.mark.parametrize(
  'split, size', [('train', 4788), ('validation', 1200), ('test', 1200)]
)
def test_splits_hold_the_stated_numbers_of_10x10_images(split, size):
  source = multi_digits.load_multi_digits(split)
  image = source.arrays['image']
  assert len(source) == size
  assert image.shape == (size, *multi_digits.IMAGE_SHAPE)
  assert image.dtype == np.uint8
  assert image.max() == multi_digits.MAX_PIXEL
  for task in multi_digits.TASK_NAMES:
    assert set(source.arrays['labels'][task].tolist()) == set(range(10))
    assert source.arrays['mask'][task].all()


def test_corners_show_scikit_learns_digits_unchanged():
  from sklearn import datasets

  digits = datasets.load_digits().images
  known = {image[:2].tobytes() for image in digits}
  images = multi_digits.load_multi_digits('test').arrays['image']
  top_rows = images[:, :2, :8, 0].astype(digits.dtype)
  assert {rows.tobytes() for rows in top_rows} <= known


def test_an_unknown_split_is_refused():
  with pytest.raises(ValueError, match=r"split must be one of.*'dev'"):
    multi_digits.load_multi_digits('dev')
