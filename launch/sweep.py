r"""Trains methods x seeds of one config, with each run in its own process.

    python launch/sweep.py --config=configs/multi_digits.py \
      --methods=stl,linear,cagrad,f_cagrad --seeds=0,1,2 \
      --root=runs/quickstart [--jobs=N] [-- --config.epochs=10 ...]

A run is in ROOT/<problem>/<method>/seed_<n>, and its output is in log.txt
there. Finished runs are skipped and stopped runs continue, so the same command
can be repeated. Arguments after `--` go to every run.

The exit status is 0 when all runs are finished, 75 when Ctrl-C or SIGTERM
stopped them (everything is saved; a second Ctrl-C kills them), and 1 when a run
failed.
"""

import argparse
from collections.abc import Sequence
import dataclasses
import os
import pathlib
import signal
import subprocess
import sys
import time


def _leave(number, frame):
  del frame
  os.write(2, f'{signal.Signals(number).name} ended the sweep.\n'.encode())
  os._exit(128 + number)


if __name__ == '__main__':
  # Before slow imports.
  signal.signal(signal.SIGINT, _leave)

_ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(_ROOT))

from mtl_jax.train import command_line  # noqa: E402

if __name__ == '__main__':
  command_line.start()

from mtl_jax import main as mtl_main  # noqa: E402
from mtl_jax.train import run_directory  # noqa: E402

# Exit statuses of stopped runs: everything is saved, or nothing was to save.
_STOPPED = (
  mtl_main.EXIT_INTERRUPTED,
  *(sign for x in (signal.SIGINT, signal.SIGTERM) for sign in (-x, 128 + x)),
)


@dataclasses.dataclass
class Job:
  """One run of the sweep."""

  name: str
  workdir: pathlib.Path
  config: dict
  command: list[str]
  process: subprocess.Popen | None = None
  began: float = 0.0

  @property
  def log(self) -> pathlib.Path:
    """The file for the run's output."""
    return self.workdir / 'log.txt'

  @property
  def finished(self) -> bool:
    """Whether this run is finished, with this config."""
    record = run_directory.read_record(self.workdir)
    return bool(
      record
      and record['finished']
      and not run_directory.config_changes(self.workdir, self.config)
    )

  @property
  def last_words(self) -> str:
    """The last line of the log, which says why a run failed."""
    lines = self.log.read_text(errors='replace').splitlines()
    return next((line for line in reversed(lines) if line.strip()), '')

  def start(self, environment: dict[str, str]) -> None:
    """Starts the process; its output is appended to the log.

    Raises:
      OSError: if the log cannot be written.
    """
    self.workdir.mkdir(parents=True, exist_ok=True)
    self.began = time.monotonic()
    with self.log.open('ab') as log:
      self.process = subprocess.Popen(
        self.command,
        stdout=log,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        env=environment,
        # Ctrl-C in a terminal goes to all processes in its group; a run should
        # get only the signal that is sent below.
        start_new_session=True,
      )


def make_jobs(
  config: str,
  methods: Sequence[str],
  seeds: Sequence[int],
  root: pathlib.Path,
  overrides: Sequence[str] = (),
) -> list[Job]:
  """The runs of a sweep, seed after seed.

  Args:
    config: `FILE.py[:ARGUMENTS]`.
    methods: names of methods.
    seeds: the seeds.
    root: folder of the sweep.
    overrides: further arguments for every run.

  Returns:
    A job for each method and seed.

  Raises:
    ValueError: if a method, an argument or a config key is unknown.
  """
  jobs = []
  for seed in seeds:
    for method in methods:
      separator = ',' if ':' in config else ':'
      argument = f'{config}{separator}method={method},seed={seed}'
      values = mtl_main.load_config(argument, overrides)
      workdir = root / values.problem / method / f'seed_{seed}'
      command = [sys.executable, '-m', 'mtl_jax.main', f'--config={argument}']
      jobs.append(
        Job(
          name=f'{values.problem} {method} seed {seed}',
          workdir=workdir,
          config=values.to_dict(),
          command=[*command, f'--workdir={workdir}', *overrides],
        )
      )
  return jobs


