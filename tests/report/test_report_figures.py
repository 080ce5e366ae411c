"""What the figures show, told by their axes, lines and labels."""

import numpy as np
import pytest

from mtl_jax.report import looks
from mtl_jax.report import panels
from mtl_jax.report.curves import curve
from mtl_jax.report.curves import gradient_conflict
from mtl_jax.report.curves import learning_curves
from mtl_jax.report.dots import final_scores
from mtl_jax.report.published import Published
from mtl_jax.report.published import Value
from mtl_jax.report.summary import summarise


def _lines(ax):
  return {line.get_label(): line for line in ax.lines}


def _legend(figure):
  (legend,) = figure.legends
  return [
    text.get_text() for text in legend.get_texts() if text.get_text().strip()
  ]


@pytest.fixture
def summary(make_run):
  left = {'stl': 0.8, 'linear': 0.7, 'cagrad': 0.75, 'f_cagrad': 0.85}
  return summarise(
    [
      make_run(
        method,
        seed,
        {
          'left': [0.1, 0.5, score, score + seed / 100],
          'right': [0.2, 0.4, 0.6, 0.6],
        },
        conflict=None if method == 'stl' else [0.5, 0.5, 0.25, 0.25],
        flat_conflict=[0.1] * 4 if method == 'f_cagrad' else None,
      )
      for method, score in left.items()
      for seed in (0, 1, 2)
    ]
  )


def test_learning_curves_have_a_panel_for_the_average_and_for_each_task(
  summary,
):
  figure = learning_curves(summary)
  titles = [ax.get_title() for ax in figure.axes]
  assert titles == ['average of 2 tasks', 'left', 'right']
  for ax in figure.axes:
    assert list(_lines(ax)) == ['stl', 'linear', 'cagrad', 'f_cagrad']
    assert ax.get_xlabel() == 'epoch' and ax.get_ylabel() == 'accuracy (%)'


def test_a_learning_curve_is_the_mean_over_seeds_in_per_cent(summary):
  average, left, _ = learning_curves(summary).axes
  np.testing.assert_array_equal(_lines(left)['stl'].get_xdata(), [1, 2, 3, 4])
  np.testing.assert_allclose(
    _lines(left)['stl'].get_ydata(), [10.0, 50.0, 80.0, 81.0]
  )
  np.testing.assert_allclose(
    _lines(average)['stl'].get_ydata(), [15.0, 45.0, 70.0, 70.5]
  )


def test_the_band_of_a_learning_curve_is_the_standard_error(summary):
  _, left, _ = learning_curves(summary).axes
  (band,) = left.collections[0].get_paths()
  last = band.vertices[band.vertices[:, 0] == 4][:, 1]
  # Seeds end at 80, 81 and 82: standard error 1 / sqrt(3).
  assert last.max() == pytest.approx(81 + 1 / np.sqrt(3))
  assert last.min() == pytest.approx(81 - 1 / np.sqrt(3))


def test_single_seeds_have_no_band(make_run):
  run = make_run('linear', 0, {'a': [0.1, 0.2, 0.3]})
  (ax,) = learning_curves(summarise([run])).axes
  assert len(ax.collections) == 0


def test_the_end_of_every_curve_is_within_the_panel(summary):
  for ax in learning_curves(summary).axes:
    low, high = ax.get_ylim()
    for line in ax.lines:
      assert low < line.get_ydata()[-1] < high


@pytest.mark.parametrize('draw', [learning_curves, gradient_conflict])
def test_a_flat_method_is_solid_and_its_plain_one_dashed_in_one_hue(
  summary, draw
):
  lines = _lines(draw(summary).axes[0])
  assert lines['cagrad'].get_color() == lines['f_cagrad'].get_color()
  assert lines['cagrad'].get_linestyle() == '--'
  assert lines['f_cagrad'].get_linestyle() == '-'
  assert lines['linear'].get_color() != lines['cagrad'].get_color()


def test_a_method_has_one_colour_in_all_figures(summary):
  figures = learning_curves(summary), gradient_conflict(summary)
  styles = looks.looks(summary)
  for figure in figures:
    for label, line in _lines(figure.axes[0]).items():
      assert line.get_color() == styles[label].colour


def test_lines_are_solid_where_there_is_no_flat_method(make_run):
  runs = [make_run(name, 0, {'a': [0.5]}) for name in ('linear', 'cagrad')]
  assert {look.line for look in looks.looks(summarise(runs)).values()} == {'-'}


def test_conflict_is_shown_in_per_cent_for_the_methods_that_logged_it(summary):
  loss, flat = gradient_conflict(summary).axes
  assert list(_lines(loss)) == ['linear', 'cagrad', 'f_cagrad']
  assert list(_lines(flat)) == ['f_cagrad']
  np.testing.assert_allclose(
    _lines(loss)['linear'].get_ydata(), [50.0, 50.0, 25.0, 25.0]
  )
  np.testing.assert_allclose(_lines(flat)['f_cagrad'].get_ydata(), [10.0] * 4)


