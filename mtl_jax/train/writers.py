"""Writers of a run's metrics: `metrics.jsonl` and TensorBoard events."""

from collections.abc import Mapping
import json
import math
import os
import pathlib
from typing import Any

import tensorboardX

_FILE = 'metrics.jsonl'
_EVALUATION = ('test/', 'validation/')


def read_lines(workdir: str | os.PathLike[str]) -> list[dict[str, Any]]:
  """The lines of a run's `metrics.jsonl`.

  Args:
    workdir: the run directory.

  Returns:
    The lines in their order; a last line that a crash left half written is
    skipped. Empty if there is no file.

  Raises:
    ValueError: if a line is not a JSON object with a step; the message names
      it.
  """
  path = pathlib.Path(workdir) / _FILE
  if not path.exists():
    return []
  # Text after the last line end was cut off during its writing.
  complete = path.read_bytes().split(b'\n')[:-1]
  lines = []
  for number, row in enumerate(complete, 1):
    try:
      line = json.loads(row)
      line['step'] = int(line['step'])
    except (ValueError, TypeError, KeyError) as error:
      raise ValueError(
        f'{path}, line {number} cannot be read: {error!r}'
      ) from None
    lines.append(line)
  return lines


def evaluation(line: Mapping[str, Any]) -> dict[str, Any]:
  """The evaluation metrics in a line; empty for a training line."""
  return {
    name: value for name, value in line.items() if name.startswith(_EVALUATION)
  }


class MetricsWriter:
  """Writes the metrics of a run; only one process should have a writer.

  A line of `metrics.jsonl` is a JSON object with `step`, `epoch`, `wall_time`
  and the metrics. Numbers are written so that reading gives the same float64
  back. A non-finite number is written as null, because JSON has no other form
  for it, and unchanged to TensorBoard.
  """

  def __init__(
    self,
    workdir: str | os.PathLike[str],
    *,
    start_step: int = 0,
    evaluated: bool = True,
  ):
    """Opens the files of a run, cut back to the step at which it continues.

    Args:
      workdir: the run directory; created if it does not exist.
      start_step: the step of the checkpoint from which the run starts. Lines
        for later steps, and a half-written last line, are cut off. 0 starts a
        new log.
      evaluated: whether the checkpoint was saved after the evaluation of its
        step, if there is one. If not, a line for this evaluation is cut off,
        because it will be repeated.
    """
    workdir = pathlib.Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    self._path = workdir / _FILE
    self.lines = [
      line
      for line in read_lines(workdir)
      if 0 < line['step'] <= start_step
      and (evaluated or line['step'] < start_step or not evaluation(line))
    ]
    _replace(self._path, ''.join(_dump(line) for line in self.lines))
    self._file = self._path.open('a', buffering=1, encoding='utf-8')
    self._events = tensorboardX.SummaryWriter(
      str(workdir),
      # TensorBoard hides the events of an interrupted run beyond this step.
      purge_step=start_step + 1 if start_step else None,
      flush_secs=10,
    )

  def write(
    self,
    step: int,
    values: Mapping[str, float],
    *,
    epoch: float,
    wall_time: float,
  ) -> None:
    """Writes one line.

    Args:
      step: number of training steps taken.
      values: the metrics, `{'split/task/name': value}`.
      epoch: number of epochs taken, in parts.
      wall_time: seconds of training so far, over all starts of the run.
    """
    line = {'step': step, 'epoch': epoch, 'wall_time': wall_time, **values}
    self._file.write(_dump(line))
    self.lines.append(line)
    for name, value in values.items():
      self._events.add_scalar(name, value, step)

  def sync(self) -> None:
    """Returns when all lines would survive a power cut."""
    self._file.flush()
    os.fsync(self._file.fileno())
    self._events.flush()

  def close(self) -> None:
    """Closes the files; nothing can be written after."""
    self.sync()
    self._file.close()
    self._events.close()


def _dump(line):
  safe = {
    name: None if isinstance(x, float) and not math.isfinite(x) else x
    for name, x in line.items()
  }
  return json.dumps(safe, allow_nan=False) + '\n'


def _replace(path, text):
  """Writes a file whole or not at all."""
  temporary = path.with_name(path.name + '.new')
  with temporary.open('w', encoding='utf-8') as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
  temporary.replace(path)
