"""Figures of the joint update's cost, from the benchmark's JSON.

  python -m benchmarks.plots results/benchmarks/joint_update.json

Writes `<name>_tasks.png` and `<name>_parameters.png` beside the file, or into
`--out`, for the sections that it has.
"""

import argparse
from collections.abc import Sequence
import json
import pathlib
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from benchmarks import records
from mtl_jax.report import looks
from mtl_jax.report import panels

FLAT = 'flat cagrad'
# One colour a library; dashes for plain updates, as in the project's figures.
_COLOURS = {'ours': looks.PALETTE[0], 'pytorch': looks.PALETTE[1]}
_TITLES = {'ours': 'mtl_jax', 'pytorch': 'PyTorch'}
_YARDSTICK = '#000000'
_RATIOS = (1, 2, 5, 10, 20, 50, 100, 200)


def against_tasks(section: dict[str, Any]) -> Figure:
  """Flat over plain against T, with (5T + 1) / 3, in a panel a model.

  Args:
    section: `sections['tasks']` of the JSON.

  Returns:
    The figure.
  """
  names = list(dict.fromkeys(row['model'] for row in section['rows']))
  libraries = _libraries(section['rows'])
  with panels.style():
    figure, axes = panels.grid(len(names), 3.6, 2.8)
    for ax, model in zip(axes, names, strict=True):
      rows = [row for row in section['rows'] if row['model'] == model]
      tasks = sorted({row['tasks'] for row in rows})
      ax.plot(
        tasks,
        [records.yardstick(FLAT, count) for count in tasks],
        ':',
        color=_YARDSTICK,
        lw=1.2,
      )
      for library in libraries:
        _line(ax, _of(rows, library, FLAT), 'tasks', 'ratio_to_plain', library)
      ghost = _of(rows, 'ours', FLAT, 'ghost')
      _line(ax, ghost, 'tasks', 'ratio_to_plain', 'ours', '-.')
      _log(ax, tasks)
      ax.set_title(_title(rows))
      ax.set_xlabel('number of tasks T')
    axes[0].set_ylabel('flat update, in plain updates')
    handles = [
      *(
        Line2D([], [], color=_COLOURS[x], marker='o', ms=4, label=_TITLES[x])
        for x in libraries
      ),
      Line2D([], [], color=_YARDSTICK, ls=':', label='(5T + 1) / 3'),
    ]
    if _of(section['rows'], 'ours', FLAT, 'ghost'):
      handles.insert(
        1,
        Line2D(
          [],
          [],
          color=_COLOURS['ours'],
          ls='-.',
          marker='o',
          ms=4,
          label='mtl_jax, ghost_update',
        ),
      )
    panels.legend_below(figure, handles)
    panels.title(figure, f'Cost against tasks, F-CAGrad ({_where(section)})')
  return figure


def against_parameters(section: dict[str, Any]) -> Figure:
  """Time of a step, and flat over plain, against the number of parameters.

  Args:
    section: `sections['parameters']` of the JSON.

  Returns:
    The figure: lines join the MLPs, other models are labelled points.
  """
  rows = section['rows']
  libraries = _libraries(rows)
  with panels.style():
    figure, (left, right) = panels.grid(2, 3.6, 2.8)
    for library in libraries:
      for method in (FLAT, 'plain'):
        _sizes(left, _of(rows, library, method), 'median_ms', library)
      _sizes(right, _of(rows, library, FLAT), 'ratio_to_plain', library)
    _name_models(left, rows, 'median_ms')
    flat = [row for row in rows if row['method'] == FLAT]
    _name_models(right, flat, 'ratio_to_plain')
    counts = {row['tasks'] for row in rows}
    for count in counts:
      right.axhline(
        records.yardstick(FLAT, count), color=_YARDSTICK, ls=':', lw=1.2
      )
    for ax in (left, right):
      ax.set_xscale('log')
      ax.set_xlabel('parameters')
    left.set_yscale('log')
    left.set_ylabel('time of a step (ms)')
    right.set_ylabel('flat update, in plain updates')
    for ax in (left, right):
      ax.margins(x=0.1, y=0.12)
    right.set_ylim(bottom=0)
    handles = [
      Line2D([], [], color=_COLOURS[x], ls=line, label=f'{_TITLES[x]}, {kind}')
      for x in libraries
      for line, kind in (('-', 'flat'), ('--', 'plain'))
    ]
    handles.append(
      Line2D([], [], color=_YARDSTICK, ls=':', label='(5T + 1) / 3')
    )
    panels.legend_below(figure, handles)
    panels.title(
      figure,
      f'Cost against parameters, F-CAGrad, T = 2 ({_where(section)}); '
      'lines join MLPs',
    )
  return figure


