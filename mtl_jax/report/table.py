"""The table of a summary, as aligned Markdown and as CSV."""

from collections.abc import Iterable
from collections.abc import Sequence
import csv
import io
import math

from mtl_jax.report.estimates import Estimate
from mtl_jax.report.published import Published
from mtl_jax.report.published import published_delta_m
from mtl_jax.report.published import Value
from mtl_jax.report.summary import BEST_TEST
from mtl_jax.report.summary import Row
from mtl_jax.report.summary import Summary
from mtl_jax.report.units import decimals_for
from mtl_jax.report.units import titled
from mtl_jax.report.units import unit_of

# More tasks than this go into a separate table, with one in a row.
_MOST_TASK_COLUMNS = 8

_BEST_TEST_TITLE = (
  "best test epoch (as the authors' script selects; "
  'not a protocol we recommend)'
)


def markdown(summary: Summary, published: Sequence[Published] = ()) -> str:
  """The table of a problem, with notes for its reader.

  Args:
    summary: the numbers.
    published: published rows to put below the measured ones.

  Returns:
    Markdown whose columns also line up as plain text; ends with a newline.
  """
  title = f'## {summary.problem}'
  if summary.selection == BEST_TEST:
    title += f': {_BEST_TEST_TITLE}'
  parts = [title, _introduction(summary)]
  if summary.rows:
    wide = len(summary.tasks) > _MOST_TASK_COLUMNS
    columns = _columns(summary, published, tasks=not wide)
    parts.append(_aligned(columns))
    if wide:
      parts.append(_aligned(_transposed(_task_columns(summary, published))))
  else:
    parts.append('No finished run yet.')
  notes = _notes(summary, published)
  if notes:
    parts.append('\n'.join(f'- {note}' for note in notes))
  return '\n\n'.join(parts) + '\n'


def csv_text(summary: Summary) -> str:
  """The table as CSV, with numbers as logged and in full precision.

  Args:
    summary: the numbers.

  Returns:
    A header and a line per method. An unknown number, such as the standard
    error of a single seed, is an empty field.
  """
  columns = [*summary.first_metrics, 'average', 'delta_m_percent']
  header = ['problem', 'method', 'score', 'seeds']
  for column in columns:
    header += [column, f'{column} standard_error']
  buffer = io.StringIO()
  writer = csv.writer(buffer, lineterminator='\n')
  writer.writerow([*header, 'wall_time_s', 'steps_per_second'])
  for row in summary.rows:
    cells = [summary.problem, row.label, summary.selection, len(row.runs)]
    estimates = [row.scores[key] for key in summary.first_metrics]
    for value in [*estimates, row.average, row.delta_m]:
      cells += [None, None] if value is None else [value[1], value[3]]
    writer.writerow([*cells, row.wall_time_s, row.steps_per_second])
  return buffer.getvalue()


def _introduction(summary: Summary) -> str:
  what = 'the first metric of each task'
  if summary.shared_metric:
    better = summary.higher_is_better[summary.first_metrics[0]]
    what = titled(summary.shared_metric, summary.shared_metric)
    what += f', {"higher" if better else "lower"} is better'
  when = 'last evaluation'
  if summary.selection == BEST_TEST:
    when = 'evaluation with the best average over tasks on test'
  lines = [
    f'Score: {what}, on test at the {when}; mean ± standard error over seeds '
    '(a dash: one seed only).'
  ]
  if summary.baselines:
    lines.append(
      'delta_m: mean relative change from single-task '
      f'({summary.baselines_source}) in per cent, negative is better.'
    )
  else:
    lines.append(
      'No delta_m: neither finished single-task runs nor baselines to compare '
      'with.'
    )
  return '\n'.join(lines)


# A column: its title and its cells.
_Column = tuple[str, list[str]]


def _columns(
  summary: Summary, published: Sequence[Published], *, tasks: bool
) -> list[_Column]:
  rows = summary.rows
  blank = ['-'] * sum(len(source.rows) for source in published)
  columns = [
    ('method', _labels(summary, published)),
    ('seeds', [str(len(row.runs)) for row in rows] + blank),
  ]
  if tasks:
    columns += _task_columns(summary, published)[1:]
  if summary.shared_metric and len(summary.tasks) > 1:
    columns.append(
      _score_column(
        titled('average', summary.shared_metric),
        [row.average for row in rows],
        [row.get('average') for _, _, row in _published_rows(published)],
        summary.shared_metric,
      )
    )
  if summary.baselines:
    theirs = [
      published_delta_m(source, method, summary)
      for source, method, _ in _published_rows(published)
    ]
    ours = [_show(row.delta_m, 1.0, 2, sign='+') for row in rows]
    columns.append(
      (
        'delta_m (%)',
        ours + ['-' if value is None else f'{value:+.2f}' for value in theirs],
      )
    )
  times = [row.wall_time_s for row in rows]
  unit, seconds = _time_unit(times)
  columns.append((f'wall time ({unit})', _plain(times, seconds) + blank))
  rates = [row.steps_per_second for row in rows]
  columns.append(('steps/s', _plain(rates) + blank))
  return columns


