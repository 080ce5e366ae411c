"""Handling of signals and missing packages in `python -m mtl_jax.PROGRAM`.

The package imports this module before slow imports. From the first import on, a
signal or a missing package then gives one line instead of a traceback.
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
# The modules from the extra `train` in setup.cfg.
_TRAIN = (
  *('absl', 'array_record', 'flax', 'grain', 'importlib_resources'),
  *('matplotlib', 'ml_collections', 'orbax', 'rich', 'sklearn', 'tensorboardX'),
  'tensorflow_datasets',
)


def start() -> None:
  """Makes this process end with one line on Ctrl-C or a missing package.

  It hides the tracebacks of reads that end after their checkpoint was found
  damaged.
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

  The signal raises KeyboardInterrupt in the body; after the body the process
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
      # This skips Python's shutdown, which crashes if JAX was tracing.
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
  """Shows an uncaught error."""
  if isinstance(error, ModuleNotFoundError):
    if str(error.name).partition('.')[0] in _TRAIN:
      print(
        f"error: {error}; it comes with pip install 'mtl_jax[train]'",
        file=sys.stderr,
      )
      return
  sys.__excepthook__(kind, error, traceback)


def _show_unraisable(unraisable: Any) -> None:
  # TensorStore's threads raise this for each array in a checkpoint, when one
  # read has failed and nothing waits for the others.
  if str(unraisable.exc_value) != 'Event loop is closed':
    sys.__unraisablehook__(unraisable)


def _is_starting() -> bool:
  """Whether this process is looking up the module of one of the programs."""
  # Python puts `-m` in the place of the program's name during the look-up.
  return sys.argv[:1] == ['-m'] and any(
    argument.removeprefix('-m') in _PROGRAMS for argument in sys.orig_argv
  )


if _is_starting():
  start()
