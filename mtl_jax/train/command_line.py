"""How `python -m mtl_jax.PROGRAM` ends when it cannot go on.

The package imports this module before anything that takes seconds. A signal and
a missing package are then one line instead of a traceback, from the first
import on.
"""

from collections.abc import Iterator
import contextlib
import os
import signal
import sys
from types import FrameType
from types import TracebackType
from typing import Any
from typing import NoReturn

_PROGRAMS = ('mtl_jax.main', 'mtl_jax.predict', 'mtl_jax.report')
# What the extra `train` of setup.cfg installs, by the names of the modules.
_TRAIN = (
  *('absl', 'array_record', 'flax', 'grain', 'importlib_resources'),
  *('matplotlib', 'ml_collections', 'orbax', 'rich', 'sklearn', 'tensorboardX'),
  'tensorflow_datasets',
)


def start() -> None:
  """Makes Ctrl-C and missing packages of this process one line each.

  Tracebacks of reads that end after their checkpoint was found damaged are not
  shown.
  """
  signal.signal(signal.SIGINT, leave)
  sys.excepthook = _show
  sys.unraisablehook = _show_unraisable


def leave(number: int, frame: FrameType | None) -> NoReturn:
  """A signal handler that ends the process at once, with one line."""
  del frame
  os.write(2, f'{signal.Signals(number).name} ended the program.\n'.encode())
  os._exit(128 + number)


@contextlib.contextmanager
def tidy_end() -> Iterator[None]:
  """Lets the body clean up when Ctrl-C or SIGTERM ends the process.

  The signal raises KeyboardInterrupt in the body; behind the body the process
  ends with one line. A second signal ends it at once.
  """
  came = []

  def interrupt(number: int, frame: FrameType | None) -> NoReturn:
    del frame
    for each in previous:
      signal.signal(each, leave)
    came.append(number)
    raise KeyboardInterrupt

  previous = {
    number: signal.signal(number, interrupt)
    for number in (signal.SIGINT, signal.SIGTERM)
  }
  try:
    yield
  except KeyboardInterrupt:
    if came:
      # Not by way of Python's end, which crashes where JAX was tracing.
      leave(came[0], None)
    raise
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)


def _show(
  kind: type[BaseException],
  error: BaseException,
  traceback: TracebackType | None,
) -> None:
  """Shows an error that nobody caught."""
  if isinstance(error, ModuleNotFoundError):
    if str(error.name).partition('.')[0] in _TRAIN:
      print(
        f"error: {error}; it comes with pip install 'mtl_jax[train]'",
        file=sys.stderr,
      )
      return
  sys.__excepthook__(kind, error, traceback)


def _show_unraisable(unraisable: Any) -> None:
  # Said by TensorStore's threads for each array of a checkpoint, when the read
  # of one has failed and nobody waits for the others.
  if str(unraisable.exc_value) != 'Event loop is closed':
    sys.__unraisablehook__(unraisable)


def _is_starting() -> bool:
  """Whether this process is looking for the module of one of the programs."""
  # Python has that in place of the program's name while it looks.
  return sys.argv[:1] == ['-m'] and any(
    argument.removeprefix('-m') in _PROGRAMS for argument in sys.orig_argv
  )


if _is_starting():
  start()
