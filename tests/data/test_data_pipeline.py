import itertools
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from mtl_jax.data import pipeline

_SIZE = 22


def _source(size=_SIZE, **arrays):
  number = np.arange(size)
  return pipeline.ArraySource(
    {
      'image': number.astype(np.uint8).reshape(size, 1, 1, 1),
      'labels': {'a': number.astype(np.int32), 'b': -number.astype(np.int32)},
      **arrays,
    }
  )


def _numbers(batches):
  return [batch['labels']['a'].tolist() for batch in batches]


def _flat(parts):
  return list(itertools.chain.from_iterable(parts))


def _train(**options):
  options = {
    'seed': 0,
    'batch_size': 8,
    'num_steps': 7,
    'prefetch': 0,
    **options,
  }
  return pipeline.train_batches(_source(), **options)


@pytest.mark.parametrize('process_count', [2, 4])
def test_slices_of_all_processes_are_the_global_batch_in_order(process_count):
  parts = [
    _numbers(_train(process_index=i, process_count=process_count))
    for i in range(process_count)
  ]
  together = [_flat(step) for step in zip(*parts, strict=True)]
  assert together == _numbers(_train())


@pytest.mark.parametrize('start_step', [0, 1, 2, 5, 7])
def test_starting_at_a_step_equals_skipping_the_steps_before(start_step):
  assert _numbers(_train(start_step=start_step)) == _numbers(
    itertools.islice(_train(), start_step, None)
  )


def test_image_label_and_mask_of_an_example_stay_together():
  for batch in _train():
    number = batch['labels']['a']
    np.testing.assert_array_equal(batch['image'][:, 0, 0, 0], number)
    np.testing.assert_array_equal(batch['labels']['b'], -number)
    assert batch['mask']['a'].tolist() == [1.0] * 8
    assert batch['image'].dtype == np.uint8
    assert batch['labels']['a'].dtype == np.int32
    assert batch['mask']['a'].dtype == np.float32


def test_an_epoch_visits_no_example_twice_and_the_next_has_another_order():
  batches = _numbers(_train(batch_size=11, num_steps=4))
  first, second = _flat(batches[:2]), _flat(batches[2:])
  assert sorted(first) == sorted(second) == list(range(_SIZE))
  assert first != second


def test_what_does_not_fill_a_batch_is_left_out_of_the_epoch():
  assert pipeline.steps_per_epoch(_source(), 8) == 2
  batches = _numbers(_train(num_steps=2))
  assert len(set(_flat(batches))) == 16
  # Over many epochs every example has its turn.
  assert len(set(_flat(_numbers(_train(num_steps=20))))) == _SIZE


def test_seeds_give_different_orders():
  assert _numbers(_train(seed=0)) != _numbers(_train(seed=1))


@pytest.mark.parametrize('prefetch', [1, 4])
def test_batches_made_ahead_are_the_same_batches(prefetch):
  assert _numbers(_train(prefetch=prefetch)) == _numbers(_train(prefetch=0))


@pytest.mark.parametrize('process_count', [1, 2, 4])
@pytest.mark.parametrize('batch_size', [4, 8, 24, 40])
def test_evaluation_counts_every_example_once_over_all_processes(
  batch_size, process_count
):
  counted, lengths = np.zeros(_SIZE), set()
  for index in range(process_count):
    batches = list(
      pipeline.eval_batches(
        _source(),
        batch_size=batch_size,
        process_index=index,
        process_count=process_count,
      )
    )
    lengths.add(len(batches))
    for batch in batches:
      assert len(batch['image']) == batch_size // process_count
      for task, sign in (('a', 1), ('b', -1)):
        np.add.at(
          counted, sign * batch['labels'][task], batch['mask'][task] / 2
        )
  np.testing.assert_array_equal(counted, np.ones(_SIZE))
  assert len(lengths) == 1


def test_evaluation_goes_in_order():
  batches = list(pipeline.eval_batches(_source(), batch_size=5))
  present = [b['labels']['a'][b['mask']['a'] > 0].tolist() for b in batches]
  assert _flat(present) == list(range(_SIZE))


