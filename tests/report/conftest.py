"""Small run directories, written by hand."""

import json

import pytest

from mtl_jax.report.runs import read_run


@pytest.fixture
def write_run(tmp_path):
  """A function that writes a run directory and returns its path.

  `scores` is `{task: values}`, a value an evaluation on test, one evaluation
  an epoch of ten steps; `conflict` is logged at the same steps.
  """

  def write(
    method,
    seed,
    scores,
    *,
    problem='two_tasks',
    metric='accuracy',
    metrics=None,
    higher_is_better=True,
    finished=True,
    conflict=None,
    flat_conflict=None,
    config=None,
    folder=None,
    **info,
  ):
    directory = tmp_path / (folder or f'{problem}/{method}/seed{seed}')
    directory.mkdir(parents=True)
    metrics = metrics or {task: metric for task in scores}
    keys = {task: f'{task}/{name}' for task, name in metrics.items()}
    epochs = len(next(iter(scores.values())))
    lines = []
    for epoch in range(1, epochs + 1):
      at = {'step': 10 * epoch, 'epoch': epoch, 'wall_time': 1.0 * epoch}
      train = {'train/steps_per_second': 50.0}
      if conflict is not None:
        train['train/conflict'] = conflict[epoch - 1]
      if flat_conflict is not None:
        train['train/flat/conflict'] = flat_conflict[epoch - 1]
      test = {f'test/{keys[t]}': v[epoch - 1] for t, v in scores.items()}
      lines += [{**at, **train}, {**at, **test}]
    record = {
      'problem': problem,
      'method': method,
      'seed': seed,
      'tasks': list(scores),
      'metrics': {
        key: {'higher_is_better': higher_is_better} for key in keys.values()
      },
      'baselines': {},
      'baselines_source': '',
      'num_parameters': 1000,
      'commit': 'abc',
      'versions': {'jax': '0.10.2', 'numpy': '2.4.6'},
      'device': 'cpu',
      'num_devices': 1,
      'num_processes': 1,
      'started': '2025-01-01T00:00:00+00:00',
      'finished': '2025-01-01T01:00:00+00:00' if finished else None,
      'steps': 10 * epochs if finished else 1000,
      'wall_time_s': float(epochs),
      'compile_time_s': 0.5,
      **info,
    }
    if config is None:
      config = {'method': {'name': method}, 'seed': seed, 'epochs': epochs}
    (directory / 'run.json').write_text(json.dumps(record))
    (directory / 'config.json').write_text(json.dumps(config))
    (directory / 'metrics.jsonl').write_text(
      ''.join(json.dumps(line) + '\n' for line in lines)
    )
    return directory

  return write


@pytest.fixture
def make_run(write_run):
  """Like `write_run`, but returns the run as it is read."""
  return lambda *args, **kwargs: read_run(write_run(*args, **kwargs))
