"""Summaries of a problem's runs, as rows of means with their spread."""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import math
import statistics
from typing import Any

from mtl_jax.metrics.delta_m import delta_m
from mtl_jax.report import variants
from mtl_jax.report.estimates import Estimate
from mtl_jax.report.estimates import estimate
from mtl_jax.report.runs import Run

LAST = 'last'
BEST_TEST = 'best_test'


@dataclasses.dataclass(frozen=True)
class Row:
  """A method, or one of its configs, over its finished seeds.

  Attributes:
    label: the method and, if it was run with several configs, the settings that
      distinguish this one.
    method: name of the method.
    runs: the finished runs by seed.
    scores: `{'task/metric': estimate}` for every metric that all runs have.
    average: mean over tasks of their first metric, if all have the same.
    delta_m: relative change from single-task in per cent, negative is better.
    wall_time_s: median over runs, in seconds; None if no run reports it.
    steps_per_second: median over runs.
  """

  label: str
  method: str
  runs: tuple[Run, ...]
  scores: Mapping[str, Estimate]
  average: Estimate | None
  delta_m: Estimate | None
  wall_time_s: float | None
  steps_per_second: float | None


@dataclasses.dataclass(frozen=True)
class Summary:
  """The summarised runs of one problem.

  Attributes:
    problem: name of the problem.
    tasks: names of the tasks.
    first_metrics: the first metric of each task, as `'task/metric'`.
    higher_is_better: the direction of every metric.
    shared_metric: the name of the first metric if it has the same name and
      direction for all tasks, else None. Only with a name is there an average.
    selection: the evaluation that gives the score: `'last'` or `'best_test'`.
    rows: single-task and linear first, then by name, with each flat method
      after its plain one.
    unfinished: `(label, run)` for the runs that are in no row.
    baselines: `{'task/metric': value}`, the reference for `delta_m`.
    baselines_source: their source; empty without any.
    warnings: facts to know before a comparison of rows.
  """

  problem: str
  tasks: tuple[str, ...]
  first_metrics: tuple[str, ...]
  higher_is_better: Mapping[str, bool]
  shared_metric: str | None
  selection: str
  rows: tuple[Row, ...]
  unfinished: tuple[tuple[str, Run], ...]
  baselines: Mapping[str, float]
  baselines_source: str
  warnings: tuple[str, ...]


def by_problem(runs: Sequence[Run]) -> dict[str, list[Run]]:
  """The runs of each problem, with problems in alphabetical order."""
  problems = sorted({run.problem for run in runs})
  return {
    problem: [run for run in runs if run.problem == problem]
    for problem in problems
  }


def summarise(runs: Sequence[Run], selection: str = LAST) -> Summary:
  """Summarises the runs of one problem.

  Args:
    runs: runs of one problem; unfinished ones are listed but enter no number.
    selection: `'last'` takes the last evaluation on test, `'best_test'` the one
      with the best average over tasks. Some published scripts do the latter,
      which selects on test.

  Returns:
    The summary.

  Raises:
    ValueError: for no run, an unknown selection, several problems, runs whose
      tasks or metrics differ, and `'best_test'` if tasks have no average.
  """
  if not runs:
    raise ValueError(f'runs must not be empty, got {runs}')
  if selection not in (LAST, BEST_TEST):
    raise ValueError(
      f'selection must be {LAST!r} or {BEST_TEST!r}, got {selection!r}'
    )
  first = runs[0]
  for run in runs:
    for name in ('problem', 'tasks', 'higher_is_better'):
      if getattr(run, name) != getattr(first, name):
        raise ValueError(
          f'runs must have one {name}, got {getattr(first, name)} in '
          f'{first.directory} and {getattr(run, name)} in {run.directory}'
        )
  shared_metric = _shared_metric(first)
  if selection == BEST_TEST and shared_metric is None:
    raise ValueError(
      f"selection 'best_test' needs tasks with one metric, got "
      f'{first.first_metrics}'
    )
  select = _selector(first, selection)

  labels, warnings = variants.label_runs(runs)
  groups: dict[str, list[Run]] = {}
  for label, run in zip(labels, runs, strict=True):
    if run.finished:
      groups.setdefault(label, []).append(run)
  groups = {
    label: sorted(groups[label], key=lambda run: run.seed)
    for label in sorted(groups, key=variants.sort_key)
  }
  baselines, source = _baselines(first, groups, select)
  return Summary(
    problem=first.problem,
    tasks=first.tasks,
    first_metrics=first.first_metrics,
    higher_is_better=first.higher_is_better,
    shared_metric=shared_metric,
    selection=selection,
    rows=tuple(
      _row(label, group, select, shared_metric, baselines)
      for label, group in groups.items()
    ),
    unfinished=tuple(
      (label, run)
      for label, run in zip(labels, runs, strict=True)
      if not run.finished
    ),
    baselines=baselines,
    baselines_source=source,
    warnings=warnings,
  )


