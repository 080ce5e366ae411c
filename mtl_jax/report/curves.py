"""Figures of test metrics and gradient conflict over the course of training."""

from collections.abc import Mapping
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
import numpy as np

from mtl_jax.report import panels
from mtl_jax.report.estimates import Estimate
from mtl_jax.report.estimates import estimate
from mtl_jax.report.looks import Look
from mtl_jax.report.looks import looks
from mtl_jax.report.summary import Row
from mtl_jax.report.summary import Summary
from mtl_jax.report.units import unit_of

_CONFLICT = {
  'train/conflict': 'loss gradients',
  'train/flat/conflict': 'flat gradients',
}


def learning_curves(summary: Summary) -> Figure:
  """Test metric over epochs, in a panel for the average and one for each task.

  The second half of training sets the limits of the y-axis, because the lines
  are compared after the steep rise.

  Args:
    summary: the rows; a method's line is the mean over its seeds, at the steps
      with an evaluation of all seeds. Its band is the standard error.

  Returns:
    The figure, with the panels of `panels.task_panels`.

  Raises:
    ValueError: if the summary has no row.
  """
  shown = panels.task_panels(summary)
  styles = looks(summary)
  with panels.style():
    figure, axes = panels.grid(len(shown), 2.75, 2.35)
    for ax, (title, keys) in zip(axes, shown, strict=True):
      scale = unit_of(keys[0]).scale
      late = []
      for row in _named_last(summary.rows, styles):
        epochs, points = curve(row, [f'test/{key}' for key in keys])
        if len(epochs):
          means = _draw(ax, row.label, styles[row.label], epochs, points, scale)
          late.append(means[epochs >= 0.5 * epochs[-1]])
      _limit(ax, np.concatenate(late), summary.higher_is_better[keys[0]])
      ax.set_title(title)
      ax.set_ylabel(panels.metric_title(keys[0]))
    _epoch_axes(axes)
    panels.method_legend(figure, summary.rows, styles)
    spread = ', mean over seeds, band: standard error'
    repeated = any(len(row.runs) > 1 for row in summary.rows)
    panels.title(
      figure,
      f'{summary.problem}: {summary.shared_metric or "score"} on test'
      + spread * repeated,
    )
  return figure


def gradient_conflict(summary: Summary) -> Figure | None:
  """Share of task pairs in conflict over epochs, smoothed, mean over seeds.

  Args:
    summary: the rows; one without `train/conflict` in its logs has no line.

  Returns:
    The figure, with a panel for the loss gradients and, if flat methods logged
    it, one for the flat gradients. None if no run logged any.
  """
  curves = {
    key: {row.label: curve(row, [key], smooth=True) for row in summary.rows}
    for key in _CONFLICT
  }
  keys = [
    key
    for key, of in curves.items()
    if any(len(epochs) for epochs, _ in of.values())
  ]
  if not keys:
    return None
  styles = looks(summary)
  drawn = [
    row
    for row in summary.rows
    if any(len(curves[key][row.label][0]) for key in keys)
  ]
  with panels.style():
    figure, axes = panels.grid(len(keys), 3.6, 2.7, sharey=True)
    highest = 0.0
    for ax, key in zip(axes, keys, strict=True):
      for row in _named_last(drawn, styles):
        epochs, points = curves[key][row.label]
        if len(epochs):
          means = _draw(ax, row.label, styles[row.label], epochs, points, 100.0)
          highest = np.nanmax([highest, *means])
      ax.set_title(_CONFLICT[key])
    axes[0].set_ylim(0, min(max(1.15 * highest, 5.0), 102.0))
    axes[0].set_ylabel('pairs with negative\ninner product (%)')
    _epoch_axes(axes)
    panels.method_legend(figure, drawn, styles)
    panels.title(figure, f'{summary.problem}: gradient conflict, running mean')
  return figure


def curve(
  row: Row, keys: Sequence[str], smooth: bool = False
) -> tuple[np.ndarray, list[Estimate]]:
  """A logged value of a method over time.

  Args:
    row: the method.
    keys: entries of the log, whose mean is taken.
    smooth: whether each seed is smoothed before the average.

  Returns:
    The epochs [N] of the steps at which all seeds have all entries, and the
    estimate over seeds at each.
  """
  seeds = []
  epochs: dict[int, float] = {}
  for run in row.runs:
    columns = []
    for key in keys:
      steps, ends, values = run.series(key)
      columns.append(dict(zip(steps, values, strict=True)))
      epochs.update(zip(steps, ends, strict=True))
    steps = sorted(set.intersection(*map(set, columns)))
    means = [sum(column[s] for column in columns) / len(keys) for s in steps]
    if smooth:
      means = panels.smoothed(means).tolist()
    seeds.append(dict(zip(steps, means, strict=True)))
  common = sorted(set.intersection(*map(set, seeds)))
  points = [estimate([seed[step] for seed in seeds]) for step in common]
  return np.array([epochs[step] for step in common]), points


def _draw(
  ax: Axes,
  label: str,
  look: Look,
  epochs: np.ndarray,
  points: Sequence[Estimate],
  scale: float,
) -> np.ndarray:
  """Draws mean and standard error; returns the drawn mean."""
  means = np.array([scale * point.mean for point in points])
  ax.plot(
    epochs,
    means,
    look.line,
    color=look.colour,
    lw=1.5 if look.named else 0.8,
    # A line with one or two points would not be visible.
    marker='o' if len(epochs) < 3 else None,
    ms=4.5,
    mfc=look.colour if look.filled else '#FFFFFF',
    clip_on=len(epochs) >= 3,
    label=label,
  )
  if look.named and points[0].standard_error is not None:
    errors = np.array([scale * point.standard_error for point in points])
    ax.fill_between(
      epochs,
      means - errors,
      means + errors,
      color=look.colour,
      alpha=0.16,
      lw=0,
    )
  return means


def _limit(ax: Axes, late: np.ndarray, higher_is_better: bool) -> None:
  """Shows `late` and some more on the side from which training comes."""
  late = late[np.isfinite(late)]
  if late.size and late.min() < late.max():
    spread = late.max() - late.min()
    before, behind = 0.6 * spread, 0.15 * spread
    if not higher_is_better:
      before, behind = behind, before
    ax.set_ylim(late.min() - before, late.max() + behind)


def _named_last(rows: Sequence[Row], styles: Mapping[str, Look]) -> list[Row]:
  """The grey rows first, so that the others are drawn over them."""
  return sorted(rows, key=lambda row: styles[row.label].named)


def _epoch_axes(axes: Sequence[Axes]) -> None:
  for ax in axes:
    ends = [line.get_xdata()[-1] for line in ax.lines]
    ax.set_xlim(0, max(ends, default=1) or 1)
    panels.round_ticks(ax.xaxis, 5, integer=True)
    panels.round_ticks(ax.yaxis, 6)
    ax.set_xlabel('epoch')
