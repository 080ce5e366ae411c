"""Runs start, stop, die and go on; their numbers do not change by it."""

import contextlib
import dataclasses
import functools
import itertools
import json
import logging
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from configs import multi_digits
from mtl_jax import problems
from mtl_jax.train import checkpoint
from mtl_jax.train import evaluate
from mtl_jax.train import experiment as experiments
from mtl_jax.train import loop
from mtl_jax.train import run_directory
from mtl_jax.train import stopping
from mtl_jax.train import window as windows

pytestmark = pytest.mark.usefixtures('compilation_cache')

# 64 steps an epoch. Logs, checkpoints and epochs end at different steps.
_LOG, _SAVE, _STOP = 5, 8, 37
_TIMES = ('wall_time', 'train/steps_per_second')


def _config(method='f_cagrad', **changes):
  config = multi_digits.get_config(f'runlocal,method={method}')
  config.log_every_steps = _LOG
  config.checkpoint_every_steps = _SAVE
  config.update(changes)
  return config


def _lines(workdir):
  text = (workdir / 'metrics.jsonl').read_text()
  return [json.loads(line) for line in text.splitlines()]


def _numbers(workdir):
  """The log without times."""
  return [
    {name: x for name, x in line.items() if name not in _TIMES}
    for line in _lines(workdir)
  ]


@functools.cache
def _experiment():
  return experiments.make_experiment(_config())


def _final_state(workdir):
  with contextlib.closing(checkpoint.Checkpoints(workdir)) as checkpoints:
    state, _ = checkpoints.restore(_experiment().init())
  return state


def _assert_same_run(workdir, reference):
  assert _numbers(workdir) == _numbers(reference)
  for a, b in zip(
    jax.tree.leaves(_final_state(workdir)),
    jax.tree.leaves(_final_state(reference)),
    strict=True,
  ):
    if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
      a, b = jax.random.key_data(a), jax.random.key_data(b)
    np.testing.assert_array_equal(a, b)


@pytest.fixture(scope='module')
def compiled():
  """What JAX said about compilations during the reference run."""
  return []


@pytest.fixture(scope='module')
def reference(tmp_path_factory, compiled):
  """The directory of a run that nothing disturbed."""
  workdir = tmp_path_factory.mktemp('reference')

  class Handler(logging.Handler):
    def emit(self, record):
      compiled.append(record.getMessage())

  handler = Handler()
  logging.getLogger('jax').addHandler(handler)
  with jax.log_compiles():
    loop.train(_config(), workdir)
  logging.getLogger('jax').removeHandler(handler)
  return workdir


_KILLED = f"""
import os, pathlib, signal, sys, time
from mtl_jax.train import experiment
from tests.train import test_loop

batches = experiment.Experiment.train_batches
workdir = pathlib.Path(sys.argv[1])

def dying(self, start_step):
  for step, batch in enumerate(batches(self, start_step), start_step + 1):
    yield batch
    if step == {_STOP}:
      while not (workdir / 'checkpoints' / '{_STOP // _SAVE * _SAVE}').exists():
        time.sleep(0.01)
      os.kill(os.getpid(), signal.SIGKILL)

experiment.Experiment.train_batches = dying
test_loop.loop.train(test_loop._config(), workdir)
"""


