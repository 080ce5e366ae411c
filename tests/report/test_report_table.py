"""The table as Markdown and CSV, with published rows beside ours."""

import csv
import io
import json

import pytest

from mtl_jax.report.published import read_published
from mtl_jax.report.summary import BEST_TEST
from mtl_jax.report.summary import summarise
from mtl_jax.report.table import csv_text
from mtl_jax.report.table import markdown


def _cells(text):
  """The cells of the first table as dicts, by the first cell of the row."""
  lines = [line for line in text.splitlines() if line.startswith('|')]
  rows = [[c.strip() for c in line.strip('|').split('|')] for line in lines]
  header = rows[0]
  return {row[0]: dict(zip(header, row, strict=True)) for row in rows[2:]}


@pytest.fixture
def runs(make_run):
  return [
    make_run('stl', 0, {'left': [0.80], 'right': [0.60]}),
    make_run('stl', 1, {'left': [0.80], 'right': [0.60]}),
    make_run('cagrad', 0, {'left': [0.90], 'right': [0.60]}),
    make_run('cagrad', 1, {'left': [0.94], 'right': [0.66]}),
    make_run('f_cagrad', 0, {'left': [0.84], 'right': [0.63]}),
  ]


def test_accuracies_stand_in_per_cent_with_their_standard_error(runs):
  row = _cells(markdown(summarise(runs)))['cagrad']
  assert row['left (%)'] == '92.00 ± 2.00'
  assert row['right (%)'] == '63.00 ± 3.00'
  assert row['average (%)'] == '77.50 ± 2.50'
  # Changes of -12.5 and 0 %, then -17.5 and -10 %.
  assert row['delta_m (%)'] == '-10.00 ± 3.75'
  assert row['seeds'] == '2'


def test_a_single_seed_shows_a_dash_for_its_standard_error(runs):
  row = _cells(markdown(summarise(runs)))['f_cagrad']
  assert row['left (%)'] == '84.00 ± -'
  assert row['delta_m (%)'] == '-5.00 ± -'


def test_the_columns_of_the_table_line_up(runs):
  lines = [
    line
    for line in markdown(summarise(runs)).splitlines()
    if line.startswith('|')
  ]
  bars = [[i for i, c in enumerate(line) if c == '|'] for line in lines]
  assert len(lines) == 5
  assert all(positions == bars[0] for positions in bars)


def test_the_text_above_says_which_sign_of_delta_m_is_better(runs):
  above = markdown(summarise(runs)).split('|')[0]
  assert 'negative is better' in above
  assert 'mean of stl over its seeds' in above


def test_unfinished_runs_are_listed_below_with_their_last_step(runs, make_run):
  late = make_run('pcgrad', 7, {'left': [0.1], 'right': [0.1]}, finished=False)
  text = markdown(summarise([*runs, late]))
  assert 'pcgrad' not in _cells(text)
  assert 'pcgrad seed 7, at step 10 of 1000' in text
  assert str(late.directory) in text


def test_a_table_of_unfinished_runs_alone_says_so(make_run):
  run = make_run('stl', 0, {'a': [0.1]}, finished=False)
  text = markdown(summarise([run]))
  assert 'No finished run' in text and 'at step 10' in text


def test_only_the_best_test_table_is_labelled_so(runs):
  label = 'not a protocol we recommend'
  assert label in markdown(summarise(runs, BEST_TEST))
  assert label not in markdown(summarise(runs))


def test_warnings_and_different_devices_are_told_below(runs, make_run):
  other = make_run(
    'linear',
    0,
    {'left': [0.5], 'right': [0.5]},
    device='TPU v4',
    config={'method': {'name': 'linear'}, 'epochs': 99},
  )
  text = markdown(summarise([*runs, other]))
  assert 'Warning' in text and 'epochs' in text
  assert 'cpu, TPU v4' in text or 'TPU v4, cpu' in text


def test_a_score_that_is_not_finite_is_shown_and_warned_of(make_run):
  runs = [
    make_run('linear', seed, {'a': [score], 'b': [0.5]})
    for seed, score in ((3, 0.5), (4, None))
  ]
  text = markdown(summarise(runs))
  assert _cells(text)['linear']['a (%)'] == 'nan ± nan'
  assert 'not finite (seed 4)' in text