class Sweep:
  """Runs jobs, some at a time."""

  def __init__(self, jobs: Sequence[Job], parallel: int):
    """Takes the jobs and the number of them that run at the same time."""
    self._waiting = list(jobs)
    self._parallel = parallel
    self._running: list[Job] = []
    self._failed: list[Job] = []
    self._total, self._done = len(jobs), 0
    self._stopping = False

  def run(self) -> int:
    """Runs all jobs and reports on them; returns the exit status."""
    for number in (signal.SIGINT, signal.SIGTERM):
      signal.signal(number, self._stop)
    try:
      while self._running or (self._waiting and not self._stopping):
        self._start_some()
        self._collect()
    finally:
      for job in self._running:
        os.killpg(job.process.pid, signal.SIGKILL)
    for job in self._failed:
      print(f'failed: {job.name}; see {job.log}')
    if self._stopping:
      print('stopped; the same command goes on')
      return mtl_main.EXIT_INTERRUPTED
    return 1 if self._failed else 0

  def _start_some(self):
    while self._waiting and not self._stopping:
      if len(self._running) >= self._parallel:
        return
      job = self._waiting.pop(0)
      try:
        if job.finished:
          self._tell(job, 'finished before')
          continue
        job.start({**os.environ, 'PYTHONPATH': _python_path()})
      except (ValueError, OSError) as error:
        self._fail(job, f'FAILED to start: {error}')
        continue
      self._running.append(job)

  def _collect(self):
    time.sleep(0.1)
    for job in list(self._running):
      status = job.process.poll()
      if status is None:
        continue
      self._running.remove(job)
      seconds = time.monotonic() - job.began
      if status == 0:
        self._tell(job, f'finished in {seconds:.0f} s')
      elif status in _STOPPED and self._stopping:
        self._tell(job, f'stopped after {seconds:.0f} s')
      else:
        self._fail(job, f'FAILED with status {status}: {job.last_words}')

  def _fail(self, job, how):
    self._failed.append(job)
    self._tell(job, how)

  def _tell(self, job, what):
    self._done += 1
    print(f'[{self._done}/{self._total}] {job.name}: {what}', flush=True)

  def _stop(self, number, frame):
    del frame
    again, self._stopping = self._stopping, True
    if not again:
      print(f'{signal.Signals(number).name}: stopping the runs', flush=True)
    for job in self._running:
      if job.process.poll() is None:
        job.process.send_signal(signal.SIGKILL if again else signal.SIGTERM)


def default_jobs() -> int:
  """The number of runs at the same time: one a core, or one on an accelerator.

  Small models keep one core busy for any number of threads; on an accelerator
  two runs would compete for its memory.

  Returns:
    A positive number.
  """
  # In a separate process, because the question itself takes the device.
  backend = subprocess.run(
    [sys.executable, '-c', 'import jax; print(jax.default_backend())'],
    capture_output=True,
    text=True,
    check=False,
  ).stdout.strip()
  return min(os.cpu_count() or 1, 8) if backend == 'cpu' else 1


def _python_path():
  # Runs find the package from any folder, even if it is not installed.
  return os.pathsep.join(
    filter(None, (str(_ROOT), os.environ.get('PYTHONPATH')))
  )


def _integers(flag, text):
  try:
    return [int(part) for part in text.split(',')]
  except ValueError:
    raise ValueError(
      f'{flag} must be integers parted by commas, got {text!r}'
    ) from None


def main(argv: Sequence[str] | None = None) -> int:
  """The command line; returns the exit status."""
  parser = argparse.ArgumentParser(
    description='Trains methods x seeds of one config.',
    epilog='What comes after -- goes to every run.',
  )
  parser.add_argument('--config', required=True, help='FILE.py[:ARGUMENTS]')
  parser.add_argument('--methods', required=True, help='such as stl,f_cagrad')
  parser.add_argument('--seeds', default='0,1,2', help='such as 0,1,2')
  parser.add_argument('--root', required=True, type=pathlib.Path)
  parser.add_argument(
    '--jobs',
    type=int,
    help='runs at the same time (default: one a core, up to 8; one if there is '
    'an accelerator)',
  )
  argv = list(sys.argv[1:] if argv is None else argv)
  cut = argv.index('--') if '--' in argv else len(argv)
  args, unknown = parser.parse_known_args(argv[:cut])
  if unknown:
    print(
      f'error: unknown arguments: {" ".join(unknown)}; arguments of the runs, '
      'such as --config.epochs=3, come after --',
      file=sys.stderr,
    )
    return 1
  if args.jobs is not None and args.jobs < 1:
    parser.error(f'--jobs must be positive, got {args.jobs}')
  try:
    jobs = make_jobs(
      args.config,
      args.methods.split(','),
      _integers('--seeds', args.seeds),
      args.root,
      argv[cut + 1 :],
    )
  except ValueError as error:
    print(f'error: {error}', file=sys.stderr)
    return 1
  return Sweep(jobs, args.jobs or default_jobs()).run()


if __name__ == '__main__':
  sys.exit(main())
