"""Checkpoints: written whole or not at all, and verified when read.

Orbax writes them, in the background, as a flat dictionary of arrays named after
their place in the state (`train_state/params/shared/...`). Beside them lies a
checksum of every array, because Orbax's storage reads a damaged array without
complaint.
"""

from collections.abc import Mapping
import logging
import os
import pathlib
from typing import Any
import zlib

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
      keep: number of newest checkpoints that stay. One is too few to survive a
        damaged one.

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
    """Steps of the checkpoints there are, the oldest first."""
    return sorted(self._manager.all_steps())

  def save(self, step: int, state: Any, info: Mapping[str, Any]) -> None:
    """Starts writing a checkpoint; the state may be donated afterwards.

    Args:
      step: names the checkpoint; one that is there already stays.
      state: any tree of arrays; keys of `jax.random.key` are welcome.
      info: what else is needed, anything JSON can hold.
    """
    if step in self._manager.all_steps():
      return
    arrays = _flatten(state)
    self._manager.save(
      step,
      args=ocp.args.Composite(
        arrays=ocp.args.StandardSave(arrays),
        info=ocp.args.JsonSave({**info, 'checksums': _checksums(arrays)}),
      ),
    )

  def restore(self, template: Any) -> tuple[Any, dict[str, Any]] | None:
    """Reads the newest checkpoint that is whole.

    A damaged one is moved to `<workdir>/damaged_checkpoints` with a warning,
    and the one before it is read.

    Args:
      template: a state of the same structure, shapes, dtypes and shardings,
        such as the one training would start from.

    Returns:
      `(state, info)`, laid out like `template`; None if there is no checkpoint.

    Raises:
      ValueError: if the checkpoint is of another structure than `template`
        (tells what differs), or if no checkpoint is whole.
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
      # Orbax and TensorStore raise whatever the damage led them to.
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
    written, read = info.pop('checksums'), _checksums(arrays)
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
  """A checkpoint of another structure; no reason to fall back."""


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


def _checksums(arrays):
  """Checksums of the arrays that every process holds whole."""
  # A view of the bytes, because not every dtype has a buffer of its own.
  return {
    name: zlib.crc32(np.asarray(x).reshape(-1).view(np.uint8))
    for name, x in arrays.items()
    if x.is_fully_replicated
  }


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
