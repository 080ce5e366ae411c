"""Finding and reading run directories."""

import json
import math

import pytest

from mtl_jax.report.runs import flatten
from mtl_jax.report.runs import read_run
from mtl_jax.report.runs import read_runs

_SCORES = {'a': [0.5, 0.6], 'b': [0.7, 0.8]}


def _edit(path, edit):
  path.write_text(edit(path.read_text()))


def test_runs_are_found_at_any_depth_below_any_of_the_directories(
  write_run, tmp_path
):
  first = write_run('stl', 0, _SCORES, folder='one')
  second = write_run('linear', 0, _SCORES, folder='two/three/four')
  runs, notes = read_runs([tmp_path / 'one', tmp_path / 'two'])
  assert [run.directory for run in runs] == [first, second]
  assert notes == []


def test_a_run_below_two_of_the_directories_is_read_once(write_run, tmp_path):
  directory = write_run('stl', 0, _SCORES)
  runs, _ = read_runs([tmp_path, directory, directory.parent])
  assert len(runs) == 1


def test_files_in_checkpoints_are_not_taken_for_runs(write_run, tmp_path):
  directory = write_run('stl', 0, _SCORES)
  write_run('stl', 1, _SCORES, folder=f'{directory}/checkpoints/10')
  runs, _ = read_runs([tmp_path])
  assert [run.seed for run in runs] == [0]


def test_no_run_is_an_error_that_says_where_and_what_was_looked_for(tmp_path):
  with pytest.raises(ValueError) as error:
    read_runs([tmp_path])
  for part in (str(tmp_path), 'run.json', 'metrics.jsonl'):
    assert part in str(error.value)


def test_a_directory_that_does_not_exist_is_named(tmp_path):
  with pytest.raises(ValueError, match='nowhere'):
    read_runs([tmp_path / 'nowhere'])


def test_a_folder_with_half_of_a_run_is_left_out_and_named(write_run, tmp_path):
  write_run('stl', 0, _SCORES)
  half = write_run('linear', 0, _SCORES)
  (half / 'metrics.jsonl').unlink()
  runs, (note,) = read_runs([tmp_path])
  assert [run.method for run in runs] == ['stl']
  assert str(half) in note and 'metrics.jsonl' in note


def test_a_broken_last_line_is_ignored_and_mentioned(write_run, tmp_path):
  directory = write_run('stl', 0, _SCORES)
  _edit(directory / 'metrics.jsonl', lambda text: text[:-9])
  (run,), (note,) = read_runs([tmp_path])
  assert run.evaluations[-1]['test/a/accuracy'] == 0.5
  assert 'line 4' in note and str(directory / 'metrics.jsonl') in note


@pytest.mark.parametrize('broken', ['{"step": 1', '[1, 2]', '{"loss": 1}', ''])
def test_a_broken_line_elsewhere_is_an_error_with_file_and_line(
  write_run, broken
):
  log = write_run('stl', 0, _SCORES) / 'metrics.jsonl'
  lines = log.read_text().splitlines()
  log.write_text('\n'.join([lines[0], broken, *lines[2:]]) + '\n')
  with pytest.raises(ValueError) as error:
    read_run(log.parent)
  assert str(log) in str(error.value) and 'line 2' in str(error.value)


def test_a_null_in_the_log_is_a_number_that_is_not_finite(make_run):
  run = make_run('stl', 0, {'a': [0.5, None], 'b': [0.7, 0.8]})
  _, _, values = run.series('test/a/accuracy')
  assert values[0] == 0.5 and math.isnan(values[1])


@pytest.mark.parametrize('name', ['run.json', 'config.json'])
def test_a_damaged_json_file_is_named(write_run, name):
  path = write_run('stl', 0, _SCORES) / name
  _edit(path, lambda text: text[:20])
  with pytest.raises(ValueError, match=name):
    read_run(path.parent)


def test_a_missing_entry_of_the_record_is_named(write_run):
  path = write_run('stl', 0, _SCORES) / 'run.json'
  record = json.loads(path.read_text())
  del record['tasks']
  path.write_text(json.dumps(record))
  with pytest.raises(ValueError, match=r"run\.json has no entry 'tasks'"):
    read_run(path.parent)


def test_a_run_is_of_the_config_in_its_record_not_of_config_json(write_run):
  directory = write_run('cagrad', 0, _SCORES)
  record = json.loads((directory / 'run.json').read_text())
  trained = {'method': {'name': 'cagrad', 'c': 0.4}}
  other = {'method': {'name': 'linear', 'c': 0.5}}
  (directory / 'config.json').write_text(json.dumps(other))
  # Of an older run, of which the record has no config.
  with pytest.raises(ValueError, match=r"'cagrad'.*config is of 'linear'"):
    read_run(directory)
  (directory / 'run.json').write_text(json.dumps({**record, 'config': trained}))
  assert read_run(directory).config == flatten(trained)


def test_scores_from_before_a_change_of_the_config_do_not_count(
  write_run, tmp_path
):
  scores = {'a': [0.9, 0.6], 'b': [0.9, 0.8]}
  changes = [{'step': 10, 'changes': ['optimizer.clip: null there, 1.0 now']}]
  write_run('stl', 0, scores, config_changes=changes)
  longer = [{'step': 10, 'changes': ['epochs: 1 there, 2 now']}]
  write_run('stl', 1, scores, config_changes=longer)
  (changed, same), (note,) = read_runs([tmp_path])
  assert [line['step'] for line in changed.evaluations] == [20]
  assert [line['step'] for line in same.evaluations] == [10, 20]
  assert 'from step 10 on optimizer.clip: null there, 1.0 now' in note


def test_one_method_and_seed_twice_with_one_config_names_both(
  write_run, tmp_path
):
  first = write_run('stl', 0, _SCORES, folder='first')
  second = write_run('stl', 0, _SCORES, folder='second')
  with pytest.raises(ValueError) as error:
    read_runs([tmp_path])
  assert str(first) in str(error.value) and str(second) in str(error.value)


def test_places_of_files_do_not_make_two_configs_of_one(write_run, tmp_path):
  for folder in ('first', 'second'):
    config = {'seed': 0, 'data': {'data_dir': folder}}
    write_run('stl', 0, _SCORES, folder=folder, config=config)
  with pytest.raises(ValueError, match='run twice'):
    read_runs([tmp_path])


def test_the_first_metric_of_each_task_is_the_one_named_first(make_run):
  metrics = {
    'b/loss': {'higher_is_better': False},
    'a/accuracy': {'higher_is_better': True},
    'b/accuracy': {'higher_is_better': True},
  }
  scores = {'a': [0.5], 'b': [0.7]}
  run = make_run('stl', 0, scores, **{'metrics': {'a': 'x', 'b': 'y'}})
  record = {**run.info, 'metrics': metrics}
  (run.directory / 'run.json').write_text(json.dumps(record))
  assert read_run(run.directory).first_metrics == ('a/accuracy', 'b/loss')


def test_flattening_joins_keys_and_keeps_empty_mappings():
  tree = {'a': {'b': {'c': 1}, 'd': {}}, 'e': [2]}
  assert flatten(tree) == {'a.b.c': 1, 'a.d': {}, 'e': [2]}
