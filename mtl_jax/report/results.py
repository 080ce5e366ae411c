"""The result file of a problem, with the numbers and their origin."""

from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
import datetime
import json
import math
from typing import Any

from mtl_jax.report.estimates import Estimate
from mtl_jax.report.runs import Run
from mtl_jax.report.summary import Row
from mtl_jax.report.summary import Summary
from mtl_jax.report.variants import differing_keys


def result(
  summary: Summary,
  *,
  command: str,
  best_test: Summary | None = None,
  notes: Sequence[str] = (),
) -> dict[str, Any]:
  """The numbers in a summary with configs, versions, commit and date.

  Args:
    summary: the numbers, by the last evaluation on test.
    command: the command that made the file.
    best_test: a summary of the same runs by their best evaluation on test,
      added under that name.
    notes: further warnings to keep.

  Returns:
    A tree of plain values with a fixed order of keys. Metrics are as logged. If
    the runs differ in a device, version or commit, it lists all values.
  """
  runs = [run for row in summary.rows for run in row.runs]
  methods = {row.label: _row(row, summary) for row in summary.rows}
  if best_test is not None:
    for row in best_test.rows:
      methods[row.label]['best_test'] = _scores(row, best_test)
  packages = sorted({name for run in runs for name in _versions(run)})
  return {
    'problem': summary.problem,
    'score': 'last evaluation on test',
    'higher_is_better': dict(summary.higher_is_better),
    'config': _configs(summary),
    'baselines': {
      'source': summary.baselines_source,
      **{key: _number(value) for key, value in summary.baselines.items()},
    },
    'methods': methods,
    'unfinished': [
      {'method': label, 'seed': run.seed, 'step': run.last_step}
      for label, run in summary.unfinished
    ],
    'warnings': [*summary.warnings, *notes],
    'device': _common(run.info.get('device') for run in runs),
    'num_devices': _common(run.info.get('num_devices') for run in runs),
    'versions': {
      name: _common(_versions(run).get(name) for run in runs)
      for name in packages
    },
    'commit': _common(run.info.get('commit') for run in runs),
    'date': datetime.datetime.now(datetime.UTC).date().isoformat(),
    'command': command,
  }


def dumps(tree: Any, indent: str = '') -> str:
  """JSON with one line an entry, except in lists and dicts of plain values.

  Args:
    tree: dicts, lists and plain values, all finite.
    indent: the text before all lines but the first.

  Returns:
    The text, without a newline at its end.

  Raises:
    ValueError: for a non-finite number, which JSON cannot hold.
  """
  children = list(tree.values()) if isinstance(tree, dict) else tree
  nested = isinstance(tree, (dict, list)) and any(
    isinstance(child, (dict, list)) for child in children
  )
  if not nested:
    return json.dumps(tree, ensure_ascii=False, allow_nan=False)
  inner = indent + '  '
  if isinstance(tree, dict):
    entries = [
      f'{json.dumps(key, ensure_ascii=False)}: {dumps(value, inner)}'
      for key, value in tree.items()
    ]
    begin, end = '{}'
  else:
    entries = [dumps(value, inner) for value in tree]
    begin, end = '[]'
  lines = ',\n'.join(inner + entry for entry in entries)
  return f'{begin}\n{lines}\n{indent}{end}'


def _row(row: Row, summary: Summary) -> dict[str, Any]:
  return {
    'seeds': [run.seed for run in row.runs],
    **_scores(row, summary),
    'wall_time_s': [_number(run.info.get('wall_time_s')) for run in row.runs],
    'steps_per_second': _number(row.steps_per_second),
    'steps': _common(run.info.get('steps') for run in row.runs),
    'num_parameters': _common(
      run.info.get('num_parameters') for run in row.runs
    ),
  }


def _scores(row: Row, summary: Summary) -> dict[str, Any]:
  scores: dict[str, Any] = {
    key: _estimate(value) for key, value in row.scores.items()
  }
  if row.average is not None:
    scores['average'] = _estimate(row.average)
  if row.delta_m is not None:
    scores['delta_m_percent'] = _estimate(row.delta_m)
  return scores


def _estimate(value: Estimate) -> dict[str, Any]:
  return {
    'mean': _number(value.mean),
    'standard_deviation': _number(value.standard_deviation),
    'standard_error': _number(value.standard_error),
    'values': [_number(number) for number in value.values],
  }


def _number(value: float | None) -> float | None:
  """The value, or None for the score of a diverged run."""
  return value if value is not None and math.isfinite(value) else None


def _configs(summary: Summary) -> dict[str, Any]:
  """Settings that all runs share, and further settings of each method."""
  runs = [run for row in summary.rows for run in row.runs]
  differing = differing_keys(runs)
  common = runs[0].settings if runs else {}
  return {
    'common': {
      key: value for key, value in common.items() if key not in differing
    },
    'methods': {
      row.label: {
        key: row.runs[0].settings[key]
        for key in differing
        if key in row.runs[0].settings
      }
      for row in summary.rows
    },
  }


def _versions(run: Run) -> Mapping[str, str]:
  return run.info.get('versions') or {}


def _common(values: Iterable[Any]) -> Any:
  """The single value, or a sorted list if there are several."""
  distinct = sorted(set(values), key=str)
  return distinct[0] if len(distinct) == 1 else distinct