def _shared_metric(run: Run) -> str | None:
  kinds = {
    (key.rpartition('/')[2], run.higher_is_better[key])
    for key in run.first_metrics
  }
  return next(iter(kinds))[0] if len(kinds) == 1 else None


_Select = Callable[[Run], dict[str, float]]


def _selector(first: Run, selection: str) -> _Select:
  """A function from a run to `{'task/metric': value}` at one evaluation."""
  sign = 1 if first.higher_is_better[first.first_metrics[0]] else -1

  def average(line: Mapping[str, Any]) -> float:
    values = [line[f'test/{key}'] for key in first.first_metrics]
    mean = sign * math.fsum(values) / len(values)
    return mean if math.isfinite(mean) else -math.inf

  def select(run: Run) -> dict[str, float]:
    lines = run.evaluations
    line = lines[-1] if selection == LAST else max(lines, key=average)
    return {
      key: line[f'test/{key}']
      for key in run.higher_is_better
      if f'test/{key}' in line
    }

  return select


def _baselines(
  first: Run, groups: Mapping[str, Sequence[Run]], select: _Select
) -> tuple[dict[str, float], str]:
  """The baselines: single-task runs if there are any, else the problem's own.

  Compared are the metrics for which the problem has baselines, or the first
  metric of each task if it has none.
  """
  published = dict(first.info.get('baselines') or {})
  keys = [key for key in first.higher_is_better if key in published]
  single = [label for label, runs in groups.items() if runs[0].method == 'stl']
  if not single:
    source = first.info.get('baselines_source') or 'unnamed source'
    values = {key: float(published[key]) for key in keys}
    return values, source if values else ''
  # Among several configs the one with the most seeds, and the first of equals.
  label = max(single, key=lambda name: len(groups[name]))
  scores = [select(run) for run in groups[label]]
  keys = [key for key in keys if all(key in score for score in scores)]
  means = {
    key: estimate([score[key] for score in scores]).mean
    for key in keys or first.first_metrics
  }
  return means, f'mean of {label} over its seeds'


def _row(
  label: str,
  runs: Sequence[Run],
  select: _Select,
  shared_metric: str | None,
  baselines: Mapping[str, float],
) -> Row:
  first = runs[0]
  scores = [select(run) for run in runs]
  averages = [
    math.fsum(score[key] for key in first.first_metrics) / len(first.tasks)
    for score in scores
  ]
  comparable = baselines and all(
    value != 0 and math.isfinite(value) for value in baselines.values()
  )
  complete = all(baselines.keys() <= score.keys() for score in scores)
  changes = [
    delta_m(
      {key: score[key] for key in baselines},
      baselines,
      {key: first.higher_is_better[key] for key in baselines},
    )
    for score in scores
    if comparable and complete
  ]
  return Row(
    label=label,
    method=first.method,
    runs=tuple(runs),
    scores={
      key: estimate([score[key] for score in scores])
      for key in first.higher_is_better
      if all(key in score for score in scores)
    },
    average=estimate(averages) if shared_metric else None,
    delta_m=estimate(changes) if changes else None,
    wall_time_s=_median(run.info.get('wall_time_s') for run in runs),
    steps_per_second=_median(_rate(run) for run in runs),
  )


def _rate(run: Run) -> float | None:
  """Steps per second: the median over the log, which excludes compilation."""
  _, _, rates = run.series('train/steps_per_second')
  rates = [rate for rate in rates if math.isfinite(rate)]
  if rates:
    return statistics.median(rates)
  steps, seconds = run.info.get('steps'), run.info.get('wall_time_s')
  return steps / seconds if steps and seconds else None


def _median(values: Iterable[float | None]) -> float | None:
  known = [value for value in values if value is not None]
  return statistics.median(known) if known else None
