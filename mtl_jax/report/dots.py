"""The figure of final scores, with a dot for every seed."""

from collections.abc import Mapping
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mtl_jax.report import panels
from mtl_jax.report.estimates import Estimate
from mtl_jax.report.looks import Look
from mtl_jax.report.looks import looks
from mtl_jax.report.published import Published
from mtl_jax.report.summary import Summary
from mtl_jax.report.units import unit_of
from mtl_jax.report.variants import family

_GREY = '#444444'
_MEAN = {'ls': '', 'marker': 'o', 'ms': 5, 'mew': 1.3}
_SEED = {'ls': '', 'marker': 'o', 'ms': 2.6, 'mew': 0}
_PUBLISHED = {'ls': '', 'marker': 'd', 'ms': 4.5, 'mfc': 'none', 'mec': _GREY}
_CONTROL = {'color': '#000000', 'lw': 0.7, 'ls': ':'}


def final_scores(
  summary: Summary, published: Sequence[Published] = ()
) -> Figure:
  """Every seed's score as a dot, with each method's mean and standard error.

  Args:
    summary: the rows, one to a line, in the table's order.
    published: published means to mark.

  Returns:
    The figure, with the panels of `panels.task_panels`.

  Raises:
    ValueError: if the summary has no row.
  """
  shown = panels.task_panels(summary)
  styles = looks(summary)
  rows = summary.rows
  with panels.style():
    height = 0.75 + 0.21 * max(len(rows), 3)
    figure, axes = panels.grid(len(shown), 2.75, height, sharey=True)
    for ax, (title, keys) in zip(axes, shown, strict=True):
      name = 'average' if len(keys) > 1 else keys[0]
      scale = unit_of(keys[0]).scale
      _stripes(ax, [family(row.label) for row in rows])
      for position, row in enumerate(rows):
        score = row.average if len(keys) > 1 else row.scores[keys[0]]
        _dots(ax, position, score, scale, styles[row.label])
        if row.label == 'stl':
          ax.axvline(scale * score.mean, **_CONTROL)
        for source in published:
          value = source.rows.get(row.method, {}).get(name)
          if value is not None:
            ax.plot([value.mean], [position], **_PUBLISHED)
      ax.set_title(title)
      ax.set_xlabel(panels.metric_title(keys[0]))
      panels.round_ticks(ax.xaxis, 4)
      ax.margins(x=0.08)
      ax.grid(axis='y', visible=False)
      ax.tick_params(axis='y', length=0)
    axes[0].set_yticks(range(len(rows)), [row.label for row in rows])
    axes[0].set_ylim(len(rows) - 0.4, -0.6)
    panels.legend_below(figure, _legend(summary, styles, bool(published)))
    panels.title(
      figure,
      f'{summary.problem}: {summary.shared_metric or "score"} on test at the '
      'last evaluation',
    )
  return figure


def _stripes(ax: Axes, families: Sequence[str]) -> None:
  """A pale background behind every other method, plain and flat together."""
  distinct = list(dict.fromkeys(families))
  for position, name in enumerate(families):
    if distinct.index(name) % 2:
      ax.axhspan(
        position - 0.5, position + 0.5, color='#F5F5F5', lw=0, zorder=0
      )


def _dots(
  ax: Axes, position: int, score: Estimate, scale: float, look: Look
) -> None:
  mean = scale * score.mean
  if score.standard_error is not None:
    # Below the mean, so that neither hides the other.
    ax.plot(
      [scale * value for value in score.values],
      [position + 0.27] * len(score.values),
      color=look.colour,
      alpha=0.7,
      **_SEED,
    )
    ax.errorbar(
      mean,
      position,
      xerr=scale * score.standard_error,
      color=look.colour,
      elinewidth=1.4,
      capsize=2.2,
    )
  fill = look.colour if look.filled else '#FFFFFF'
  ax.plot([mean], [position], mfc=fill, mec=look.colour, zorder=3, **_MEAN)


def _legend(
  summary: Summary, styles: Mapping[str, Look], published: bool
) -> list[Line2D]:
  filled = {look.filled for look in styles.values()}
  names = {False: 'mean, plain', True: 'mean, flat'}
  handles = [
    Line2D(
      [],
      [],
      mec=_GREY,
      mfc=_GREY if fill else '#FFFFFF',
      label=names[fill] if len(filled) > 1 else 'mean',
      **_MEAN,
    )
    for fill in sorted(filled)
  ]
  if any(len(row.runs) > 1 for row in summary.rows):
    handles += [
      Line2D([], [], color=_GREY, lw=1.4, label='standard error'),
      Line2D([], [], color=_GREY, label='a seed', **_SEED),
    ]
  if any(row.label == 'stl' for row in summary.rows):
    handles.append(Line2D([], [], label='mean of stl', **_CONTROL))
  if published:
    handles.append(Line2D([], [], label='published', **_PUBLISHED))
  return handles
