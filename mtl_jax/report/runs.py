"""Runs, read from their directories."""

from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import json
import math
import os
import pathlib
from typing import Any

_RUN_FILES = ('run.json', 'metrics.jsonl')

# Config entries that differ on purpose between the runs of a comparison, and
# entries that cannot change a score: places of files, logs and checkpoints.
_NOT_COMPARED = (
  'method',
  'seed',
  'workdir',
  'data_dir',
  'source_dir',
  'log_every_steps',
  'checkpoint_every_steps',
  'keep_checkpoints',
)


@dataclasses.dataclass(frozen=True)
class Run:
  """One training run, as its directory records it.

  Attributes:
    directory: the directory of the run.
    problem: name of the problem.
    method: name of the method, such as `'f_cagrad'`.
    seed: seed of the run.
    tasks: names of the tasks, in the problem's order.
    higher_is_better: `{'task/metric': bool}`, each task's first metric before
      its others.
    config: the config with nested keys joined by dots.
    info: the content of `run.json`.
    lines: the lines of `metrics.jsonl`, in their order, NaN for a null.
    warnings: facts about this run that a reader of its numbers should know.
  """

  directory: pathlib.Path
  problem: str
  method: str
  seed: int
  tasks: tuple[str, ...]
  higher_is_better: Mapping[str, bool]
  config: Mapping[str, Any]
  info: Mapping[str, Any]
  lines: Sequence[Mapping[str, Any]]
  warnings: tuple[str, ...] = ()

  @property
  def first_metrics(self) -> tuple[str, ...]:
    """The first metric of each task, as `'task/metric'`."""
    first: dict[str, str] = {}
    for key in self.higher_is_better:
      first.setdefault(key.rpartition('/')[0], key)
    return tuple(first[task] for task in self.tasks)

  @property
  def settings(self) -> dict[str, Any]:
    """The config without the seed and entries that cannot change a score."""
    return {
      key: value
      for key, value in self.config.items()
      if key.rpartition('.')[2] not in _NOT_COMPARED
    }

  @property
  def evaluations(self) -> tuple[Mapping[str, Any], ...]:
    """The lines with every task's first metric on test, for the last config."""
    keys = [f'test/{key}' for key in self.first_metrics]
    since = max((change['step'] for change in self.config_changes), default=0)
    return tuple(
      line
      for line in self.lines
      if line['step'] > since and all(key in line for key in keys)
    )

  @property
  def config_changes(self) -> tuple[Mapping[str, Any], ...]:
    """Continuations with another config that may change a score.

    More epochs of the same training do not count.
    """
    may_matter = lambda change: any(
      line.partition(':')[0].rpartition('.')[2]
      not in (*_NOT_COMPARED, 'epochs')
      for line in change['changes']
    )
    return tuple(filter(may_matter, self.info.get('config_changes', ())))

  @property
  def finished(self) -> bool:
    """Whether it reached its last step and was evaluated on test there."""
    return self.info.get('finished') is not None and bool(self.evaluations)

  @property
  def last_step(self) -> int:
    """The last step in the log, 0 for an empty log."""
    return max((line['step'] for line in self.lines), default=0)

  def series(self, key: str) -> tuple[list[int], list[float], list[float]]:
    """The steps, epochs and values of the lines that hold `key`."""
    lines = [line for line in self.lines if key in line]
    return (
      [line['step'] for line in lines],
      [float(line['epoch']) for line in lines],
      [float(line[key]) for line in lines],
    )


def read_runs(
  directories: Iterable[str | os.PathLike[str]],
) -> tuple[list[Run], list[str]]:
  """Reads every run directory at or below `directories`.

  A run directory holds `run.json` and `metrics.jsonl`. A directory that is
  below two of `directories` is read once.

  Args:
    directories: folders to search.

  Returns:
    The runs in the order of their paths, and a sentence for each directory that
    was skipped or is odd.

  Raises:
    ValueError: if a directory does not exist, if there is no run below any of
      them, if a file is damaged (except for the last line of a log), and if one
      method and seed of a problem was run twice with the same config.
  """
  directories = [pathlib.Path(directory) for directory in directories]
  found: dict[pathlib.Path, pathlib.Path] = {}
  notes = []
  for directory in directories:
    if not directory.is_dir():
      raise ValueError(f'directories must exist, got {str(directory)!r}')
    for parent, children, files in os.walk(directory):
      children[:] = sorted(set(children) - {'checkpoints'})
      present = [name for name in _RUN_FILES if name in files]
      path = pathlib.Path(parent)
      if len(present) == len(_RUN_FILES):
        found.setdefault(path.resolve(), path)
      elif present:
        (missing,) = set(_RUN_FILES) - set(present)
        notes.append(f'Skipped {path}: it has {present[0]} but no {missing}.')
  if not found:
    looked = ', '.join(str(directory) for directory in directories)
    raise ValueError(
      f'no run found in or below {looked}: a run directory holds '
      f'{" and ".join(_RUN_FILES)}, as `python -m mtl_jax.main --workdir=DIR` '
      'writes them' + ''.join(f'\n{note}' for note in notes)
    )
  runs = [read_run(found[key]) for key in sorted(found)]
  _check_repeated(runs)
  for run in runs:
    notes.extend(run.warnings)
  return runs, notes


