"""Several processes train as one does."""

import json

import processes
import pytest

from mtl_jax import main
from mtl_jax.train import loop

# Process 1 alone is told to stop, between two lines of the log.
_PROCESS = """
import os, signal, sys
from absl import app
from mtl_jax import main
from mtl_jax.train import experiment

batches = experiment.Experiment.train_batches

def signalling(self, start_step):
  for step, batch in enumerate(batches(self, start_step), start_step + 1):
    if step == 18 and '--process_id=1' in sys.argv:
      os.kill(os.getpid(), signal.SIGTERM)
    yield batch

experiment.Experiment.train_batches = signalling
app.run(main.main, flags_parser=main.parse_flags)
"""


def _lines(workdir):
  text = (workdir / 'metrics.jsonl').read_text()
  return [json.loads(line) for line in text.splitlines()]


def _assert_close(lines, expected):
  assert len(lines) == len(expected)
  for line, other in zip(lines, expected, strict=True):
    assert line.keys() == other.keys()
    for name in line.keys() - {'wall_time', 'train/steps_per_second'}:
      # Sums over devices are taken in another order.
      assert line[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5), name


def test_processes_train_as_one_stop_together_and_one_goes_on(tmp_path):
  """Two processes of two devices each, which share the parameters out."""
  config = 'configs/multi_digits.py:runlocal,method=f_cagrad'
  overrides = [
    *('--config.epochs=1', '--config.checkpoint_every_steps=64'),
    # Wide enough for a kernel that is cut.
    *(
      '--config.model.kwargs.widths=(64,)',
      '--config.parallel.parameters=sharded',
    ),
  ]
  ends = processes.run_two(
    lambda address, i: (
      *('-c', _PROCESS, f'--config={config}', *overrides),
      *(f'--workdir={tmp_path / "two"}', '--num_processes=2'),
      *(f'--coordinator_address={address}', f'--process_id={i}'),
    )
  )
  for status, error in ends:
    assert status == main.EXIT_INTERRUPTED, error
  errors = [error for _, error in ends]
  assert 'another process stopped the run after step 20 of 64' in errors[0]
  assert 'SIGTERM stopped the run after step 20 of 64' in errors[1]
  record = json.loads((tmp_path / 'two' / 'run.json').read_text())
  assert (record['num_processes'], record['num_devices']) == (2, 4)

  config = main.load_config(config, overrides)
  loop.train(config, tmp_path / 'one')
  expected = _lines(tmp_path / 'one')
  _assert_close(_lines(tmp_path / 'two'), expected[:4])
  # Eight devices of one process take over from two processes.
  loop.train(config, tmp_path / 'two')
  _assert_close(_lines(tmp_path / 'two'), expected)
