"""The common style, panels and legend of the figures."""

from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import math
import os
import textwrap

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
import numpy as np

from mtl_jax.report.looks import Look
from mtl_jax.report.looks import OTHERS
from mtl_jax.report.summary import Row
from mtl_jax.report.summary import Summary
from mtl_jax.report.units import titled

_STYLE = {
  'font.size': 9,
  'figure.titlesize': 10,
  'axes.titlesize': 9.5,
  'axes.labelsize': 9,
  'xtick.labelsize': 8,
  'ytick.labelsize': 8,
  'legend.fontsize': 8.5,
  'axes.spines.top': False,
  'axes.spines.right': False,
  'axes.linewidth': 0.7,
  'axes.grid': True,
  'axes.axisbelow': True,
  'axes.formatter.useoffset': False,
  'grid.color': '#E6E6E6',
  'grid.linewidth': 0.6,
  'xtick.major.width': 0.7,
  'ytick.major.width': 0.7,
  'lines.linewidth': 1.5,
  'legend.frameon': False,
}
_DOTS_PER_INCH = 200

# Panels of tasks in a figure, and how many of them show the worst tasks if not
# all fit.
_MOST_TASKS, _WORST_TASKS = 6, 3


def style() -> contextlib.AbstractContextManager[None]:
  """The style of all figures, regardless of the user's own settings."""
  return matplotlib.rc_context({**matplotlib.rcParamsDefault, **_STYLE})


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
  """Writes a figure as PNG with 200 dots per inch."""
  with style():
    figure.savefig(path, format='png', dpi=_DOTS_PER_INCH)


def task_panels(summary: Summary) -> list[tuple[str, list[str]]]:
  """The panels in a figure of scores.

  Args:
    summary: the problem.

  Returns:
    `(title, metrics)`; a panel shows the mean of its metrics. The average comes
    first if there is one. With more than six tasks the panels show the three
    worst and the three best by their mean over methods, or the first six if
    tasks have different metrics.

  Raises:
    ValueError: if the summary has no row.
  """
  if not summary.rows:
    raise ValueError(f'{summary.problem} has no finished run to draw')
  keys = list(summary.first_metrics)
  titles = {key: key.rpartition('/')[0] for key in keys[:_MOST_TASKS]}
  if len(keys) > _MOST_TASKS and summary.shared_metric:
    order = sorted(keys, key=lambda key: _mean_quality(summary, key))
    titles = {
      key: f'{key.rpartition("/")[0]}\n(among the {which})'
      for which, some in (
        ('worst', order[:_WORST_TASKS]),
        ('best', order[_WORST_TASKS - _MOST_TASKS :]),
      )
      for key in some
    }
  panels = [(title, [key]) for key, title in titles.items()]
  if summary.shared_metric and len(keys) > 1:
    panels.insert(0, (f'average of {len(keys)} tasks', keys))
  return panels


def _mean_quality(summary: Summary, key: str) -> float:
  """Mean score of a task over methods, larger for a better one."""
  means = [row.scores[key].mean for row in summary.rows]
  finite = [mean for mean in means if math.isfinite(mean)]
  sign = 1 if summary.higher_is_better[key] else -1
  return sign * math.fsum(finite) / max(len(finite), 1)


def metric_title(key: str) -> str:
  """The metric in `'task/metric'` with its unit."""
  return titled(key.rpartition('/')[2], key)


def grid(
  count: int, width: float, height: float, sharey: bool = False
) -> tuple[Figure, list[Axes]]:
  """A figure with `count` panels, at most four in a row; size in inches."""
  lines = math.ceil(count / 4)
  columns = math.ceil(count / lines)
  size = max(width * columns + 0.4, 4.2), height * lines + 0.6
  figure = Figure(figsize=size, layout='constrained')
  figure.get_layout_engine().set(w_pad=0.1, h_pad=0.06)
  axes = list(
    figure.subplots(lines, columns, squeeze=False, sharey=sharey).flat
  )
  for ax in axes[count:]:
    ax.remove()
  return figure, axes[:count]


def round_ticks(axis: Axis, count: int, integer: bool = False) -> None:
  """About `count` ticks at round numbers."""
  axis.set_major_locator(
    MaxNLocator(count, integer=integer, steps=[1, 2, 2.5, 5, 10])
  )


def title(figure: Figure, text: str) -> None:
  """A title over all panels, broken into lines."""
  figure.suptitle(textwrap.fill(text, int(figure.get_figwidth() / 0.075)))


def method_legend(
  figure: Figure, rows: Sequence[Row], styles: Mapping[str, Look]
) -> None:
  """The lines of the methods, with a flat one below its plain one."""
  handles = [
    Line2D(
      [],
      [],
      color=styles[row.label].colour,
      ls=styles[row.label].line,
      label=row.label,
    )
    for row in rows
    if styles[row.label].named
  ]
  if len(handles) < len(rows):
    label = f'{len(rows) - len(handles)} other methods'
    handles.append(Line2D([], [], color=OTHERS, lw=0.8, label=label))
  legend_below(figure, handles)


def legend_below(figure: Figure, handles: Sequence[Line2D]) -> None:
  """A legend below the panels, with as many columns as fit.

  Columns are filled from the top. With several lines their number is even, and
  the last column is filled up, so that pairs of entries stay together.
  """
  handles = list(handles)
  longest = max(len(str(handle.get_label())) for handle in handles)
  fitting = max(1, int(figure.get_figwidth() / (0.58 + 0.072 * longest)))
  lines = math.ceil(len(handles) / fitting)
  lines += lines % 2 if lines > 1 else 0
  columns = math.ceil(len(handles) / lines)
  # A long legend does not shrink the panels.
  figure.set_figheight(figure.get_figheight() + 0.17 * (lines - 1))
  for _ in range(columns * lines - len(handles)):
    handles.append(Line2D([], [], ls='', label=' '))
  figure.legend(
    handles=handles,
    loc='outside lower center',
    ncols=columns,
    handlelength=2.4,
    columnspacing=1.4,
  )


def smoothed(values: Sequence[float]) -> np.ndarray:
  """A centred running mean over a tenth of the points.

  Args:
    values: [N]; non-finite values do not count.

  Returns:
    [N]; near the ends the mean over fewer values, NaN without any.
  """
  numbers = np.asarray(values, float)
  if not numbers.size:
    return numbers
  window = np.ones(2 * (numbers.size // 20) + 1)
  finite = np.isfinite(numbers)
  total = np.convolve(np.where(finite, numbers, 0.0), window, 'same')
  count = np.convolve(finite.astype(float), window, 'same')
  return np.where(count > 0.5, total / np.maximum(count, 1.0), np.nan)
