"""Checkpoints that are written whole or not at all, and verified when read.

Orbax writes them in the background as a flat dictionary of arrays, named after
their place in the state (`train_state/params/shared/...`). A checksum of every
array is stored beside them, because Orbax's storage reads a damaged array
without complaint.
"""

from collections.abc import Mapping
import logging
import os
import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from mtl_jax.train import distributed

_logger = logging.getLogger(__name__)


class Checkpoints:
  """The checkpoints of one run, `<workdir>/checkpoints/<step>`."""

  def __init__(self, workdir: str | os.PathLike[str], *, keep: int = 2):
    """Opens the folder; it is made with the first checkpoint.

    Args:
      workdir: the run directory.
      keep: number of newest checkpoints that stay. With only one, a damaged
        checkpoint would end the run.

    Raises:
      ValueError: if `keep` is not positive.
    """
    if keep < 1:
      raise ValueError(f'keep must be positive, got {keep}')
    # Orbax asks for absolute paths.
    self._workdir = pathlib.Path(workdir).absolute()
    self._directory = self._workdir / 'checkpoints'
    self._manager = ocp.CheckpointManager(
      self._directory,
      options=ocp.CheckpointManagerOptions(max_to_keep=keep),
      item_handlers={
        'arrays': ocp.StandardCheckpointHandler(),
        'info': ocp.JsonCheckpointHandler(),
      },
    )

  def steps(self) -> list[int]:
    """Steps of the existing checkpoints, the oldest first."""
    return sorted(self._manager.all_steps())

  def save(self, step: int, state: Any, info: Mapping[str, Any]) -> None:
    """Starts writing a checkpoint; the state may be donated afterwards.

    Args:
      step: names the checkpoint; an existing one stays.
      state: any tree of arrays; keys from `jax.random.key` are allowed.
      info: further information, in any form that JSON can hold.
    """
    if step in self._manager.all_steps():
      return
    arrays = _flatten(state)
    self._manager.save(
      step,
      args=ocp.args.Composite(
        arrays=ocp.args.StandardSave(arrays),
        info=ocp.args.JsonSave({**info, 'checksums': checksums(arrays)}),
      ),
    )

  def restore(self, template: Any) -> tuple[Any, dict[str, Any]] | None:
    """Reads the newest undamaged checkpoint.

    A damaged checkpoint is moved to `<workdir>/damaged_checkpoints` with a
    warning, and the previous one is read.

    Args:
      template: a state with the same structure, shapes and dtypes, such as the
        initial one. The result gets its shardings; the checkpoint may have been
        written with others, by another number of devices or processes.

    Returns:
      `(state, info)`, laid out like `template`; None if there is no checkpoint.

    Raises:
      ValueError: if the checkpoint's structure differs from `template` (the
        message lists the differences), or if all checkpoints are damaged.
    """
    steps = self.steps()[::-1]
    damaged = {}
    for step in steps:
      try:
        restored = self._read(step, template)
      except _MismatchError as error:
        raise ValueError(
          f'the checkpoint {self._directory / str(step)} is not of this '
          f'config: {error}'
        ) from None
      # The damage decides what Orbax and TensorStore raise.
      except Exception as error:
        reason = (str(error).strip().splitlines() or [''])[0]
        damaged[step] = f'{type(error).__name__}: {reason}'[:300]
        continue
      self._set_aside(damaged, step)
      return restored
    if damaged:
      raise ValueError(
        f'none of the checkpoints in {self._directory} can be read; remove '
        'the folder to start anew'
        + ''.join(f'\n  {step}: {reason}' for step, reason in damaged.items())
      )
    return None

  def wait(self) -> None:
    """Returns when all checkpoints are on disk."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits, and ends the background threads."""
    self._manager.close()

  def _read(self, step, template):
    wanted = _flatten(template)
    found = self._manager.item_metadata(step)['arrays'].tree
    _check_same(
      {name: (tuple(x.shape), str(x.dtype)) for name, x in found.items()},
      {name: (tuple(x.shape), str(x.dtype)) for name, x in wanted.items()},
    )
    items = self._manager.restore(
      step,
      args=ocp.args.Composite(
        arrays=ocp.args.StandardRestore(
          {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
            for name, x in wanted.items()
          }
        ),
        info=ocp.args.JsonRestore(),
      ),
    )
    arrays, info = items['arrays'], dict(items['info'])
    written, read = info.pop('checksums'), checksums(arrays)
    wrong = [name for name in read if read[name] != written[name]]
    if wrong:
      raise OSError(f'wrong checksum of {", ".join(wrong)}')
    return _unflatten(arrays, template), info

  def _set_aside(self, damaged, good):
    if not damaged:
      return
    aside = self._workdir / 'damaged_checkpoints'
    for step, reason in damaged.items():
      _logger.warning(
        'The checkpoint of step %d cannot be read (%s); it is moved to %s, and '
        'the one of step %d is used.',
        *(step, reason, aside, good),
      )
      if distributed.is_main():
        aside.mkdir(exist_ok=True)
        place = aside / str(step)
        while place.exists():
          place = place.with_name(place.name + '_')
        (self._directory / str(step)).rename(place)
    distributed.wait_for_all('damaged checkpoints are set aside')
    self._manager.reload()


