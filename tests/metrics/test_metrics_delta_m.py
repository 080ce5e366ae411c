"""Gains over single-task baselines, against values worked out by hand."""

import math

import pytest

from mtl_jax import metrics

_HIGHER = {'a/accuracy': True, 'b/error': False}


def test_gain_is_positive_where_a_score_is_better_in_either_direction():
  gains = metrics.relative_gain(
    {'a/accuracy': 90.0, 'b/error': 0.3},
    {'a/accuracy': 80.0, 'b/error': 0.4},
    _HIGHER,
  )
  assert gains == pytest.approx({'a/accuracy': 12.5, 'b/error': 25.0})


def test_delta_m_is_minus_the_mean_gain_so_that_lower_is_better():
  # -(12.5 - 50) / 2
  value = metrics.delta_m(
    {'a/accuracy': 90.0, 'b/error': 0.6},
    {'a/accuracy': 80.0, 'b/error': 0.4},
    _HIGHER,
  )
  assert value == pytest.approx(18.75)


def test_delta_m_of_the_baselines_themselves_is_zero():
  scores = {'a/accuracy': 80.0, 'b/error': 0.4}
  assert metrics.delta_m(scores, scores, _HIGHER) == 0


def test_delta_m_does_not_depend_on_the_unit_of_the_scores():
  share = metrics.delta_m({'a': 0.9}, {'a': 0.8}, {'a': True})
  per_cent = metrics.delta_m({'a': 90.0}, {'a': 80.0}, {'a': True})
  assert share == pytest.approx(per_cent)


def test_negative_score_nearer_to_zero_than_its_baseline_is_a_gain():
  gains = metrics.relative_gain({'a': -1.0}, {'a': -2.0}, {'a': True})
  assert gains == {'a': 50.0}


def test_metrics_that_were_not_scored_do_not_count():
  baselines = {'a/accuracy': 80.0, 'b/error': 0.4}
  value = metrics.delta_m({'a/accuracy': 88.0}, baselines, _HIGHER)
  assert value == pytest.approx(-10.0)


@pytest.mark.parametrize('baseline', [0, 0.0, -0.0, math.nan, math.inf])
def test_baseline_without_a_relative_gain_is_an_error(baseline):
  with pytest.raises(ValueError, match=r"baselines\['a'\].*got"):
    metrics.delta_m({'a': 1.0}, {'a': baseline}, {'a': True})


@pytest.mark.parametrize(
  ('baselines', 'higher', 'name'),
  [({}, {'a': True}, 'baselines'), ({'a': 1.0}, {}, 'higher_is_better')],
)
def test_missing_baseline_or_direction_is_an_error(baselines, higher, name):
  with pytest.raises(ValueError, match=f"{name} must have 'a'"):
    metrics.relative_gain({'a': 1.0}, baselines, higher)


def test_mean_over_no_scores_is_an_error():
  with pytest.raises(ValueError, match='scores'):
    metrics.delta_m({}, {'a': 1.0}, {'a': True})
