import numpy as np
import pytest

from mtl_jax.data import synthetic

_TASKS = ('depth', 'normal')


def _centred(source):
  image = source.arrays['image'].astype(np.float64)
  return image.reshape(len(source), -1) - 128


@pytest.mark.parametrize('image_shape', [(12, 12, 1), (8, 10, 3)])
def test_a_linear_classifier_from_one_seed_finds_all_labels_of_another(
  image_shape,
):
  train, test = (
    synthetic.synthetic_source(image_shape, _TASKS, 5, size, seed)
    for seed, size in ((0, 400), (1, 100))
  )
  for task in _TASKS:
    one_hot = np.eye(5)[train.arrays['labels'][task]]
    weights = np.linalg.lstsq(_centred(train), one_hot - 0.2, rcond=1e-3)[0]
    found = (_centred(test) @ weights).argmax(axis=1)
    np.testing.assert_array_equal(found, test.arrays['labels'][task])


def test_tasks_have_labels_of_their_own():
  labels = synthetic.synthetic_source((6, 6, 1), _TASKS, 4, 2000).arrays[
    'labels'
  ]
  joint = np.zeros((4, 4))
  np.add.at(joint, (labels['depth'], labels['normal']), 1)
  # 125 of each of 16 combinations are expected, with a deviation of 11.
  assert joint.min() > 70 and joint.max() < 180


def test_images_are_bytes_and_a_function_of_the_seed():
  sources = [
    synthetic.synthetic_source((7, 5, 2), ('a', 'b', 'c'), 3, 20, seed)
    for seed in (4, 4, 5)
  ]
  images = [source.arrays['image'] for source in sources]
  assert images[0].dtype == np.uint8 and images[0].shape == (20, 7, 5, 2)
  np.testing.assert_array_equal(images[0], images[1])
  assert (images[0] != images[2]).any()


def test_sizes_that_are_not_positive_are_refused():
  with pytest.raises(ValueError, match='num_examples'):
    synthetic.synthetic_source((4, 4, 1), _TASKS, 3, 0)
  with pytest.raises(ValueError, match='task_names'):
    synthetic.synthetic_source((4, 4, 1), (), 3, 5)
