"""The lock of a run directory, in which one process at a time trains.

A lock is a file that names its holder. The holder is alive if its host has a
process with that number and that start time; a later process with the same
number started at another time. The lock of a killed process is thus taken over.
"""

from collections.abc import Iterator
import contextlib
import errno
import fcntl
import json
import os
import pathlib
import socket
import subprocess
from typing import Any

FILE = 'lock.json'


@contextlib.contextmanager
def hold(workdir: str | os.PathLike[str]) -> Iterator[None]:
  """Holds the lock of a run directory while the body runs.

  Args:
    workdir: the run directory; created if it does not exist.

  Yields:
    Nothing.

  Raises:
    ValueError: if another process holds the lock (the message names it), or if
      nothing can be written to `workdir`.
  """
  workdir = pathlib.Path(workdir)
  path = workdir / FILE
  own = _describe_self()
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    with _alone(workdir):
      _refuse_if_held(workdir, path)
      _write(path, own)
  except OSError as error:
    raise ValueError(
      f'workdir {workdir} cannot be written to: {error.strerror}'
    ) from None
  try:
    yield
  finally:
    # A forked process does not hold it, and after a removal by hand another
    # process may hold it now.
    if own['pid'] == os.getpid() and _read(path) == own:
      path.unlink()


def _describe_self() -> dict[str, Any]:
  pid = os.getpid()
  return {
    'host': socket.gethostname(),
    'pid': pid,
    'process_started': _start_time(pid),
  }


def _refuse_if_held(workdir: pathlib.Path, path: pathlib.Path) -> None:
  """Raises if the process that a lock file names may be alive."""
  held = _read(path)
  if held is None:
    return
  where = f'pid {held["pid"]} on host {held["host"]}'
  if held['host'] != socket.gethostname():
    raise ValueError(
      f'workdir {workdir} is in use: another process is running there, {where}'
      f'; if that has ended, remove {path}'
    )
  if _start_time(held['pid']) == held['process_started']:
    raise ValueError(
      f'workdir {workdir} is in use: another process is running there, {where}'
      '; wait for it, stop it, or name another workdir'
    )


def _read(path: pathlib.Path) -> dict[str, Any] | None:
  """The holder that a lock file names; None if there is none."""
  try:
    held = json.loads(path.read_bytes())
  except FileNotFoundError:
    return None
  except ValueError:
    held = None
  if not isinstance(held, dict) or not (
    {'host', 'pid', 'process_started'} <= held.keys()
  ):
    raise ValueError(
      f'{path} is no lock of a run; if no process is running there, remove it'
    )
  return held


def _write(path: pathlib.Path, holder: dict[str, Any]) -> None:
  # Written whole or not at all: a reader never sees half a lock.
  temporary = path.with_name(path.name + '.new')
  temporary.write_text(json.dumps(holder) + '\n', encoding='utf-8')
  temporary.replace(path)


@contextlib.contextmanager
def _alone(folder: pathlib.Path) -> Iterator[None]:
  """Keeps other processes from reading and taking the lock meanwhile."""
  descriptor = os.open(folder, os.O_RDONLY)
  try:
    try:
      fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
      # Network file systems may not lock folders. The lock file still works
      # there, except for two processes that start within the same millisecond.
      if error.errno not in (errno.EBADF, errno.ENOLCK, errno.ENOTSUP):
        raise
    yield
  finally:
    # The kernel also does that when the process dies.
    os.close(descriptor)


def _start_time(pid: int) -> str | None:
  """The start time of a process, as text to compare; None if it has ended."""
  if pathlib.Path('/proc/self/stat').exists():
    try:
      text = pathlib.Path(f'/proc/{pid}/stat').read_text()
    except (FileNotFoundError, ProcessLookupError):
      return None
    # Before this comes the program's name, which can contain anything.
    state, *fields = text.rpartition(')')[2].split()
    # A zombie has ended, and its parent has not yet read its status.
    return None if state in 'ZX' else fields[18]
  found = subprocess.run(
    ['ps', '-o', 'lstart=', '-p', str(pid)],
    capture_output=True,
    text=True,
    check=False,
    timeout=30,
  )
  return found.stdout.strip() or None
