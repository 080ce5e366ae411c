"""Means, their spread, and which runs enter them."""

import math

import pytest

from mtl_jax.report.estimates import estimate
from mtl_jax.report.summary import BEST_TEST
from mtl_jax.report.summary import by_problem
from mtl_jax.report.summary import summarise


def _row(summary, label):
  (row,) = [row for row in summary.rows if row.label == label]
  return row


def test_mean_deviation_and_standard_error_are_those_computed_by_hand():
  # Deviations from 0.92 are -0.02, 0 and 0.02: variance 0.0008 / 2.
  value = estimate([0.90, 0.92, 0.94])
  assert value.mean == pytest.approx(0.92)
  assert value.standard_deviation == pytest.approx(0.02)
  assert value.standard_error == pytest.approx(0.02 / math.sqrt(3))


def test_a_single_seed_has_no_spread_at_all():
  value = estimate([0.5])
  assert value.mean == 0.5
  assert value.standard_deviation is None and value.standard_error is None


def test_a_score_that_is_not_finite_spoils_the_mean_visibly():
  value = estimate([0.5, math.inf, 0.7])
  assert math.isnan(value.mean) and math.isnan(value.standard_error)


def test_no_values_is_an_error():
  with pytest.raises(ValueError, match='values'):
    estimate([])


def test_the_average_spreads_as_the_averages_of_seeds_do(make_run):
  # Each task varies over seeds, their average does not.
  runs = [
    make_run('linear', 0, {'a': [0.8], 'b': [0.9]}),
    make_run('linear', 1, {'a': [0.9], 'b': [0.8]}),
  ]
  row = _row(summarise(runs), 'linear')
  assert row.scores['a/accuracy'].standard_error == pytest.approx(0.05)
  assert row.average.mean == pytest.approx(0.85)
  assert row.average.standard_error == pytest.approx(0.0, abs=1e-15)


def test_unfinished_runs_enter_no_mean(make_run):
  runs = [
    make_run('linear', 0, {'a': [0.8]}),
    make_run('linear', 1, {'a': [0.2]}, finished=False),
    make_run('cagrad', 0, {'a': [0.3]}, finished=False),
  ]
  summary = summarise(runs)
  assert [row.label for row in summary.rows] == ['linear']
  assert _row(summary, 'linear').scores['a/accuracy'].values == (0.8,)
  assert [(label, run.seed) for label, run in summary.unfinished] == [
    ('linear', 1),
    ('cagrad', 0),
  ]


def test_a_run_without_an_evaluation_on_test_counts_as_unfinished(make_run):
  run = make_run('linear', 0, {'a': [0.8]})
  bare = type(run)(**{**vars(run), 'lines': run.lines[:1]})
  assert summarise([bare]).rows == ()
  assert summarise([bare]).unfinished == (('linear', bare),)


def test_values_stand_in_the_order_of_seeds(make_run):
  runs = [make_run('linear', seed, {'a': [seed / 10]}) for seed in (2, 0, 1)]
  row = _row(summarise(runs), 'linear')
  assert [run.seed for run in row.runs] == [0, 1, 2]
  assert row.scores['a/accuracy'].values == (0.0, 0.1, 0.2)


def test_the_score_is_the_last_evaluation_even_if_an_earlier_was_better(
  make_run,
):
  run = make_run('linear', 0, {'a': [0.9, 0.6], 'b': [0.9, 0.5]})
  assert _row(summarise([run]), 'linear').average.mean == pytest.approx(0.55)


@pytest.mark.parametrize(
  ('higher_is_better', 'expected'), [(True, (0.9, 0.5)), (False, (0.1, 0.6))]
)
def test_best_test_takes_one_evaluation_for_all_tasks_by_their_average(
  make_run, higher_is_better, expected
):
  # Averages 0.70, 0.35 and 0.50; b alone would choose other evaluations.
  run = make_run(
    'linear',
    0,
    {'a': [0.9, 0.1, 0.2], 'b': [0.5, 0.6, 0.8]},
    higher_is_better=higher_is_better,
  )
  row = _row(summarise([run], BEST_TEST), 'linear')
  means = tuple(row.scores[f'{task}/accuracy'].mean for task in 'ab')
  assert means == expected


def test_best_test_never_takes_an_evaluation_that_is_not_finite(make_run):
  run = make_run('linear', 0, {'a': [None, 0.5, 0.4]})
  row = _row(summarise([run], BEST_TEST), 'linear')
  assert row.scores['a/accuracy'].mean == 0.5


def test_delta_m_is_relative_to_single_task_runs_and_negative_when_better(
  make_run,
):
  runs = [
    make_run('stl', 0, {'a': [0.7], 'b': [0.5]}),
    make_run('stl', 1, {'a': [0.9], 'b': [0.5]}),
    # Against 0.8 and 0.5: 10 % and 20 % better; then 5 % better, 10 % worse.
    make_run('cagrad', 0, {'a': [0.88], 'b': [0.6]}),
    make_run('cagrad', 1, {'a': [0.84], 'b': [0.45]}),
  ]
  summary = summarise(runs)
  change = _row(summary, 'cagrad').delta_m
  assert change.values == pytest.approx((-15.0, 2.5))
  assert change.standard_error == pytest.approx(17.5 / 2)
  assert _row(summary, 'stl').delta_m.mean == pytest.approx(0.0, abs=1e-12)