def test_there_is_no_conflict_figure_where_no_run_logged_any(make_run):
  assert gradient_conflict(summarise([make_run('stl', 0, {'a': [1]})])) is None


def test_smoothing_is_a_mean_over_a_tenth_of_the_points():
  values = np.zeros(40)
  values[20] = 5.0
  smooth = panels.smoothed(values)
  np.testing.assert_allclose(smooth[18:23], 1.0)
  assert smooth[17] == smooth[23] == 0.0
  np.testing.assert_allclose(panels.smoothed(np.full(40, 0.3)), 0.3)


def test_smoothing_leaves_out_what_is_not_finite():
  values = np.full(40, 0.3)
  values[20] = np.nan
  np.testing.assert_allclose(panels.smoothed(values), 0.3)


def test_a_curve_keeps_to_the_steps_that_all_seeds_have(make_run):
  runs = [
    make_run('linear', 0, {'a': [0.1, 0.2, 0.3]}),
    make_run('linear', 1, {'a': [0.3, 0.4]}),
  ]
  runs = [type(run)(**{**vars(run), 'config': {}}) for run in runs]
  (row,) = summarise(runs).rows
  epochs, points = curve(row, ['test/a/accuracy'])
  np.testing.assert_array_equal(epochs, [1, 2])
  np.testing.assert_allclose([point.mean for point in points], [0.2, 0.3])


def test_final_scores_have_a_line_a_method_and_a_dot_a_seed(summary):
  figure = final_scores(summary)
  assert len(figure.axes) == 3
  labels = [tick.get_text() for tick in figure.axes[0].get_yticklabels()]
  assert labels == ['stl', 'linear', 'cagrad', 'f_cagrad']
  low, high = figure.axes[0].get_ylim()
  assert low > high
  seeds = [line for line in figure.axes[1].lines if len(line.get_xdata()) == 3]
  assert len(seeds) == 4
  np.testing.assert_allclose(seeds[0].get_xdata(), [80.0, 81.0, 82.0])


def test_published_means_are_marked_in_the_unit_of_the_panel(summary):
  values = {'left/accuracy': Value(77.7, 0.1), 'average': Value(66.6, None)}
  published = [Published('A paper', {'cagrad': values})]
  average, left, right = final_scores(summary, published).axes
  marks = [
    [
      line.get_xydata().tolist()
      for line in ax.lines
      if line.get_marker() == 'd'
    ]
    for ax in (average, left, right)
  ]
  assert marks == [[[[66.6, 2.0]]], [[[77.7, 2.0]]], []]


def test_of_many_tasks_the_worst_and_best_are_shown_with_the_average(make_run):
  scores = {f'task{i:02d}': [(i * 7 % 40) / 40] for i in range(40)}
  summary = summarise([make_run('linear', 0, scores)])
  titles = [ax.get_title() for ax in final_scores(summary).axes]
  assert len(titles) == 7 and titles[0] == 'average of 40 tasks'
  # 7 i modulo 40 is 0, 1, 2 for i = 0, 23, 6 and 37, 38, 39 for 11, 34, 17.
  assert [title.split('\n')[0] for title in titles[1:]] == [
    *('task00', 'task23', 'task06'),
    *('task11', 'task34', 'task17'),
  ]


def test_of_forty_methods_the_best_have_colours_and_all_are_drawn(make_run):
  names = ['stl', 'linear', *(f'method{i:02d}' for i in range(38))]
  runs = [
    make_run(name, 0, {'a': [0.1, i / 50 + 0.1], 'b': [0.2, 0.3]})
    for i, name in enumerate(names)
  ]
  summary = summarise(runs)
  figure = learning_curves(summary)
  assert len(figure.axes[0].lines) == 40
  named = ['stl', 'linear', *names[-8:]]
  assert _legend(figure) == [*named, '30 other methods']
  styles = looks.looks(summary)
  assert len({styles[name].colour for name in named}) == 10
  rows = final_scores(summary).axes[0].get_yticklabels()
  assert [tick.get_text() for tick in rows] == [
    row.label for row in summary.rows
  ]


def test_legends_do_not_cover_a_panel(summary):
  for figure in (learning_curves(summary), final_scores(summary)):
    figure.draw_without_rendering()
    box = figure.legends[0].get_window_extent()
    for ax in figure.axes:
      assert not box.overlaps(ax.get_tightbbox())


def test_a_summary_without_a_finished_run_cannot_be_drawn(make_run):
  empty = summarise([make_run('stl', 0, {'a': [0.1]}, finished=False)])
  for draw in (learning_curves, final_scores):
    with pytest.raises(ValueError, match='no finished run'):
      draw(empty)
