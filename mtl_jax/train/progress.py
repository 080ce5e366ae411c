"""The progress of a run as a bar or as log lines, and its clock."""

from collections.abc import Iterator
import contextlib
import logging
import sys
import time
from typing import Any

import jax
from rich import progress

_logger = logging.getLogger(__name__)

# Seconds between two lines without a terminal.
_LINE_EVERY = 30.0


class Progress:
  """Shows steps taken, their rate and the time left; a context manager.

  Attributes:
    note: text to show beside the rate, such as the loss.
  """

  def __init__(self, start_step: int, total_steps: int, *, show: bool = True):
    """Starts at a run's first step.

    Args:
      start_step: number of steps already taken.
      total_steps: number of steps in the whole run.
      show: whether anything is shown; true in one process only.
    """
    self._start, self._total = start_step, total_steps
    self._began = self._shown = time.monotonic()
    self._show = show
    self.note = ''
    self._bar = None
    if show and sys.stdout.isatty():
      self._bar = progress.Progress(
        progress.TextColumn('step {task.completed:.0f}/{task.total:.0f}'),
        progress.BarColumn(),
        progress.TextColumn('{task.fields[rate]:.1f} steps/s, time left'),
        progress.TimeRemainingColumn(),
        progress.TextColumn('{task.fields[note]}'),
      )
      self._task = self._bar.add_task(
        '', total=total_steps, completed=start_step, rate=0.0, note=''
      )

  def __enter__(self) -> 'Progress':
    if self._bar is not None:
      self._bar.start()
    return self

  def __exit__(self, *exception: object) -> None:
    if self._bar is not None:
      self._bar.stop()

  def update(self, step: int) -> None:
    """Shows that `step` steps have been taken."""
    now = time.monotonic()
    rate = (step - self._start) / max(now - self._began, 1e-9)
    if self._bar is not None:
      self._bar.update(self._task, completed=step, rate=rate, note=self.note)
    elif self._show and now - self._shown >= _LINE_EVERY:
      self._shown = now
      left = (self._total - step) / max(rate, 1e-9)
      _logger.info(
        'step %d/%d, %.1f steps/s, %.0f s left; %s',
        *(step, self._total, rate, left, self.note),
      )

  def say(self, text: str) -> None:
    """Shows a line of text, above the bar if there is one."""
    if self._bar is not None:
      self._bar.console.print(text, highlight=False)
    elif self._show:
      _logger.info('%s', text)


class Clock:
  """Seconds of training, without pauses."""

  def __init__(self, seconds: float = 0.0):
    """Shows `seconds` until it is started."""
    self._seconds = seconds
    self._since: float | None = None

  @property
  def seconds(self) -> float:
    """Seconds it has run."""
    running = 0.0 if self._since is None else time.perf_counter() - self._since
    return self._seconds + running

  def start(self) -> None:
    """Lets it run."""
    self._since = time.perf_counter()

  @contextlib.contextmanager
  def paused(self, state: Any) -> Iterator[None]:
    """Pauses from the computation of `state` to the end of the body."""
    jax.block_until_ready(state)
    self._seconds, self._since = self.seconds, None
    yield
    self.start()