def read_run(directory: str | os.PathLike[str]) -> Run:
  """Reads one run directory.

  Args:
    directory: a folder with `run.json` and `metrics.jsonl`. The config comes
      from `run.json` or, for an older run without one there, from
      `config.json`.

  Returns:
    The run. If the log's last line is not a JSON object, as after a crash
    during writing, it is ignored and mentioned in `warnings`.

  Raises:
    ValueError: if a file cannot be read, or if the two files have different
      methods; the message names the file and line, or both files.
  """
  directory = pathlib.Path(directory)
  info = _read_object(directory / 'run.json')
  config_file = directory / 'config.json'
  config = info.get('config')
  if config is None:
    config = _read_object(config_file) if config_file.exists() else {}
  configured = flatten(config).get('method.name', info.get('method'))
  if configured != info.get('method'):
    raise ValueError(
      f'{directory} was trained with {info.get("method")!r}, says run.json, '
      f'but its config is of {configured!r}; remove it or run it again'
    )
  lines, warnings = _read_lines(directory / 'metrics.jsonl')
  try:
    run = Run(
      directory=directory,
      problem=str(info['problem']),
      method=str(info['method']),
      seed=int(info['seed']),
      tasks=tuple(info['tasks']),
      higher_is_better={
        key: bool(value['higher_is_better'])
        for key, value in info['metrics'].items()
      },
      config=flatten(config),
      info=info,
      lines=lines,
      warnings=warnings,
    )
    run.first_metrics  # noqa: B018  every task must have a metric
    if run.config_changes:
      told = '; '.join(
        f'from step {change["step"]} on {", ".join(change["changes"])}'
        for change in run.config_changes
      )
      warning = f'{directory} went on with another config: {told}.'
      run = dataclasses.replace(run, warnings=(*warnings, warning))
  except KeyError as error:
    raise ValueError(f'{directory / "run.json"} has no entry {error}') from None
  return run


def flatten(tree: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  """`{'a': {'b': 1}}` as `{'a.b': 1}`; an empty mapping stays a value."""
  flat: dict[str, Any] = {}
  for key, value in tree.items():
    if isinstance(value, Mapping) and value:
      flat.update(flatten(value, f'{prefix}{key}.'))
    else:
      flat[f'{prefix}{key}'] = value
  return flat


def _read_object(path: pathlib.Path) -> dict[str, Any]:
  try:
    value = json.loads(path.read_bytes())
  except ValueError as error:
    raise ValueError(f'{path} is not valid JSON: {error}') from None
  if not isinstance(value, dict):
    raise ValueError(f'{path} must hold a JSON object, got {value!r}')
  return value


def _read_lines(
  path: pathlib.Path,
) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
  """The lines of a log, and a warning if the last one is broken."""
  rows = path.read_bytes().split(b'\n')
  while rows and not rows[-1].strip():
    rows.pop()
  lines = []
  for number, row in enumerate(rows, 1):
    try:
      line = json.loads(row)
      if not isinstance(line, dict) or not {'step', 'epoch'} <= line.keys():
        raise ValueError("not an object with 'step' and 'epoch'")
    except ValueError as error:
      if number < len(rows):
        raise ValueError(
          f'{path}, line {number} cannot be read: {error}'
        ) from None
      return lines, (f'Ignored the broken last line {number} of {path}.',)
    # A non-finite number is logged as null.
    lines.append({k: math.nan if v is None else v for k, v in line.items()})
  return lines, ()


def _check_repeated(runs: Sequence[Run]) -> None:
  first: dict[tuple[Any, ...], Run] = {}
  for run in runs:
    settings = json.dumps(run.settings, sort_keys=True)
    key = (run.problem, run.method, run.seed, settings)
    if key in first:
      raise ValueError(
        f'{run.method} with seed {run.seed} on {run.problem} was run twice '
        f'with the same config: {first[key].directory} and {run.directory}; '
        'remove one or name the directories to read'
      )
    first[key] = run
