"""Predictions of a saved run."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from mtl_jax import main
from mtl_jax import predict
from mtl_jax.train import loop


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  path = tmp_path_factory.mktemp('run')
  config = main.load_config(
    'configs/multi_digits.py:method=linear,runlocal', ['--config.epochs=1']
  )
  values = loop.train(config, path)
  return path, values


def test_restored_run_predicts_with_the_accuracy_it_logged(workdir):
  path, values = workdir
  experiment, state = predict.restore(path)
  source = experiment.sources['test']
  batch = source.__getitems__(np.arange(len(source)))
  classes = predict.predict(experiment, state, batch)
  for task in ('task_1', 'task_2'):
    right = (classes[task] == batch['labels'][task]).mean()
    assert right == pytest.approx(values[f'test/{task}/accuracy'], abs=1e-6)


def test_wrong_images_are_those_with_any_wrong_task():
  labels = {'a': np.array([0, 1, 2, 3]), 'b': np.array([0, 0, 0, 0])}
  classes = {'a': np.array([0, 1, 9, 3]), 'b': np.array([0, 5, 0, 0])}
  chosen = predict.choose_images(labels, classes, 4, 'wrong')
  assert chosen.tolist() == [1, 2]
  assert predict.choose_images(labels, classes, 1, 'wrong').tolist() == [1]
  first = predict.choose_images(labels, classes, 3, 'first')
  assert first.tolist() == [0, 1, 2]


def test_picture_names_the_true_class_where_the_prediction_is_wrong():
  batch = {
    'image': np.zeros((2, 4, 4, 1), np.uint8),
    'labels': {'a': np.array([3, 4])},
  }
  figure = predict.draw(batch, {'a': np.array([3, 7])}, 'title')
  texts = [t.get_text() for axis in figure.axes for t in axis.texts]
  assert texts == ['a: 3', 'a: 7 (is 4)']


def test_command_writes_the_picture(workdir, tmp_path, capsys):
  out = tmp_path / 'shown.png'
  status = predict.main([f'--workdir={workdir[0]}', f'--out={out}'])
  assert status == 0
  assert out.read_bytes().startswith(b'\x89PNG')
  assert str(out) in capsys.readouterr().out


def test_run_that_cannot_be_read_is_one_line(tmp_path, capsys):
  def says(words):
    assert predict.main([f'--workdir={tmp_path}']) == 1
    (line,) = capsys.readouterr().err.splitlines()
    return (
      line.startswith('error: ') and str(tmp_path) in line and words in line
    )

  assert says('holds no run')
  (tmp_path / 'config.json').write_text('{"name": "a package"}')
  assert says('config.json is not of a run of mtl_jax')
  groups = {key: {} for key in ('problem', 'method', 'model', 'optimizer')}
  (tmp_path / 'config.json').write_text(json.dumps(groups))
  assert says("the config has no entry 'data'")


@pytest.mark.parametrize(
  ('out', 'message'), [('no/x.png', 'there is no folder'), ('x.foo', "'png'")]
)
def test_picture_that_cannot_be_written_is_one_line(
  tmp_path, capsys, out, message
):
  out = tmp_path / out
  assert predict.main([f'--workdir={tmp_path}', f'--out={out}']) == 1
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith('error: --out') and message in line


def test_damaged_checkpoints_are_told_without_the_libraries_tracebacks(
  workdir, tmp_path
):
  copy = shutil.copytree(workdir[0], tmp_path / 'run')
  for path in copy.rglob('checkpoints/*/**/d/*'):
    path.write_bytes(path.read_bytes()[:10])
  # In a process of its own, whose end the libraries' threads may outlive.
  process = subprocess.run(
    [sys.executable, '-m', 'mtl_jax.predict', f'--workdir={copy}'],
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
  )
  assert process.returncode == 1
  assert process.stderr.startswith('error: none of the checkpoints in ')
  assert 'Traceback' not in process.stderr
