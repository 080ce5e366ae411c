"""The result file that a number in the README comes from."""

import json
import math

import pytest

from mtl_jax.report.results import dumps
from mtl_jax.report.results import result
from mtl_jax.report.summary import BEST_TEST
from mtl_jax.report.summary import summarise


def _result(runs, **kwargs):
  tree = result(summarise(runs), command='the command', **kwargs)
  return json.loads(dumps(tree))


@pytest.fixture
def runs(make_run):
  config = {'epochs': 10, 'method': {'name': 'stl'}}
  flat = {'epochs': 10, 'method': {'name': 'f_cagrad', 'rho': 0.05}}
  return [
    make_run('stl', 1, {'a': [0.8, 0.7]}, config={**config, 'seed': 1}),
    make_run('stl', 0, {'a': [0.4, 0.5]}, config={**config, 'seed': 0}),
    make_run('f_cagrad', 5, {'a': [0.9, 0.9]}, config={**flat, 'seed': 5}),
  ]


def test_a_method_has_its_seeds_and_the_values_computed_by_hand(runs):
  stl = _result(runs)['methods']['stl']
  assert stl['seeds'] == [0, 1]
  score = stl['a/accuracy']
  assert score['values'] == [0.5, 0.7]
  assert score['mean'] == pytest.approx(0.6)
  assert score['standard_deviation'] == pytest.approx(math.sqrt(0.02))
  assert score['standard_error'] == pytest.approx(0.1)
  assert stl['average']['mean'] == pytest.approx(0.6)
  assert stl['wall_time_s'] == [2.0, 2.0]
  assert stl['steps'] == 20


def test_a_single_seed_has_null_for_its_spread(runs):
  score = _result(runs)['methods']['f_cagrad']['a/accuracy']
  assert score['standard_error'] is None
  assert score['standard_deviation'] is None


def test_configs_are_split_into_what_is_common_and_what_differs(runs):
  assert _result(runs)['config'] == {
    'common': {'epochs': 10},
    'methods': {
      'stl': {'method.name': 'stl'},
      'f_cagrad': {'method.name': 'f_cagrad', 'method.rho': 0.05},
    },
  }


def test_what_the_runs_agree_on_is_one_value(runs):
  tree = _result(runs)
  assert tree['device'] == 'cpu' and tree['commit'] == 'abc'
  assert tree['versions'] == {'jax': '0.10.2', 'numpy': '2.4.6'}
  assert tree['problem'] == 'two_tasks'
  assert tree['command'] == 'the command'


def test_what_the_runs_disagree_on_is_listed(make_run):
  runs = [
    make_run('stl', 0, {'a': [0.5]}),
    make_run(
      'stl',
      1,
      {'a': [0.5]},
      commit='def',
      device='TPU v4',
      versions={'jax': '0.12.0', 'numpy': '2.4.6'},
    ),
  ]
  tree = _result(runs)
  assert tree['commit'] == ['abc', 'def']
  assert tree['device'] == ['TPU v4', 'cpu']
  assert tree['versions'] == {'jax': ['0.10.2', '0.12.0'], 'numpy': '2.4.6'}


def test_the_best_test_epoch_is_there_only_when_asked_for(runs):
  assert 'best_test' not in _result(runs)['methods']['stl']
  tree = _result(runs, best_test=summarise(runs, BEST_TEST))
  assert tree['methods']['stl']['best_test']['a/accuracy']['values'] == [
    0.5,
    0.8,
  ]
  assert tree['methods']['stl']['a/accuracy']['values'] == [0.5, 0.7]


def test_a_score_that_is_not_finite_is_null(make_run):
  tree = _result([make_run('stl', 0, {'a': [None]})])
  score = tree['methods']['stl']['a/accuracy']
  assert score['mean'] is None and score['values'] == [None]


def test_unfinished_runs_and_warnings_are_kept(runs, make_run):
  late = make_run('linear', 3, {'a': [0.1]}, finished=False)
  tree = _result([*runs, late], notes=['a broken line'])
  assert tree['unfinished'] == [{'method': 'linear', 'seed': 3, 'step': 10}]
  assert 'a broken line' in tree['warnings']
  assert 'linear' not in tree['methods']


def test_the_text_does_not_depend_on_the_order_of_the_runs(runs):
  texts = {
    dumps(result(summarise(order), command='x')) for order in (runs, runs[::-1])
  }
  assert len(texts) == 1


def test_lists_of_numbers_take_one_line():
  tree = {'a': {'b': [1, 2], 'c': {'d': None, 'e': 'ü'}}, 'f': [[1], [2]]}
  text = dumps(tree)
  assert json.loads(text) == tree
  assert text.splitlines() == [
    '{',
    '  "a": {',
    '    "b": [1, 2],',
    '    "c": {"d": null, "e": "ü"}',
    '  },',
    '  "f": [',
    '    [1],',
    '    [2]',
    '  ]',
    '}',
  ]
