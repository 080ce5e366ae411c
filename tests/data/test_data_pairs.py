import numpy as np
import pytest

from mtl_jax.data import pairs


def test_overlap_keeps_the_brighter_pixel_and_the_second_lies_bottom_right():
  first = np.array([[[9, 1], [2, 5]]], np.uint8)
  second = np.array([[[7, 3], [4, 200]]], np.uint8)
  np.testing.assert_array_equal(
    pairs.overlap(first, second, shift=1),
    np.array([[[9, 1, 0], [2, 7, 3], [0, 4, 200]]], np.uint8),
  )
  assert pairs.overlap(first, second, shift=1).dtype == np.uint8


def test_28_pixel_images_shifted_by_8_fill_a_canvas_of_36_to_both_corners():
  ones = np.ones((1, 28, 28), np.uint8)
  image = pairs.overlap(ones, 2 * ones, shift=8)
  assert image.shape == (1, 36, 36)
  assert (image[0, 8:, 8:] == 2).all()
  assert (image[0, :8, :28] == 1).all() and (image[0, :28, :8] == 1).all()
  assert (image[0, :8, 28:] == 0).all() and (image[0, 28:, :8] == 0).all()


@pytest.mark.parametrize('num_base, rounds', [(2, 1), (7, 2), (50, 4)])
def test_every_base_image_is_used_equally_often_in_either_position(
  num_base, rounds
):
  first, second = pairs.pair_indices(num_base, rounds)
  assert (np.bincount(first, minlength=num_base) == rounds).all()
  assert (np.bincount(second, minlength=num_base) == rounds).all()


@pytest.mark.parametrize('seed', range(5))
def test_no_image_is_paired_with_itself_and_no_pair_occurs_twice(seed):
  first, second = pairs.pair_indices(5, 4, seed=seed)
  assert (first != second).all()
  assert len(set(zip(first.tolist(), second.tolist(), strict=True))) == 20


def test_pairs_are_a_function_of_the_seed():
  again = [np.stack(pairs.pair_indices(30, 2, seed=s)) for s in (3, 3, 4)]
  np.testing.assert_array_equal(again[0], again[1])
  assert (again[0] != again[2]).any()


def test_hold_out_divides_the_base_images_without_overlap():
  parts = pairs.hold_out(20, 3, 5)
  assert [len(part) for part in parts] == [12, 3, 5]
  np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(20))
  assert not np.array_equal(parts[1], np.arange(3))


def test_task_1_is_the_label_of_the_first_image_and_task_2_of_the_second():
  base = pairs.BaseImages(
    np.arange(3, dtype=np.uint8)[:, None, None] * np.ones((2, 2), np.uint8),
    np.array([10, 11, 12], np.uint8),
  )
  examples = pairs.paired_examples(
    base, base, np.array([0, 2]), np.array([1, 0]), shift=1
  )
  assert examples['image'].shape == (2, 3, 3, 1)
  assert examples['labels']['task_1'].tolist() == [10, 12]
  assert examples['labels']['task_2'].tolist() == [11, 10]
  assert examples['labels']['task_1'].dtype == np.int32


def test_wrong_arguments_are_refused_by_name():
  images = np.zeros((2, 4, 4), np.uint8)
  with pytest.raises(ValueError, match='first and second'):
    pairs.overlap(images, images[:1], 2)
  with pytest.raises(ValueError, match='shift'):
    pairs.overlap(images, images, -1)
  for rounds in (0, 5):
    with pytest.raises(ValueError, match='rounds'):
      pairs.pair_indices(5, rounds)
  for sizes in ((0,), (3, 2)):
    with pytest.raises(ValueError, match='sizes'):
      pairs.hold_out(5, *sizes)