def _task_columns(
  summary: Summary, published: Sequence[Published]
) -> list[_Column]:
  """The methods and a column for each task."""
  columns = [('method', _labels(summary, published))]
  for key in summary.first_metrics:
    task, _, metric = key.rpartition('/')
    title = task
    if not summary.shared_metric:
      better = summary.higher_is_better[key]
      title = f'{task} {metric} {"↑" if better else "↓"}'
    columns.append(
      _score_column(
        titled(title, metric),
        [row.scores[key] for row in summary.rows],
        [row.get(key) for _, _, row in _published_rows(published)],
        metric,
      )
    )
  return columns


def _labels(summary: Summary, published: Sequence[Published]) -> list[str]:
  labels = [row.label for row in summary.rows]
  for number, source in enumerate(published, 1):
    mark = f' {number}' if len(published) > 1 else ''
    labels += [f'{method}, published{mark}' for method in source.rows]
  return labels


def _published_rows(published: Sequence[Published]):
  for source in published:
    for method, row in source.rows.items():
      yield source, method, row


def _score_column(
  title: str,
  ours: Sequence[Estimate | None],
  theirs: Sequence[Value | None],
  metric: str,
) -> _Column:
  scale = unit_of(metric).scale
  decimals = decimals_for([e.mean for e in ours if e is not None], metric)
  cells = [_show(value, scale, decimals) for value in ours]
  for value in theirs:
    if value is None:
      cells.append('-')
    else:
      known = value.deviation is not None
      spread = f'{value.deviation:.{decimals}f}' if known else '-'
      cells.append(f'{value.mean:.{decimals}f} ± {spread}')
  return title, cells


def _show(
  value: Estimate | None, scale: float, decimals: int, sign: str = ''
) -> str:
  if value is None:
    return '-'
  known = value.standard_error is not None
  spread = f'{scale * value.standard_error:.{decimals}f}' if known else '-'
  if not math.isfinite(value.mean):
    return f'{value.mean} ± {spread}'
  # Adding zero turns the -0.0 for a baseline compared with itself into 0.0.
  mean = round(scale * value.mean, decimals) + 0.0
  return f'{mean:{sign}.{decimals}f} ± {spread}'


def _plain(values: Iterable[float | None], divisor: float = 1.0) -> list[str]:
  numbers = [None if value is None else value / divisor for value in values]
  smallest = min((n for n in numbers if n is not None), default=0.0)
  decimals = 1 if smallest < 100 else 0
  return ['-' if n is None else f'{n:.{decimals}f}' for n in numbers]


def _time_unit(times: Sequence[float | None]) -> tuple[str, float]:
  longest = max((value for value in times if value is not None), default=0.0)
  if longest < 600:
    return 's', 1.0
  return ('min', 60.0) if longest < 36_000 else ('h', 3600.0)


def _transposed(columns: Sequence[_Column]) -> list[_Column]:
  """Tasks as rows and methods as columns."""
  (_, methods), *tasks = columns
  result = [('task', [title for title, _ in tasks])]
  for index, method in enumerate(methods):
    result.append((method, [cells[index] for _, cells in tasks]))
  return result


def _aligned(columns: Sequence[_Column]) -> str:
  """A Markdown table with the first column left and numbers right."""
  widths = [max(map(len, [title, *cells])) for title, cells in columns]
  lines = [[title for title, _ in columns]]
  lines += [list(row) for row in zip(*(c for _, c in columns), strict=True)]
  text = []
  for line in lines:
    first = line[0].ljust(widths[0])
    rest = [c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True)]
    text.append(f'| {" | ".join([first, *rest])} |')
  rule = [':' + '-' * (widths[0] - 1)] + [
    '-' * (w - 1) + ':' for w in widths[1:]
  ]
  text.insert(1, f'| {" | ".join(rule)} |')
  return '\n'.join(text)


def _notes(summary: Summary, published: Sequence[Published]) -> list[str]:
  notes = [f'Warning: {warning}' for warning in summary.warnings]
  devices = sorted(
    {str(run.info.get('device')) for row in summary.rows for run in row.runs}
  )
  if len(devices) > 1:
    notes.append(
      'Warning: times are not comparable, the runs were made on different '
      f'devices: {", ".join(devices)}.'
    )
  notes += [_diverged(row) for row in summary.rows if _diverged(row)]
  for label, run in summary.unfinished:
    notes.append(
      f'Unfinished, in no mean: {label} seed {run.seed}, at step '
      f'{run.last_step} of {run.info.get("steps", "?")} ({run.directory}).'
    )
  for number, source in enumerate(published, 1):
    mark = f' {number}' if len(published) > 1 else ''
    notes.append(
      f'Published{mark}: {source.source}. The number after ± is the deviation '
      'printed there; delta_m is relative to the single-task row there.'
    )
  return notes


def _diverged(row: Row) -> str:
  bad = [
    str(run.seed)
    for index, run in enumerate(row.runs)
    if not all(math.isfinite(e.values[index]) for e in row.scores.values())
  ]
  if not bad:
    return ''
  return (
    f'Warning: {row.label} has scores that are not finite (seed '
    f'{", ".join(bad)}).'
  )