class _MismatchError(Exception):
  """A checkpoint with another structure, which is no reason to fall back."""


def _is_key(x):
  return jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


def _name(path):
  return jax.tree_util.keystr(path, simple=True, separator='/')


def _flatten(state):
  return {
    _name(path): jax.random.key_data(x) if _is_key(x) else x
    for path, x in jax.tree.leaves_with_path(state)
  }


def _unflatten(arrays, template):
  def take(path, like):
    x = arrays[_name(path)]
    if _is_key(like):
      return jax.random.wrap_key_data(x, impl=jax.random.key_impl(like))
    return x

  return jax.tree.map_with_path(take, template)


def checksums(arrays: Mapping[str, jax.Array]) -> dict[str, int]:
  """Checksum of each array, independent of its sharding.

  It is a sum over entries, taken shard by shard, so no process has to hold a
  whole array.

  Args:
    arrays: {name: array}, sharded over any devices of all processes.

  Returns:
    {name: number below 2^32}.
  """
  whole: dict[str, int] = {}
  parts: dict[str, int] = {}
  for name, x in arrays.items():
    if x.is_fully_replicated:
      shards, sums = x.addressable_shards[:1], whole
    else:
      shards = [s for s in x.addressable_shards if s.replica_id == 0]
      sums = parts
    sums[name] = sum(_sum_of_shard(np.asarray(s.data), s.index) for s in shards)
  sums = {**whole, **distributed.add_up(parts)}
  return {name: number % 2**32 for name, number in sums.items()}


def _sum_of_shard(shard, index):
  """Sum of the entries' bits times an odd number of their place, mod 2^32.

  The number is odd, so that a change in a single entry always shows.
  """
  size = shard.dtype.itemsize
  # Not every dtype supports the buffer protocol, but all have an item size.
  flat = np.ascontiguousarray(shard).reshape(-1)
  words = flat.view(f'uint{8 * min(size, 4)}').astype(np.uint32)
  # Entries with 8 bytes are two words along one more axis.
  total = words.reshape(shard.shape if size <= 4 else (*shard.shape, size // 4))
  starts = [cut.start or 0 for cut in index] + [0]
  for axis in reversed(range(total.ndim)):
    total = total @ _odd_numbers(axis, starts[axis], total.shape[axis])
  return int(total)


def _odd_numbers(axis, start, count):
  """An odd number for each place along an axis; others for other axes."""
  x = np.arange(start, start + count, dtype=np.uint32)
  # The finishing steps of MurmurHash3, which scatter the bits of near numbers.
  x = x + np.uint32(axis + 1 << 24)
  x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
  x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
  return (x ^ (x >> np.uint32(16))) | np.uint32(1)


def _check_same(found, wanted):
  problems = [f'{name} is missing' for name in wanted.keys() - found.keys()]
  problems += [f'{name} is unknown' for name in found.keys() - wanted.keys()]
  problems += [
    f'{name} is {_show(*found[name])}, expected {_show(*wanted[name])}'
    for name in wanted.keys() & found.keys()
    if found[name] != wanted[name]
  ]
  if problems:
    shown = sorted(problems)[:5]
    more = len(problems) - len(shown)
    raise _MismatchError('; '.join(shown) + (f'; {more} more' if more else ''))


def _show(shape, dtype):
  return f'{dtype}[{",".join(map(str, shape))}]'
