"""A sweep runs what is not finished, and tells what failed."""

import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import quick_compile

from mtl_jax import problems
from mtl_jax.train import run_directory

_ROOT = pathlib.Path(__file__).parents[2]
_CONFIG = str(_ROOT / 'configs' / 'multi_digits.py')
_spec = importlib.util.spec_from_file_location(
  'sweep', _ROOT / 'launch' / 'sweep.py'
)
sweep = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sweep)

# Stands in for a training run: what it does is told by the file `act`.
_RUN = """
import pathlib, signal, sys, time
workdir = pathlib.Path(sys.argv[1])
print('hello from the run')
act = (workdir / 'act').read_text()
if act == 'fail':
  sys.exit(3)
if act == 'wait':
  # A run in its first seconds dies of the signal.
  (workdir / 'ready').touch()
  time.sleep(60)
(workdir / 'did').touch()
"""


def _job(root, name, act):
  workdir = root / name
  workdir.mkdir()
  (workdir / 'act').write_text(act)
  return sweep.Job(
    name, workdir, {'seed': 0}, [sys.executable, '-c', _RUN, str(workdir)]
  )


def _finish(job, **config):
  record = dict.fromkeys(('problem', 'method', 'seed', 'started'))
  record |= {'finished': 'today', 'config': {**job.config, **config}}
  (job.workdir / 'run.json').write_text(json.dumps(record))


def test_jobs_are_seeds_times_methods_in_folders_of_their_own(tmp_path):
  jobs = sweep.make_jobs(
    _CONFIG, ['stl', 'f_cagrad'], [0, 1], tmp_path, ['--config.epochs=3']
  )
  folder = tmp_path / 'multi_digits'
  assert [job.workdir for job in jobs] == [
    *(folder / 'stl' / 'seed_0', folder / 'f_cagrad' / 'seed_0'),
    *(folder / 'stl' / 'seed_1', folder / 'f_cagrad' / 'seed_1'),
  ]
  assert [job.config['seed'] for job in jobs] == [0, 0, 1, 1]
  assert [job.config['epochs'] for job in jobs] == [3] * 4
  assert jobs[1].config['method']['name'] == 'f_cagrad'
  assert f'--config={_CONFIG}:method=f_cagrad,seed=0' in jobs[1].command
  assert jobs[1].command[-1] == '--config.epochs=3'


def test_arguments_of_the_config_are_kept(tmp_path):
  (job,) = sweep.make_jobs(f'{_CONFIG}:runlocal', ['linear'], [0], tmp_path)
  assert job.config['data']['kind'] == 'synthetic'


@pytest.mark.parametrize(
  ('methods', 'overrides', 'message'),
  [
    (['linear', 'cagard'], [], "did you mean 'cagrad'"),
    (['linear'], ['--config.epchs=1'], "did you mean 'epochs'"),
  ],
)
def test_mistake_is_told_before_anything_runs(
  tmp_path, methods, overrides, message
):
  with pytest.raises(ValueError, match=message):
    sweep.make_jobs(_CONFIG, methods, [0], tmp_path, overrides)
  assert not list(tmp_path.iterdir())


def test_finished_runs_are_skipped_and_others_run(tmp_path, capsys):
  jobs = [_job(tmp_path, name, 'work') for name in ('done', 'other', 'new')]
  _finish(jobs[0])
  # Finished, but not with this config: the run itself will refuse that.
  _finish(jobs[1], seed=1)
  assert sweep.Sweep(jobs, 2).run() == 0
  assert not (jobs[0].workdir / 'did').exists()
  assert (jobs[1].workdir / 'did').exists()
  assert (jobs[2].workdir / 'did').exists()
  output = capsys.readouterr().out.splitlines()
  assert output[0] == '[1/3] done: finished before'
  assert sorted(line[:5] for line in output) == ['[1/3]', '[2/3]', '[3/3]']


def test_failed_runs_are_told_at_the_end_with_their_logs(tmp_path, capsys):
  jobs = [_job(tmp_path, 'bad', 'fail'), _job(tmp_path, 'good', 'work')]
  assert sweep.Sweep(jobs, 1).run() == 1
  assert (jobs[1].workdir / 'did').exists()
  output = capsys.readouterr().out.splitlines()
  assert output[0] == ('[1/2] bad: FAILED with status 3: hello from the run')
  assert output[-1] == f'failed: bad; see {jobs[0].log}'
  assert jobs[0].log.read_text() == 'hello from the run\n'


