"""An orderly stop after a signal."""

import signal
import threading
from types import FrameType


class Interrupted(Exception):  # noqa: N818  Not an error: all is saved.
  """A run was asked to stop; it has saved a checkpoint and can continue."""


class StopRequest:
  """Context manager that records Ctrl-C and SIGTERM instead of ending.

  The first signal sets `signal_name`; the second ends the program at once, as
  it would without this. Outside the main thread, where Python does not deliver
  signals, nothing is recorded.

  Attributes:
    signal_name: `'SIGINT'` or `'SIGTERM'` after that signal, else None.
  """

  _SIGNALS = (signal.SIGINT, signal.SIGTERM)

  def __init__(self):
    self.signal_name: str | None = None
    self._previous: dict[int, object] = {}

  def __enter__(self) -> 'StopRequest':
    if threading.current_thread() is threading.main_thread():
      for number in self._SIGNALS:
        self._previous[number] = signal.signal(number, self._note)
    return self

  def __exit__(self, *exception: object) -> None:
    self._restore()

  def _note(self, number: int, frame: FrameType | None) -> None:
    del frame
    self.signal_name = signal.Signals(number).name
    self._restore()

  def _restore(self) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)
    self._previous = {}