def _libraries(rows):
  there = {row['library'] for row in rows}
  return [library for library in _COLOURS if library in there]


def _of(rows, library, method, engine='auto'):
  wanted = library, method, engine
  keys = 'library', 'method', 'engine'
  return [row for row in rows if tuple(row[key] for key in keys) == wanted]


def _line(
  ax: Axes,
  rows: Sequence[dict],
  x: str,
  y: str,
  library: str,
  style: str | None = None,
) -> None:
  rows = sorted((row for row in rows if y in row), key=lambda row: row[x])
  plain = bool(rows) and rows[0]['method'] == 'plain'
  ax.plot(
    [row[x] for row in rows],
    [row[y] for row in rows],
    style or ('--' if plain else '-'),
    color=_COLOURS[library],
    marker='o',
    ms=4,
  )


def _sizes(ax: Axes, rows: Sequence[dict], y: str, library: str) -> None:
  """A line through the MLPs; the other models as markers."""
  _line(
    ax, [row for row in rows if row['model'] == 'mlp'], 'parameters', y, library
  )
  for row in rows:
    if row['model'] == 'mlp' or y not in row:
      continue
    plain = row['method'] == 'plain'
    ax.plot(
      row['parameters'],
      row[y],
      ls='',
      marker='D',
      ms=5,
      mec=_COLOURS[library],
      mfc='#FFFFFF' if plain else _COLOURS[library],
    )


def _name_models(ax: Axes, rows: Sequence[dict], y: str) -> None:
  """Names above the highest markers of models that no line joins."""
  drawn = [row for row in rows if row['model'] != 'mlp' and y in row]
  for model in dict.fromkeys(row['model'] for row in drawn):
    highest = max(
      (row for row in drawn if row['model'] == model), key=lambda row: row[y]
    )
    ax.annotate(
      model,
      (highest['parameters'], highest[y]),
      xytext=(0, 6),
      textcoords='offset points',
      ha='center',
      fontsize=7.5,
    )


def _log(ax: Axes, ticks: Sequence[int]) -> None:
  ax.set_xscale('log')
  ax.set_yscale('log')
  ax.set_xticks(ticks, [str(tick) for tick in ticks])
  low, high = ax.get_ylim()
  ratios = [ratio for ratio in _RATIOS if low <= ratio <= high]
  ax.set_yticks(ratios, [str(ratio) for ratio in ratios])
  for axis in (ax.xaxis, ax.yaxis):
    axis.set_minor_locator(NullLocator())


def _title(rows):
  return rows[0]['case'].replace(f', T={rows[0]["tasks"]}', '')


def _where(section):
  machine = section['machine']
  if machine['backend'] == 'cpu':
    return f'CPU, {machine["cores"]} cores'
  return f'{machine["num_devices"]} x {machine["device"]}'


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('result', type=pathlib.Path)
  parser.add_argument('--out', type=pathlib.Path, help='a folder')
  args = parser.parse_args()

  sections = json.loads(args.result.read_text())['sections']
  folder = args.out or args.result.parent
  folder.mkdir(parents=True, exist_ok=True)
  for name, draw in (
    ('tasks', against_tasks),
    ('parameters', against_parameters),
  ):
    if name in sections:
      path = folder / f'{args.result.stem}_{name}.png'
      panels.save(draw(sections[name]), path)
      print(path)


if __name__ == '__main__':
  main()