def test_other_metrics_show_direction_and_four_significant_digits(make_run):
  run = make_run(
    'linear',
    0,
    {'depth': [0.01254]},
    metric='abs_err',
    higher_is_better=False,
  )
  more = make_run(
    'linear',
    0,
    {'depth': [0.01254], 'normal': [19.21]},
    metrics={'depth': 'abs_err', 'normal': 'angle'},
    higher_is_better=False,
    folder='more',
  )
  assert _cells(markdown(summarise([run])))['linear']['depth'] == '0.01254 ± -'
  row = _cells(markdown(summarise([more])))['linear']
  assert row['depth abs_err ↓'] == '0.01254 ± -'
  assert row['normal angle ↓'] == '19.21 ± -'


def test_many_tasks_are_rows_of_a_second_table(make_run):
  scores = {f'task{i:02d}': [i / 100] for i in range(40)}
  runs = [make_run(name, 0, scores) for name in ('linear', 'cagrad')]
  text = markdown(summarise(runs))
  first, second = text.split('| task')[0], '| task' + text.split('| task', 1)[1]
  assert 'task00' not in first
  rows = _cells(second)
  assert len(rows) == 40
  assert rows['task07 (%)']['cagrad'] == '7.00 ± -'


def test_times_are_shown_in_a_unit_that_fits(make_run):
  run = make_run('linear', 0, {'a': [0.5]}, wall_time_s=7200.0)
  row = _cells(markdown(summarise([run])))['linear']
  assert row['wall time (min)'] == '120'


def test_the_csv_reads_back_as_the_very_numbers(runs):
  summary = summarise(runs)
  rows = list(csv.DictReader(io.StringIO(csv_text(summary))))
  assert [row['method'] for row in rows] == ['stl', 'cagrad', 'f_cagrad']
  for text, row in zip(rows, summary.rows, strict=True):
    assert int(text['seeds']) == len(row.runs)
    for key, value in [*row.scores.items(), ('average', row.average)]:
      assert float(text[key]) == value.mean
      error = text[f'{key} standard_error']
      assert (float(error) if error else None) == value.standard_error
    assert float(text['delta_m_percent']) == row.delta_m.mean
    assert float(text['wall_time_s']) == row.wall_time_s
  assert rows[2]['left/accuracy standard_error'] == ''


@pytest.fixture
def published_file(tmp_path):
  def write(content):
    path = tmp_path / 'published.json'
    path.write_text(json.dumps(content))
    return path

  return write


def test_published_rows_stand_below_ours_in_the_same_columns(
  runs, published_file
):
  path = published_file(
    {
      'source': 'A paper, Table 1',
      'group': {
        'two_tasks': {
          'stl': {'task_1': [80.0, 0.3], 'right': 60, 'average': 70},
          'cagrad': {'task_1': [88.0, 0.1], 'right': 63, 'average': [75.5, 1]},
          'nash_mtl': {'task_1': 1, 'task_2': 2},
        },
        'another': {'cagrad': {'task_1': 1}},
      },
    }
  )
  summary = summarise(runs)
  text = markdown(summary, [read_published(path, summary)])
  rows = _cells(text)
  row = rows['cagrad, published']
  assert row['left (%)'] == '88.00 ± 0.10'
  assert row['right (%)'] == '63.00 ± -'
  assert row['average (%)'] == '75.50 ± 1.00'
  # 10 % and 5 % better than the published single-task row.
  assert row['delta_m (%)'] == '-7.50'
  assert 'A paper, Table 1' in text
  assert not any('nash_mtl' in label for label in rows)


def test_a_file_without_the_problem_has_nothing_to_show(runs, published_file):
  path = published_file({'source': 'A paper', 'another': {'stl': {'left': 1}}})
  assert read_published(path, summarise(runs)) is None


@pytest.mark.parametrize(
  ('content', 'match'),
  [
    ({'two_tasks': {}}, 'source'),
    ([1], 'source'),
    ({'source': '', 'two_tasks': {'stl': {'left': 'high'}}}, 'stl/left'),
    ({'source': '', 'two_tasks': {'stl': {'left': [1, 2, 3]}}}, 'stl/left'),
  ],
)
def test_a_published_file_of_another_form_is_an_error_that_names_it(
  runs, published_file, content, match
):
  with pytest.raises(ValueError, match=match) as error:
    read_published(published_file(content), summarise(runs))
  assert 'published.json' in str(error.value)