@pytest.fixture(scope='module')
def killed(tmp_path_factory):
  """The directory of a run that was killed in the middle of an epoch."""
  workdir = tmp_path_factory.mktemp('killed')
  process = subprocess.run(
    [sys.executable, '-c', _KILLED, str(workdir)],
    cwd=pathlib.Path(__file__).parents[2],
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )
  assert process.returncode == -signal.SIGKILL, process.stderr
  # The last line of a killed process can be half a line.
  with (workdir / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 40, "epo')
  return workdir


def test_killed_run_ends_bit_for_bit_like_one_never_killed(
  killed, reference, tmp_path
):
  workdir = pathlib.Path(shutil.copytree(killed, tmp_path / 'run'))
  before = json.loads((workdir / 'run.json').read_text())
  assert before['finished'] is None
  metrics = loop.train(_config(), workdir)
  _assert_same_run(workdir, reference)
  after = json.loads((workdir / 'run.json').read_text())
  assert after['started'] == before['started']
  assert after['finished'] >= after['started']
  last = _numbers(workdir)[-1]
  assert metrics == {name: last[name] for name in metrics}
  assert 'test/task_1/accuracy' in metrics


@pytest.mark.filterwarnings(
  # TensorStore's threads outlive the failed read.
  'ignore::pytest.PytestUnraisableExceptionWarning'
)
def test_run_with_a_damaged_last_checkpoint_ends_the_same(
  killed, reference, tmp_path
):
  workdir = pathlib.Path(shutil.copytree(killed, tmp_path / 'run'))
  last = workdir / 'checkpoints' / str(_STOP // _SAVE * _SAVE)
  for file in last.rglob('d/*'):
    file.write_bytes(file.read_bytes()[:-1])
  loop.train(_config(), workdir)
  assert (workdir / 'damaged_checkpoints' / last.name).is_dir()
  _assert_same_run(workdir, reference)


def _raise_signal_at(monkeypatch, number, step):
  batches = experiments.Experiment.train_batches

  def signalling(self, start_step):
    for i, batch in enumerate(batches(self, start_step), start_step + 1):
      if i == step:
        os.kill(os.getpid(), number)
      yield batch

  monkeypatch.setattr(experiments.Experiment, 'train_batches', signalling)


@pytest.mark.parametrize('step', [_STOP, 64], ids=['middle', 'epoch'])
def test_sigterm_saves_the_step_and_the_run_goes_on_from_it(
  reference, tmp_path, monkeypatch, step
):
  handler = signal.getsignal(signal.SIGTERM)
  with monkeypatch.context() as patch:
    _raise_signal_at(patch, signal.SIGTERM, step)
    with pytest.raises(
      stopping.Interrupted, match=f'SIGTERM stopped the run after step {step}'
    ):
      loop.train(_config(), tmp_path)
  assert signal.getsignal(signal.SIGTERM) is handler
  assert (tmp_path / 'checkpoints' / str(step)).is_dir()
  stopped_at = _lines(tmp_path)[-1]['wall_time']
  loop.train(_config(), tmp_path)
  _assert_same_run(tmp_path, reference)
  times = [line['wall_time'] for line in _lines(tmp_path)]
  assert times == sorted(times)
  assert times[-1] > stopped_at


def test_evaluation_made_up_for_is_logged_once_whenever_the_run_dies(
  reference, tmp_path, monkeypatch
):
  with monkeypatch.context() as patch:
    _raise_signal_at(patch, signal.SIGTERM, 64)
    with pytest.raises(stopping.Interrupted):
      loop.train(_config(), tmp_path)

  def die(self, start_step):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(experiments.Experiment, 'train_batches', die)
    with pytest.raises(KeyboardInterrupt):
      loop.train(_config(), tmp_path)
  assert 'test/task_1/loss' in _lines(tmp_path)[-1]
  loop.train(_config(), tmp_path)
  _assert_same_run(tmp_path, reference)


def test_step_is_compiled_once_in_a_run(reference, compiled):
  del reference
  for name in ('step_and_add', 'eval_and_add'):
    found = [m for m in compiled if m.startswith(f'Compiling jit({name})')]
    assert len(found) == 1, found


def test_finished_run_started_again_says_so_and_touches_nothing(
  reference, caplog, monkeypatch
):
  def fail(config):
    raise AssertionError('it set up the experiment')

  monkeypatch.setattr(experiments, 'make_experiment', fail)
  before = {p: p.stat().st_mtime_ns for p in reference.rglob('*')}
  with caplog.at_level(logging.INFO, 'mtl_jax'):
    metrics = loop.train(_config(), reference)
  assert 'finished; nothing to do' in caplog.text
  assert {p: p.stat().st_mtime_ns for p in reference.rglob('*')} == before
  assert (
    metrics['test/task_2/accuracy']
    == (_lines(reference)[-1]['test/task_2/accuracy'])
  )


def test_workdir_of_another_config_is_refused_naming_the_key(reference):
  config = _config()
  config.optimizer.learning_rate = 0.5
  with pytest.raises(
    ValueError, match=r'optimizer.learning_rate: 0.001 there, 0.5 now'
  ):
    loop.train(config, reference)


_FILES = ('config.json', 'run.json', 'metrics.jsonl')


def test_start_that_fails_leaves_the_run_as_it_was(
  reference, tmp_path, monkeypatch
):
  workdir = pathlib.Path(shutil.copytree(reference, tmp_path / 'run'))
  before = {name: (workdir / name).read_bytes() for name in _FILES}
  other = _config('f_linear')
  slower = _config()
  slower.optimizer.learning_rate = 1e-4

  def fail(self, state):
    raise RuntimeError('out of memory')

  with monkeypatch.context() as patch:
    # The last thing that may fail.
    patch.setattr(experiments.Experiment, 'compile_step', fail)
    for config, message in (
      (other, 'is not of this config'),
      (slower, r'at its last step, 128: .*\n  optimizer.learning_rate: 0.001'),
      (_config(batch_size=8, epochs=1), 'holds 128 steps of another run.*'),
      (_config(epochs=3), 'out of memory'),
    ):
      with pytest.raises((ValueError, RuntimeError), match=message):
        loop.train(config, workdir, overwrite_config=True)
  assert {name: (workdir / name).read_bytes() for name in _FILES} == before
  with pytest.raises(ValueError, match='holds a run of another config'):
    loop.train(other, workdir)
  lines = _lines(workdir)
  assert loop.train(_config(), workdir).items() <= lines[-1].items()


def test_evaluation_is_returned_as_it_was_made_not_as_the_log_has_it(
  reference, tmp_path
):
  # As killed after its last checkpoint, while somebody else wrote to the log.
  workdir = pathlib.Path(shutil.copytree(reference, tmp_path / 'run'))
  record = json.loads((workdir / 'run.json').read_text())
  (workdir / 'run.json').write_text(json.dumps({**record, 'finished': None}))
  *lines, last = _lines(workdir)
  name = 'test/task_1/accuracy'
  lines.append({**last, name: 0.5})
  (workdir / 'metrics.jsonl').write_text(
    ''.join(json.dumps(line) + '\n' for line in lines)
  )
  assert loop.train(_config(), workdir)[name] == last[name] != 0.5
  assert json.loads((workdir / 'run.json').read_text())['finished']


def test_run_is_of_the_config_it_was_trained_with_whatever_config_json_says(
  reference, tmp_path
):
  trained, other = _config().to_dict(), _config('f_linear').to_dict()
  shutil.copy(reference / 'run.json', tmp_path)
  (tmp_path / 'config.json').write_text(json.dumps(other))
  assert not run_directory.config_changes(tmp_path, trained)
  assert 'method.name: "f_cagrad" there, "f_linear" now' in (
    run_directory.config_changes(tmp_path, other)
  )


@pytest.mark.parametrize('name', ['config.json', 'run.json'])
@pytest.mark.parametrize('text', ['{"name": "a package"}', '[1]'])
def test_file_of_another_tool_is_named(tmp_path, name, text):
  (tmp_path / name).write_text(text)
  with pytest.raises(ValueError, match=f'{tmp_path / name} is not of a run'):
    loop.train(_config(), tmp_path, overwrite_config=True)
  assert [p.name for p in tmp_path.iterdir()] == [name]


def test_overwrite_config_goes_on_with_the_other_config(reference, tmp_path):
  workdir = pathlib.Path(shutil.copytree(reference, tmp_path / 'run'))
  loop.train(_config(epochs=3), workdir, overwrite_config=True)
  assert _numbers(workdir)[: len(_numbers(reference))] == _numbers(reference)
  assert _lines(workdir)[-1]['step'] == 192
  assert json.loads((workdir / 'config.json').read_text())['epochs'] == 3
  assert json.loads((workdir / 'run.json').read_text())['config_changes'] == [
    {'step': 128, 'changes': ['epochs: 2 there, 3 now']}
  ]
  with pytest.raises(ValueError, match=r'epochs is 1, .* is of step 192'):
    loop.train(_config(epochs=1), workdir, overwrite_config=True)


def test_log_has_the_promised_lines(reference):
  lines = _lines(reference)
  train = [line for line in lines if 'train/loss' in line]
  evaluation = [line for line in lines if 'test/task_1/loss' in line]
  assert len(train) + len(evaluation) == len(lines)
  assert [line['step'] for line in train] == [*range(5, 128, 5), 128]
  assert [line['step'] for line in evaluation] == [64, 128]
  assert [line['epoch'] for line in evaluation] == [1.0, 2.0]
  for line in train:
    assert line.keys() >= {
      'wall_time',
      'train/conflict',
      'train/flat/conflict',
      'train/steps_per_second',
      'train/task_1/loss',
      'train/task_2/accuracy',
      'train/task_1/gradient_norm',
      'train/task_2/flat_gradient_norm',
      'train/task_1/weight',
      'train/task_2/flat_weight',
    }
    assert line['train/loss'] == pytest.approx(
      (line['train/task_1/loss'] + line['train/task_2/loss']) / 2
    )
  for line in evaluation:
    assert line.keys() == {'step', 'epoch', 'wall_time'} | {
      f'{split}/{task}/{name}'
      for split in ('validation', 'test')
      for task in ('task_1', 'task_2')
      for name in ('loss', 'accuracy')
    }


def test_train_line_is_the_mean_over_the_steps_since_the_line_before(reference):
  experiment = _experiment()
  state = experiment.init()
  single = []
  for batch in itertools.islice(experiment.train_batches(0), 2 * _LOG):
    state = experiment.step(
      state._replace(window=experiment.new_window()), batch
    )
    single.append(windows.means(jax.device_get(state.window)))
  for line, part in zip(
    _lines(reference), (single[:_LOG], single[_LOG:]), strict=False
  ):
    for name in part[0]:
      assert line[f'train/{name}'] == pytest.approx(
        np.mean([values[name] for values in part]), rel=1e-5, abs=1e-7
      )


def test_evaluation_is_that_of_the_saved_parameters_on_the_whole_split(
  reference,
):
  experiment = _experiment()
  train = _final_state(reference).train
  for split in ('validation', 'test'):
    source = experiment.sources[split]
    batch = source.__getitems__(np.arange(len(source)))
    sums = evaluate.make_eval_step(experiment.problem, experiment.model)(
      train.params, train.model_state, batch
    )
    values = evaluate.finish_eval(experiment.problem, sums)
    for name, value in values.items():
      assert _lines(reference)[-1][f'{split}/{name}'] == pytest.approx(value)


def test_run_record_says_what_the_report_needs(reference):
  record = json.loads((reference / 'run.json').read_text())
  assert record['problem'] == 'multi_digits'
  assert record['method'] == 'f_cagrad'
  assert record['tasks'] == ['task_1', 'task_2']
  assert record['metrics'] == {
    'task_1/accuracy': {'higher_is_better': True},
    'task_2/accuracy': {'higher_is_better': True},
  }
  # 100 pixels to 16 to 8 features, and two heads of 10.
  assert record['num_parameters'] == 101 * 16 + 17 * 8 + 2 * 9 * 10
  assert record['steps'] == 128
  assert record['num_devices'] == 8
  assert record['versions']['jax'] == jax.__version__
  assert record['wall_time_s'] >= _lines(reference)[-1]['wall_time']
  assert record['compile_time_s'] > 0


def test_loss_that_is_not_finite_stops_the_run_naming_task_and_step(
  tmp_path, monkeypatch
):
  problem = problems.by_name('multi_digits')

  def broken(prediction, label):
    return problem.tasks[1].loss(prediction, label) * np.nan

  tasks = (problem.tasks[0], dataclasses.replace(problem.tasks[1], loss=broken))
  monkeypatch.setattr(
    problems, 'by_name', lambda _: dataclasses.replace(problem, tasks=tasks)
  )
  with pytest.raises(
    windows.NonFiniteLossError, match="of 'task_2' is not finite at step 1;"
  ):
    loop.train(_config('linear'), tmp_path)
  # What there is has been written; the networks share a trunk, so that one
  # bad loss spoils the other's parameters, a step later.
  (line,) = _lines(tmp_path)
  assert line['train/task_2/loss'] is None
  assert line['train/task_2/accuracy'] is not None
  assert not list((tmp_path / 'checkpoints').iterdir())


def _window(steps):
  """The window of steps of tasks a and b, (loss, present) each."""
  names = [f'{task}/{kind}' for task in 'ab' for kind in ('loss', 'present')]
  window = windows.empty(names, ['a', 'b'])
  for step, values in enumerate(steps, 1):
    metrics = dict(zip(names, np.float32(values).ravel(), strict=True))
    window = windows.add(window, metrics, np.int32(step))
  return jax.device_get(window)


def test_first_step_that_is_not_finite_is_the_one_named():
  here = [((a, 1), (b, 1)) for a, b in [(1, 2), (1, np.inf), (np.nan, 1)]]
  with pytest.raises(
    windows.NonFiniteLossError, match="loss of 'b' is not finite at step 2"
  ):
    windows.check_finite(_window([*here, ((1, 1), (1, 1))]))


def test_steps_without_labels_of_a_task_do_not_count_for_it():
  window = _window([((1, 1), (4, 1)), ((2, 1), (np.nan, 0)), ((6, 1), (8, 1))])
  windows.check_finite(window)
  assert windows.means(window) == {
    'a/loss': 3.0,
    'b/loss': 6.0,
    'b/present': pytest.approx(2 / 3),
  }


def test_task_without_any_label_has_no_mean():
  means = windows.means(_window([((1, 1), (0, 0))]))
  assert np.isnan(means['b/loss'])
  assert means['b/present'] == 0.0


@pytest.mark.parametrize(
  ('name', 'value', 'message'),
  [
    ('batch_size', 12, 'batch_size must be a positive multiple of 8'),
    ('epochs', 0, 'epochs must be positive, got 0'),
    ('log_every_steps', 0, 'log_every_steps must be positive, got 0'),
    ('keep_checkpoints', 0, 'keep_checkpoints must be positive, got 0'),
    ('data', {'split': 'papr'}, r"data\.split must be one of .*'papr'"),
    ('data', {'kind': 'reel'}, r"data\.kind must be one of .*'reel'"),
    (
      'data',
      {'kind': 'real', 'split': 'paper'},
      r"multi_digits .* data\.split must be 'holdout', got 'paper'",
    ),
    ('engine', 'roll', "engine must be one of .*'roll'"),
    ('precision', 'hihgest', "precision must be one of .*'hihgest'"),
    ('problem', 'multi_digit', "'multi_digits'"),
  ],
)
def test_value_out_of_range_is_named(tmp_path, name, value, message):
  with pytest.raises(ValueError, match=message):
    loop.train(_config(**{name: value}), tmp_path)
  assert not list(tmp_path.iterdir())


def test_workdir_that_is_no_folder_is_refused(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(
    ValueError, match=r"workdir must be a folder.*'gs://b/run'"
  ):
    loop.train(_config(), 'gs://b/run')
  assert not list(tmp_path.iterdir())
