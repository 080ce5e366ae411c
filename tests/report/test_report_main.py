"""The command, from run directories to files."""

import csv
import json
import os
import subprocess
import sys

from mtl_jax.report.__main__ import main

_SCORES = {'a': [0.5, 0.6], 'b': [0.7, 0.8]}
_FIGURES = ('learning_curves.png', 'gradient_conflict.png', 'final_scores.png')


def _is_png(path):
  content = path.read_bytes()
  return content.startswith(b'\x89PNG') and content.endswith(b'IEND\xaeB`\x82')


def test_the_command_writes_tables_and_figures_and_prints_the_table(
  write_run, tmp_path, capsys
):
  for seed in (0, 1):
    write_run('cagrad', seed, _SCORES, conflict=[0.5, 0.4])
  assert main([str(tmp_path)]) == 0
  out = tmp_path / 'report'
  assert sorted(path.name for path in out.iterdir()) == sorted(
    ['table.md', 'table.csv', *_FIGURES]
  )
  for name in _FIGURES:
    assert _is_png(out / name)
  printed = capsys.readouterr().out
  table = (out / 'table.md').read_text(encoding='utf-8')
  assert table in printed and '60.00 ± 0.00' in table
  assert str(out / 'final_scores.png') in printed


def test_several_problems_have_a_folder_and_a_result_file_each(
  write_run, tmp_path
):
  for problem in ('first', 'second'):
    write_run('cagrad', 0, _SCORES, problem=problem)
  out, file = tmp_path / 'out', tmp_path / 'results' / 'x.json'
  assert main([str(tmp_path), f'--out={out}', f'--json={file}']) == 0
  for problem in ('first', 'second'):
    with (out / problem / 'table.csv').open() as lines:
      (row,) = csv.DictReader(lines)
    assert row['problem'] == problem
    result = json.loads((tmp_path / f'results/x.{problem}.json').read_text())
    assert result['problem'] == problem


def test_the_best_test_table_is_written_only_with_its_flag(write_run, tmp_path):
  write_run('cagrad', 0, {'a': [0.9, 0.6], 'b': [0.7, 0.8]})
  out = tmp_path / 'report'
  assert main([str(tmp_path)]) == 0
  assert 'best test epoch' not in (out / 'table.md').read_text()
  assert not (out / 'table_best_test.csv').exists()
  assert main([str(tmp_path), '--best_test']) == 0
  assert 'best test epoch' in (out / 'table.md').read_text()
  with (out / 'table_best_test.csv').open() as lines:
    (row,) = csv.DictReader(lines)
  assert float(row['a/accuracy']) == 0.9


def test_the_command_that_made_a_result_file_is_in_it(write_run, tmp_path):
  write_run('cagrad', 0, _SCORES)
  file = tmp_path / 'with space.json'
  assert main([str(tmp_path), f'--json={file}']) == 0
  command = json.loads(file.read_text())['command']
  assert command == (
    f"python -m mtl_jax.report {tmp_path} '--json={tmp_path}/with space.json'"
  )


def test_a_broken_last_line_is_said_on_the_terminal(
  write_run, tmp_path, capsys
):
  log = write_run('cagrad', 0, _SCORES) / 'metrics.jsonl'
  log.write_text(log.read_text() + '{"step": 30, "ep')
  assert main([str(tmp_path)]) == 0
  assert 'broken last line 5' in capsys.readouterr().out


def test_unfinished_runs_alone_give_a_table_and_no_figures(
  write_run, tmp_path, capsys
):
  write_run('cagrad', 0, _SCORES, finished=False)
  assert main([str(tmp_path)]) == 0
  assert 'No finished run' in capsys.readouterr().out
  assert not list((tmp_path / 'report').glob('*.png'))


def test_bad_input_ends_with_status_2_and_a_message_without_a_traceback(
  tmp_path, capsys
):
  assert main([str(tmp_path)]) == 2
  printed = capsys.readouterr()
  assert 'no run found' in printed.err and str(tmp_path) in printed.err
  assert printed.out == ''


def test_the_command_needs_no_accelerator(write_run, tmp_path):
  write_run('cagrad', 0, _SCORES, conflict=[0.5, 0.4])
  done = subprocess.run(
    [sys.executable, '-m', 'mtl_jax.report', str(tmp_path)],
    # Any use of a device would fail with this.
    env={**os.environ, 'JAX_PLATFORMS': 'no_such_platform'},
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert done.returncode == 0, done.stderr
  assert (tmp_path / 'report' / 'table.md').exists()