def test_delta_m_counts_a_lower_error_as_better(make_run):
  runs = [
    make_run('stl', 0, {'a': [0.2]}, higher_is_better=False),
    make_run('cagrad', 0, {'a': [0.1]}, higher_is_better=False),
  ]
  row = _row(summarise(runs), 'cagrad')
  assert row.delta_m.mean == pytest.approx(-50.0)


def test_the_problems_own_baselines_serve_where_no_single_task_run_is_done(
  make_run,
):
  known = {'baselines': {'a/accuracy': 0.5}, 'baselines_source': 'Table 1'}
  runs = [
    make_run('cagrad', 0, {'a': [0.6]}, **known),
    make_run('stl', 0, {'a': [0.9]}, finished=False, **known),
  ]
  summary = summarise(runs)
  assert _row(summary, 'cagrad').delta_m.mean == pytest.approx(-20.0)
  assert summary.baselines_source == 'Table 1'


def test_single_task_runs_are_preferred_to_the_problems_baselines(make_run):
  known = {'baselines': {'a/accuracy': 0.5}, 'baselines_source': 'Table 1'}
  runs = [
    make_run('cagrad', 0, {'a': [0.6]}, **known),
    make_run('stl', 0, {'a': [0.8]}, **known),
  ]
  summary = summarise(runs)
  assert _row(summary, 'cagrad').delta_m.mean == pytest.approx(25.0)
  assert 'stl' in summary.baselines_source


@pytest.mark.parametrize('baseline', [0.0, None])
def test_there_is_no_delta_m_against_a_baseline_of_zero_or_nan(
  make_run, baseline
):
  runs = [
    make_run('stl', 0, {'a': [baseline]}),
    make_run('cagrad', 0, {'a': [0.6]}),
  ]
  assert _row(summarise(runs), 'cagrad').delta_m is None


def test_there_is_no_average_of_different_metrics(make_run):
  metrics = {'a': 'accuracy', 'b': 'abs_err'}
  run = make_run('linear', 0, {'a': [0.8], 'b': [3.0]}, metrics=metrics)
  summary = summarise([run])
  assert summary.shared_metric is None
  assert _row(summary, 'linear').average is None
  with pytest.raises(ValueError, match='best_test'):
    summarise([run], BEST_TEST)


def test_controls_come_first_and_flat_methods_after_their_plain_ones(make_run):
  methods = ['f_pcgrad', 'cagrad', 'f_linear', 'pcgrad', 'stl', 'f_cagrad']
  runs = [make_run(m, 0, {'a': [0.5]}) for m in [*methods, 'linear']]
  assert [row.label for row in summarise(runs).rows] == [
    'stl',
    'linear',
    'f_linear',
    'cagrad',
    'f_cagrad',
    'pcgrad',
    'f_pcgrad',
  ]


def test_different_configs_of_a_method_are_rows_of_their_own_and_warned_of(
  make_run,
):
  runs = [
    make_run(
      'f_cagrad',
      0,
      {'a': [score]},
      folder=f'rho{rho}',
      config={'method': {'flat': {'rho': rho}}, 'seed': 0},
    )
    for rho, score in ((0.05, 0.5), (0.5, 0.7))
  ]
  summary = summarise(runs)
  assert {row.label: row.average.mean for row in summary.rows} == {
    'f_cagrad (rho=0.05)': 0.5,
    'f_cagrad (rho=0.5)': 0.7,
  }
  assert 'method.flat.rho' in ' '.join(summary.warnings)


def test_a_warning_names_what_differs_between_methods(make_run):
  configs = {
    'linear': {'method': {'name': 'linear', 'c': 1}, 'epochs': 10, 'seed': 0},
    'cagrad': {'method': {'name': 'cagrad', 'c': 2}, 'epochs': 20, 'seed': 1},
  }
  runs = [
    make_run(name, 0, {'a': [0.5]}, config=config)
    for name, config in configs.items()
  ]
  (warning,) = summarise(runs).warnings
  assert 'epochs (10 for linear; 20 for cagrad)' in warning
  # What makes the method, and the seed, are no cause for a warning.
  assert 'method' not in warning.replace('methods', '')
  assert 'seed' not in warning


def test_equal_configs_but_for_method_and_seed_give_no_warning(make_run):
  runs = [
    make_run(m, s, {'a': [0.5]}) for m in ('stl', 'cagrad') for s in (0, 1)
  ]
  assert summarise(runs).warnings == ()


def test_runs_of_one_problem_with_other_tasks_are_an_error(make_run):
  runs = [
    make_run('linear', 0, {'a': [0.5]}),
    make_run('linear', 1, {'b': [0.5]}),
  ]
  with pytest.raises(ValueError, match='tasks'):
    summarise(runs)


def test_runs_are_grouped_by_problem(make_run):
  runs = [
    make_run('stl', 0, {'a': [0.5]}, problem='second'),
    make_run('stl', 0, {'a': [0.5]}, problem='first'),
  ]
  groups = by_problem(runs)
  assert list(groups) == ['first', 'second']
  assert groups['second'] == [runs[0]]


def test_wall_time_is_the_median_over_runs(make_run):
  times = {0: 1.0, 1: 100.0, 2: 3.0}
  runs = [
    make_run('stl', seed, {'a': [0.5]}, wall_time_s=time)
    for seed, time in times.items()
  ]
  row = _row(summarise(runs), 'stl')
  assert row.wall_time_s == 3.0
  assert row.steps_per_second == 50.0


def test_an_unknown_selection_is_an_error_that_names_it(make_run):
  with pytest.raises(ValueError, match=r"selection.*'first'"):
    summarise([make_run('stl', 0, {'a': [0.5]})], 'first')
