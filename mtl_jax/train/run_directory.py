"""`config.json` and `run.json`: what a run directory says about its run."""

from collections.abc import Mapping
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
from typing import Any

import jax

from mtl_jax import types

_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')


def config_changes(
  workdir: str | os.PathLike[str], config: Mapping[str, Any]
) -> list[str]:
  """How a config differs from the one that a run directory is of.

  Args:
    workdir: the run directory; it need not exist.
    config: the config as plain values.

  Returns:
    `'key: value there, value now'` for each key that differs; nothing if the
    directory has no config yet.
  """
  found = _read(pathlib.Path(workdir) / 'config.json')
  if found is None:
    return []
  # By way of JSON, in which tuples are lists.
  old, new = _flat(found), _flat(json.loads(json.dumps(config)))
  return [
    f'{key}: {_show(old, key)} there, {_show(new, key)} now'
    for key in sorted(old.keys() | new.keys())
    if _show(old, key) != _show(new, key)
  ]


def write_config(
  workdir: str | os.PathLike[str], config: Mapping[str, Any]
) -> None:
  """Writes `config.json`."""
  _write(pathlib.Path(workdir) / 'config.json', config)


def read_record(workdir: str | os.PathLike[str]) -> dict[str, Any] | None:
  """What `run.json` says; None if there is none."""
  return _read(pathlib.Path(workdir) / 'run.json')


def write_record(
  workdir: str | os.PathLike[str], record: Mapping[str, Any]
) -> None:
  """Writes `run.json`."""
  _write(pathlib.Path(workdir) / 'run.json', record)


def make_record(
  problem: types.Problem,
  *,
  method: str,
  seed: int,
  num_parameters: int,
  steps: int,
) -> dict[str, Any]:
  """The content of `run.json` at the start of a run.

  Args:
    problem: the problem.
    method: name of the method.
    seed: seed of the run.
    num_parameters: number of parameters of all tasks together.
    steps: number of steps of the whole run.

  Returns:
    Plain values; `'finished'` is None, times are UTC.
  """
  return {
    'problem': problem.name,
    'method': method,
    'seed': seed,
    'tasks': list(problem.task_names),
    'metrics': {
      f'{task.name}/{metric.name}': {
        'higher_is_better': metric.higher_is_better
      }
      for task in problem.tasks
      for metric in task.metrics
    },
    'baselines': dict(problem.baselines),
    'baselines_source': problem.baselines_source,
    'num_parameters': num_parameters,
    'commit': _commit(),
    'versions': {
      'python': platform.python_version(),
      **{name: importlib.metadata.version(name) for name in _PACKAGES},
    },
    'device': jax.devices()[0].device_kind,
    'num_devices': jax.device_count(),
    'num_processes': jax.process_count(),
    'started': now(),
    'finished': None,
    'steps': steps,
    'wall_time_s': 0.0,
    'compile_time_s': 0.0,
  }


def now() -> str:
  """The time, in UTC, as ISO 8601 to the second."""
  return datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')


def _commit() -> str | None:
  """The commit of this code, `-dirty` if files differ from it."""

  def git(*arguments):
    return subprocess.run(
      ('git', *arguments),
      cwd=pathlib.Path(__file__).parent,
      capture_output=True,
      text=True,
      check=True,
      timeout=30,
    ).stdout.strip()

  try:
    # Installed among other packages, it may lie in someone else's repository.
    if not git('ls-files', pathlib.Path(__file__).name):
      return None
    dirty = git('status', '--porcelain', '--untracked-files=no')
    return git('rev-parse', 'HEAD') + ('-dirty' if dirty else '')
  except (OSError, subprocess.SubprocessError):
    return None


def _read(path):
  if not path.exists():
    return None
  try:
    return json.loads(path.read_bytes())
  except ValueError as error:
    raise ValueError(f'{path} is not valid JSON: {error}') from None


def _write(path, value):
  # As a whole or not at all: other processes read it.
  temporary = path.with_name(path.name + '.new')
  temporary.write_text(
    json.dumps(value, indent=2, sort_keys=path.name == 'config.json') + '\n'
  )
  temporary.replace(path)


def _flat(tree, prefix=''):
  flat = {}
  for key, value in tree.items():
    if isinstance(value, dict) and value:
      flat.update(_flat(value, f'{prefix}{key}.'))
    else:
      flat[f'{prefix}{key}'] = value
  return flat


def _show(flat, key):
  return json.dumps(flat[key]) if key in flat else 'not set'
