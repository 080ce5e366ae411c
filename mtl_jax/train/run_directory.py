"""The files `run.json` and `config.json` of a run directory.

`run.json` is written whole or not at all and holds the config of the training.
`config.json` is a copy of that config for readers.
"""

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

# Any file may have these names; a run's files have these entries.
_RECORD_ENTRIES = ('problem', 'method', 'seed', 'started', 'finished')
_CONFIG_ENTRIES = ('problem', 'method', 'model', 'optimizer')


def read_config(workdir: str | os.PathLike[str]) -> dict[str, Any] | None:
  """The config of a run directory, as plain values.

  Args:
    workdir: the run directory; it need not exist.

  Returns:
    The config in `run.json`, else in `config.json`; None if there is neither.

  Raises:
    ValueError: if one of the files cannot be read or is not a run's.
  """
  record = read_record(workdir)
  if record is not None and 'config' in record:
    return record['config']
  return _read(pathlib.Path(workdir) / 'config.json', _CONFIG_ENTRIES)


def config_changes(
  workdir: str | os.PathLike[str], config: Mapping[str, Any]
) -> list[str]:
  """The differences between a config and the one in a run directory.

  Args:
    workdir: the run directory; it need not exist.
    config: the config as plain values.

  Returns:
    `'key: value there, value now'` for each key that differs; nothing if the
    directory has no config yet.

  Raises:
    ValueError: see `read_config`.
  """
  found = read_config(workdir)
  if found is None:
    return []
  # Through JSON, in which tuples are lists.
  old, new = _flat(found), _flat(json.loads(json.dumps(config)))
  return [
    f'{key}: {_show(old, key)} there, {_show(new, key)} now'
    for key in sorted(old.keys() | new.keys())
    if _show(old, key) != _show(new, key)
  ]


def read_record(workdir: str | os.PathLike[str]) -> dict[str, Any] | None:
  """The record in `run.json`; None if there is none.

  Args:
    workdir: the run directory; it need not exist.

  Returns:
    The record.

  Raises:
    ValueError: if the file cannot be read or is not a run's.
  """
  return _read(pathlib.Path(workdir) / 'run.json', _RECORD_ENTRIES)


def write_record(
  workdir: str | os.PathLike[str], record: Mapping[str, Any]
) -> None:
  """Writes `run.json`, and then `config.json` if that differs.

  Args:
    workdir: the run directory.
    record: the record, with the config.
  """
  _replace(pathlib.Path(workdir) / 'run.json', _dump(record))
  path = pathlib.Path(workdir) / 'config.json'
  text = _dump(record['config'], sort_keys=True)
  if not path.exists() or path.read_text() != text:
    _replace(path, text)


def make_record(
  problem: types.Problem,
  config: Mapping[str, Any],
  *,
  num_parameters: int,
  steps: int,
) -> dict[str, Any]:
  """The content of `run.json` at the start of a run.

  Args:
    problem: the problem.
    config: the config as plain values.
    num_parameters: number of parameters for all tasks together.
    steps: number of steps in the whole run.

  Returns:
    Plain values; `'finished'` is None, times are UTC.
  """
  return {
    'problem': problem.name,
    'method': config['method']['name'],
    'seed': config['seed'],
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
    # The steps at which the run continued with another config, and the changes.
    'config_changes': [],
    'config': config,
  }


def now() -> str:
  """The time, in UTC, as ISO 8601 to the second."""
  return datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')


def _commit() -> str | None:
  """The commit of this code, with `-dirty` if files differ from it."""

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
    # An installed package may be inside an unrelated repository.
    if not git('ls-files', pathlib.Path(__file__).name):
      return None
    dirty = git('status', '--porcelain', '--untracked-files=no')
    return git('rev-parse', 'HEAD') + ('-dirty' if dirty else '')
  except (OSError, subprocess.SubprocessError):
    return None


def _read(path, entries):
  try:
    value = json.loads(path.read_bytes())
  except (FileNotFoundError, NotADirectoryError):
    return None
  except OSError as error:
    raise ValueError(f'{path} cannot be read: {error.strerror}') from None
  except ValueError as error:
    raise ValueError(f'{path} is not valid JSON: {error}') from None
  missing = [
    x for x in entries if not isinstance(value, dict) or x not in value
  ]
  if missing:
    raise ValueError(
      f'{path} is not of a run of mtl_jax: it has no entry {missing[0]!r}'
    )
  return value


def _dump(value, **options):
  return json.dumps(value, indent=2, **options) + '\n'


def _replace(path, text):
  # Written whole or not at all, because other processes read it.
  temporary = path.with_name(path.name + '.new')
  temporary.write_text(text)
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
