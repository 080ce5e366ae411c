"""Batches for a training or evaluation step, from a source of examples.

The global batch of a training step is a function of (seed, step) only: every
epoch visits all examples once in an order drawn from (seed, epoch), and a step
is a place in it. Each process takes its slice. The step alone therefore gives
the position in the data, for any number of processes.
"""

from collections.abc import Callable
from collections.abc import Iterator
import functools

import grain
import jax
import numpy as np

from mtl_jax import types
from mtl_jax.data import shuffle
from mtl_jax.data.sources import ArraySource as ArraySource
from mtl_jax.data.sources import in_memory as in_memory
from mtl_jax.data.sources import TfdsSource as TfdsSource


def steps_per_epoch(source: types.Source, batch_size: int) -> int:
  """Number of full global batches in the source.

  Args:
    source: the examples.
    batch_size: size of the global batch, over all processes.

  Returns:
    Number of steps in an epoch. Examples that do not fill a batch are skipped
    in that epoch (different ones in each).

  Raises:
    ValueError: if `batch_size` is not in [1, len(source)].
  """
  if not 1 <= batch_size <= len(source):
    raise ValueError(
      f'batch_size must be at least 1 and at most the {len(source)} examples '
      f'of the source, got {batch_size}'
    )
  return len(source) // batch_size


def train_batches(
  source: types.Source,
  *,
  seed: int,
  batch_size: int,
  num_steps: int,
  start_step: int = 0,
  process_index: int = 0,
  process_count: int = 1,
  steps_per_call: int = 1,
  prefetch: int = 2,
) -> Iterator[types.Batch]:
  """The batches of training steps `start_step` to `num_steps - 1`.

  Starting at step k gives the same batches as skipping the first k. The slices
  of all processes together are the same global batch for any number of
  processes.

  Args:
    source: the examples.
    seed: decides the order of every epoch.
    batch_size: size of the global batch, over all processes.
    num_steps: number of steps of the whole training, counted from step 0.
    start_step: the first step, at which an interrupted training continues.
    process_index: which of the processes this is.
    process_count: number of processes.
    steps_per_call: number of steps whose batches come together, stacked along a
      new first axis. A single step has no such axis.
    prefetch: number of batches made ahead in a background thread; 0 makes each
      when it is asked for.

  Returns:
    An iterator of batches of `batch_size // process_count` examples. Closing it
    (`.close()`, or dropping it) ends the thread.

  Raises:
    ValueError: if `batch_size` exceeds the source or does not divide by
      `process_count`, or another argument is out of bounds.
  """
  epoch_steps = steps_per_epoch(source, batch_size)
  rows = _process_rows(batch_size, process_index, process_count)
  if not 0 <= start_step <= num_steps:
    raise ValueError(
      f'start_step must be in [0, num_steps={num_steps}], got {start_step}'
    )
  if steps_per_call < 1 or (num_steps - start_step) % steps_per_call:
    raise ValueError(
      'steps_per_call must be positive and divide the '
      f'{num_steps - start_step} steps left, got {steps_per_call}'
    )
  size = len(source)
  # An epoch's order is drawn once. Two orders are kept, for batches made ahead
  # past the end of an epoch.
  order = functools.lru_cache(maxsize=2)(
    lambda epoch: shuffle.permutation(size, seed, epoch)
  )
  order(start_step // epoch_steps)  # A wrong seed raises here, not in a thread.

  def indices_of(step):
    epoch, place = divmod(int(step), epoch_steps)
    first = place * batch_size
    return order(epoch)[first + rows.start : first + rows.stop]

  def batch_of(step):
    if steps_per_call == 1:
      return source.__getitems__(indices_of(step))
    indices = [indices_of(step + i) for i in range(steps_per_call)]
    return jax.tree.map(
      lambda x: x.reshape(steps_per_call, -1, *x.shape[1:]),
      source.__getitems__(np.concatenate(indices)),
    )

  return _iterate(
    batch_of, range(start_step, num_steps, steps_per_call), prefetch
  )


def eval_batches(
  source: types.Source,
  *,
  batch_size: int,
  process_index: int = 0,
  process_count: int = 1,
  prefetch: int = 2,
) -> Iterator[types.Batch]:
  """Every example once, in order, in batches of one shape.

  The last batch is filled up with examples whose masks are zero. Every process
  gets the same number of batches.

  Args:
    source: the examples.
    batch_size: size of the global batch, over all processes; it may exceed the
      source.
    process_index: which of the processes this is.
    process_count: number of processes.
    prefetch: number of batches made ahead in a background thread; 0 makes each
      when it is asked for.

  Returns:
    An iterator of batches of `batch_size // process_count` examples.

  Raises:
    ValueError: if `batch_size` is not positive or does not divide by
      `process_count`, or another argument is out of bounds.
  """
  size = len(source)
  rows = _process_rows(batch_size, process_index, process_count)

  def batch_of(step):
    first = int(step) * batch_size
    indices = np.arange(first + rows.start, first + rows.stop)
    batch = source.__getitems__(np.minimum(indices, size - 1))
    if indices[-1] < size:
      return batch
    present = (indices < size).astype(np.float32)
    mask = {
      task: m * present.reshape(-1, *(1,) * (m.ndim - 1))
      for task, m in batch['mask'].items()
    }
    return {**batch, 'mask': mask}

  return _iterate(batch_of, range(-(-size // batch_size)), prefetch)


def _process_rows(batch_size, process_index, process_count):
  """A process's rows in the global batch."""
  if batch_size < 1 or process_count < 1 or batch_size % process_count:
    raise ValueError(
      'batch_size must be positive and divide by process_count='
      f'{process_count}, got {batch_size}'
    )
  if not 0 <= process_index < process_count:
    raise ValueError(
      f'process_index must be in [0, process_count={process_count}), '
      f'got {process_index}'
    )
  local = batch_size // process_count
  return slice(process_index * local, (process_index + 1) * local)


def _iterate(
  batch_of: Callable[[int], types.Batch], steps: range, prefetch: int
) -> Iterator[types.Batch]:
  """The batches for the steps, made ahead in a thread."""
  if prefetch < 0:
    raise ValueError(f'prefetch must not be negative, got {prefetch}')
  dataset = grain.MapDataset.range(steps.start, steps.stop, steps.step).map(
    batch_of
  )
  options = grain.ReadOptions(
    num_threads=min(prefetch, 1), prefetch_buffer_size=prefetch
  )
  return _each(dataset.to_iter_dataset(options))


def _each(dataset):
  # A generator, so that the iterator has `close` with every version of grain;
  # `yield from` passes it on if grain's own iterator has it.
  yield from dataset