@pytest.mark.parametrize('label_shape', [(), (3, 2)])
def test_missing_labels_stay_missing_in_the_padded_batch(label_shape):
  mask = np.ones((_SIZE, *label_shape), np.float32)
  mask[20] = 0
  source = _source(
    labels={'a': np.zeros((_SIZE, *label_shape), np.int32)}, mask={'a': mask}
  )
  *_, last = pipeline.eval_batches(source, batch_size=5)
  present = last['mask']['a'].reshape(5, -1).all(axis=1)
  assert present.tolist() == [False, True, False, False, False]


@pytest.mark.parametrize(
  'options, message',
  [
    ({'batch_size': 9, 'process_count': 2}, 'divide by process_count=2, got 9'),
    ({'batch_size': 23}, 'at most the 22 examples.*got 23'),
    ({'batch_size': 0}, 'batch_size must be at least 1'),
    ({'process_index': 2, 'process_count': 2}, 'process_index.*got 2'),
    ({'start_step': 8}, 'start_step.*got 8'),
    ({'seed': -1}, 'seed.*got -1'),
    ({'prefetch': -1}, 'prefetch.*got -1'),
  ],
)
def test_wrong_arguments_are_refused_before_the_first_batch(options, message):
  with pytest.raises(ValueError, match=message):
    _train(**options)


def test_evaluation_refuses_a_batch_that_processes_cannot_share():
  with pytest.raises(ValueError, match='divide by process_count=4, got 6'):
    pipeline.eval_batches(_source(), batch_size=6, process_count=4)


def _prefetch_threads():
  return [t for t in threading.enumerate() if 'prefetch' in t.name]


def test_a_closed_or_dropped_iterator_leaves_no_thread():
  batches = _train(prefetch=2, num_steps=1000)
  next(batches)
  assert _prefetch_threads()
  batches.close()
  for batch in _train(prefetch=2, num_steps=1000):
    del batch
    break
  deadline = time.monotonic() + 10
  while _prefetch_threads() and time.monotonic() < deadline:
    time.sleep(0.01)
  assert not _prefetch_threads()


def test_an_error_of_the_source_reaches_the_loop():
  class Broken(pipeline.ArraySource):
    def __getitems__(self, indices):
      raise OSError('disk gone')

  source = Broken(_source().arrays)
  batches = pipeline.train_batches(source, seed=0, batch_size=4, num_steps=3)
  with pytest.raises(OSError, match='disk gone'):
    next(batches)


def test_the_interpreter_ends_with_an_iterator_open():
  code = (
    'import numpy as np\n'
    'from mtl_jax.data import pipeline\n'
    'source = pipeline.ArraySource({"image": np.zeros((9, 1, 1, 1)),'
    ' "labels": {"a": np.zeros(9)}})\n'
    'batches = pipeline.train_batches(source, seed=0, batch_size=3,'
    ' num_steps=10**9)\n'
    'next(batches)\n'
    'raise KeyboardInterrupt\n'
  )
  ended = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, timeout=60, text=True
  )
  assert ended.stderr.rstrip().endswith('KeyboardInterrupt')


def test_an_index_outside_the_source_is_an_error():
  with pytest.raises(IndexError):
    _source().__getitems__(np.array([0, _SIZE]))


def test_sources_of_uneven_or_no_examples_are_refused():
  with pytest.raises(ValueError, match=r'same number of examples.*\[21, 22\]'):
    _source(labels={'a': np.zeros(21)})
  with pytest.raises(ValueError, match='at least one'):
    _source(0)
  with pytest.raises(ValueError, match='same tasks'):
    _source(mask={'a': np.ones(_SIZE)})


def test_a_source_read_into_memory_holds_the_same_examples():
  mask = {'a': np.eye(_SIZE, dtype=np.float32)[3], 'b': np.ones(_SIZE)}
  source = _source(mask=mask)
  copy = pipeline.in_memory(source, chunk=5)
  everything = np.arange(_SIZE)
  for group in ('labels', 'mask'):
    for task in ('a', 'b'):
      np.testing.assert_array_equal(
        copy.__getitems__(everything)[group][task],
        source.__getitems__(everything)[group][task],
      )
  np.testing.assert_array_equal(copy.arrays['image'], source.arrays['image'])
  assert copy.arrays['image'].dtype == np.uint8
