"""Published numbers to show beside the measured ones."""

from collections.abc import Mapping
from collections.abc import Sequence
import json
import math
import os
import pathlib
from typing import Any
from typing import NamedTuple

from mtl_jax.metrics.delta_m import delta_m
from mtl_jax.report.summary import Summary


class Value(NamedTuple):
  """A published number and the deviation printed with it, if any."""

  mean: float
  deviation: float | None


class Published(NamedTuple):
  """The published numbers for one problem, in the unit of the table.

  Attributes:
    source: the publication.
    rows: `{method: {'task/metric' or 'average': value}}`.
  """

  source: str
  rows: Mapping[str, Mapping[str, Value]]


def read_published(
  path: str | os.PathLike[str], summary: Summary
) -> Published | None:
  """Reads the numbers for a problem from a file.

  The file is a JSON object `{"source": str, problem: {method: {column: value or
  [value, deviation]}}}`; problems may be nested deeper. A column is a task's
  name, a `task/metric`, `task_<n>` for the n-th task counted from one, or
  `average`. Numbers are in the unit of the table: accuracies in per cent.

  Args:
    path: the file.
    summary: the problem and the methods to look up.

  Returns:
    The numbers for the methods in `summary`, or None if the file has none.

  Raises:
    ValueError: if the file is not such a JSON object.
  """
  path = pathlib.Path(path)
  try:
    content = json.loads(path.read_bytes())
  except (OSError, ValueError) as error:
    raise ValueError(f'published file {path} cannot be read: {error}') from None
  if not isinstance(content, dict) or 'source' not in content:
    raise ValueError(
      f"published file {path} must hold a JSON object with a 'source'"
    )
  methods = {row.method for row in summary.rows}
  columns = {'average': 'average'}
  for number, key in enumerate(summary.first_metrics, 1):
    columns[f'task_{number}'] = key
    columns[key.rpartition('/')[0]] = key
    columns[key] = key
  rows = {}
  for method, entries in (_find(content, summary.problem) or {}).items():
    values = {
      columns[name]: _value(value, f'{path}: {method}/{name}')
      for name, value in entries.items()
      if name in columns and value is not None
    }
    if method in methods and values:
      rows[method] = values
  return Published(str(content['source']), rows) if rows else None


def published_delta_m(
  published: Published, method: str, summary: Summary
) -> float | None:
  """Relative change from the published single-task row, in per cent.

  Args:
    published: the numbers.
    method: the row.
    summary: specifies the metrics and their directions.

  Returns:
    The mean over tasks, negative is better; None if a number is missing.
  """
  keys = summary.first_metrics
  rows = [published.rows.get(name, {}) for name in (method, 'stl')]
  if not all(key in row for key in keys for row in rows):
    return None
  scores, baselines = ({key: row[key].mean for key in keys} for row in rows)
  return delta_m(
    scores, baselines, {key: summary.higher_is_better[key] for key in keys}
  )


def _find(tree: Mapping[str, Any], problem: str) -> Mapping[str, Any] | None:
  """The innermost object with the name `problem` that holds methods."""
  for key, value in tree.items():
    if isinstance(value, Mapping):
      inner = _find(value, problem)
      if inner is not None:
        return inner
      if key == problem and all(isinstance(v, Mapping) for v in value.values()):
        return value
  return None


def _value(value: Any, where: str) -> Value:
  parts: Sequence[Any] = value if isinstance(value, list) else [value, None]
  numbers = [part for part in parts if part is not None]
  if len(parts) != 2 or not all(
    isinstance(part, (int, float)) and math.isfinite(part) for part in numbers
  ):
    raise ValueError(f'{where} must be a number or two, got {value!r}')
  mean, deviation = parts
  return Value(float(mean), None if deviation is None else float(deviation))