def test_run_whose_record_cannot_be_read_fails_and_others_run(tmp_path, capsys):
  jobs = [_job(tmp_path, 'bad', 'work'), _job(tmp_path, 'good', 'work')]
  (jobs[0].workdir / 'run.json').write_text('[]')
  assert sweep.Sweep(jobs, 1).run() == 1
  assert not (jobs[0].workdir / 'did').exists()
  assert (jobs[1].workdir / 'did').exists()
  assert 'bad: FAILED to start: ' in capsys.readouterr().out


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['--config.epochs=3'], 'such as --config.epochs=3, come after --'),
    (['--seeds=a'], "--seeds must be integers parted by commas, got 'a'"),
    (['--', '--config.epchs=3'], "did you mean 'epochs'"),
  ],
)
def test_wrong_command_line_is_one_line(tmp_path, capsys, arguments, message):
  start = [f'--config={_CONFIG}', '--methods=linear', f'--root={tmp_path}']
  assert sweep.main([*start, *arguments]) == 1
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith('error: ') and message in line
  assert not list(tmp_path.iterdir())


def test_ctrl_c_stops_the_runs_and_starts_no_more(tmp_path):
  first, second = _job(tmp_path, 'a', 'wait'), _job(tmp_path, 'b', 'work')
  script = (
    'import sys; sys.path.append("tests"); from pathlib import Path; from '
    f'tests.launch import test_sweep as t; root = Path({str(tmp_path)!r}); '
    'jobs = [t.sweep.Job(n, root / n, {}, [sys.executable, "-c", t._RUN, '
    'str(root / n)]) for n in "ab"]; '
    'sys.exit(t.sweep.Sweep(jobs, 1).run())'
  )
  process = subprocess.Popen(
    [sys.executable, '-c', script],
    cwd=_ROOT,
    stdout=subprocess.PIPE,
    text=True,
    start_new_session=True,
  )
  while process.poll() is None and not (first.workdir / 'ready').exists():
    time.sleep(0.05)
  # As a terminal does it: to the whole group.
  os.killpg(process.pid, signal.SIGINT)
  output, _ = process.communicate(timeout=60)
  assert process.returncode == 75
  assert 'SIGINT: stopping the runs' in output
  assert 'a: stopped after' in output
  assert 'the same command goes on' in output
  assert not (first.workdir / 'did').exists()
  assert not second.log.exists()


def test_job_is_finished_by_the_record_that_training_writes(tmp_path):
  (job,) = sweep.make_jobs(f'{_CONFIG}:runlocal', ['linear'], [4], tmp_path)
  record = run_directory.make_record(
    problems.by_name('multi_digits'), job.config, num_parameters=1, steps=1
  )
  job.workdir.mkdir(parents=True)
  run_directory.write_record(job.workdir, record)
  assert not job.finished
  record['finished'] = run_directory.now()
  run_directory.write_record(job.workdir, record)
  assert job.finished


# Two trainings; the facts above are all but that a sweep starts one.
@pytest.mark.slow
def test_second_sweep_of_real_runs_skips_what_the_first_finished(tmp_path):
  command = [
    *(sys.executable, 'launch/sweep.py', f'--config={_CONFIG}:runlocal'),
    *('--methods=linear', '--seeds=4', f'--root={tmp_path}', '--jobs=1'),
    *('--', '--config.epochs=1', '--config.checkpoint_every_steps=1000'),
  ]
  outputs = [
    subprocess.run(
      command,
      cwd=_ROOT,
      env={**os.environ, 'XLA_FLAGS': quick_compile.FLAGS},
      capture_output=True,
      text=True,
      check=True,
      timeout=200,
    ).stdout
    for _ in range(2)
  ]
  assert outputs[0].startswith('[1/1] multi_digits linear seed 4: finished in')
  assert outputs[1] == '[1/1] multi_digits linear seed 4: finished before\n'
  workdir = tmp_path / 'multi_digits' / 'linear' / 'seed_4'
  record = json.loads((workdir / 'run.json').read_text())
  assert (record['method'], record['seed']) == ('linear', 4)
  assert 'test/task_1/accuracy' in (workdir / 'log.txt').read_text()
