"""Groups of runs that belong together, with their labels and their order."""

from collections.abc import Sequence
import json
from typing import Any

from mtl_jax.report.runs import Run

# The reference methods come first.
_CONTROLS = ('stl', 'linear')

# The part of a config that specifies the method.
_METHOD_SETTINGS = ('method.', 'model.sharing')


def family(label: str) -> str:
  """The label of the plain method: `'f_cagrad'` and `'cagrad'` are one."""
  return label.removeprefix('f_')


def is_flat(label: str) -> bool:
  """Whether the label names a method with flat minima."""
  return label.startswith('f_')


def sort_key(label: str) -> tuple[Any, ...]:
  """Sorts controls first, then by name, flat methods after their plain ones."""
  base = family(label)
  method = base.split(' ')[0]
  if method in _CONTROLS:
    return _CONTROLS.index(method), base, is_flat(label)
  return len(_CONTROLS), base, is_flat(label)


def label_runs(
  runs: Sequence[Run],
) -> tuple[list[str], tuple[str, ...]]:
  """Names the row of each run and warns about configs that differ.

  Runs of one method with different settings are never averaged: each setting
  gets a row, named by the difference.

  Args:
    runs: runs of one problem.

  Returns:
    A label for each run and the warnings.
  """
  warnings = []
  labels = {}
  for method in sorted({run.method for run in runs}):
    own = [run for run in runs if run.method == method]
    keys = differing_keys(own)
    names = _short_names(keys)
    for run in own:
      told = [
        f'{names[key]}={_plain(run.settings.get(key, "unset"))}' for key in keys
      ]
      labels[id(run)] = f'{method} ({", ".join(told)})' if keys else method
    if keys:
      warnings.append(
        f'{method} was run with different configs, a row each: '
        f'{", ".join(keys)}.'
      )
  warnings.extend(_between_methods(runs))
  return [labels[id(run)] for run in runs], tuple(warnings)


def differing_keys(runs: Sequence[Run]) -> list[str]:
  """The settings that differ among `runs`."""
  keys = sorted({key for run in runs for key in run.settings})
  return [key for key in keys if len(_values(runs, key)) > 1]


def _values(runs: Sequence[Run], key: str) -> set[str | None]:
  """The values of a setting, as JSON; None for a run without the key."""
  return {
    json.dumps(run.settings[key], sort_keys=True)
    if key in run.settings
    else None
    for run in runs
  }


def _between_methods(runs: Sequence[Run]) -> list[str]:
  """A warning if a setting that all methods have differs between them.

  The settings that define the method do not count, nor does a setting that only
  some methods have. A setting that differs within a method is already reported.
  """
  methods = sorted({run.method for run in runs}, key=sort_key)
  groups = [[run for run in runs if run.method == name] for name in methods]
  told = []
  for key in differing_keys(runs):
    values = [_values(group, key) for group in groups]
    if key.startswith(_METHOD_SETTINGS) or any(
      len(value) > 1 or None in value for value in values
    ):
      continue
    by_value: dict[str, list[str]] = {}
    for method, value in zip(methods, values, strict=True):
      by_value.setdefault(str(next(iter(value))), []).append(method)
    settings = '; '.join(
      f'{value} for {", ".join(names)}' for value, names in by_value.items()
    )
    told.append(f'{key} ({settings})')
  if not told:
    return []
  return [f'The configs of the methods differ in {"; ".join(told)}.']


def _short_names(keys: Sequence[str]) -> dict[str, str]:
  """The last part of each key, or the whole key if two would be equal."""
  short = [key.rpartition('.')[2] for key in keys]
  return {
    key: name if short.count(name) == 1 else key
    for key, name in zip(keys, short, strict=True)
  }


def _plain(value: Any) -> str:
  return value if isinstance(value, str) else json.dumps(value)
