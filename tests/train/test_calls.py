"""Several steps in one call are the steps of as many calls."""

import contextlib
import functools
import json
import os
import signal

import jax
import numpy as np
import pytest

from configs import multi_digits
from mtl_jax.train import checkpoint
from mtl_jax.train import experiment as experiments
from mtl_jax.train import loop
from mtl_jax.train import stopping

pytestmark = pytest.mark.usefixtures('compilation_cache')

# 64 steps an epoch.
_K, _LOG, _SAVE = 8, 16, 32


def _config(**changes):
  config = multi_digits.get_config('runlocal,method=linear')
  config.epochs = 1
  config.log_every_steps = _LOG
  config.checkpoint_every_steps = _SAVE
  config.steps_per_call = _K
  config.update(changes)
  return config


def _numbers(workdir):
  """The log without times."""
  lines = map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines())
  times = ('wall_time', 'train/steps_per_second')
  return [{n: x for n, x in line.items() if n not in times} for line in lines]


@functools.cache
def _experiment():
  return experiments.make_experiment(_config())


def _final_state(workdir):
  with contextlib.closing(checkpoint.Checkpoints(workdir)) as checkpoints:
    state, info = checkpoints.restore(_experiment().init())
  assert info['step'] == 64
  return state


def _assert_same(workdir, reference, **tolerance):
  lines, expected = _numbers(workdir), _numbers(reference)
  assert [line.keys() for line in lines] == [line.keys() for line in expected]
  for line, other in zip(lines, expected, strict=True):
    for name in line:
      np.testing.assert_allclose(line[name], other[name], **tolerance)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, **tolerance),
    _final_state(workdir),
    _final_state(reference),
  )


@pytest.fixture(scope='module')
def reference(tmp_path_factory):
  """The directory of a run of single steps."""
  workdir = tmp_path_factory.mktemp('reference')
  loop.train(_config(steps_per_call=1), workdir)
  return workdir


@pytest.fixture(scope='module')
def several(tmp_path_factory):
  """The directory of a run of eight steps a call."""
  workdir = tmp_path_factory.mktemp('several')
  loop.train(_config(), workdir)
  return workdir


def test_several_steps_in_a_call_end_where_single_steps_do(several, reference):
  # On CPUs bit for bit; another program may add up in another order.
  _assert_same(several, reference, rtol=1e-5, atol=1e-6)


def test_epoch_of_indices_in_one_call_ends_bit_for_bit_like_host_batches(
  several, tmp_path
):
  config = _config(steps_per_call=64, log_every_steps=64)
  config.update(checkpoint_every_steps=64)
  config.data.placement = 'device'
  loop.train(config, tmp_path)
  assert _numbers(tmp_path)[-1] == _numbers(several)[-1]
  jax.tree.map(
    np.testing.assert_array_equal,
    _final_state(tmp_path).train,
    _final_state(several).train,
  )


def _at_call(monkeypatch, number, do):
  batches = experiments.Experiment.train_batches

  def doing(self, start_step):
    for i, inputs in enumerate(batches(self, start_step), 1):
      if i == number:
        do()
      yield inputs

  monkeypatch.setattr(experiments.Experiment, 'train_batches', doing)


def _die():
  raise KeyboardInterrupt


def test_run_of_calls_that_died_and_was_stopped_ends_bit_for_bit_the_same(
  several, tmp_path, monkeypatch
):
  with monkeypatch.context() as patch:
    # Logged up to step 48, saved at step 32.
    _at_call(patch, 7, _die)
    with pytest.raises(KeyboardInterrupt):
      loop.train(_config(), tmp_path)
  with monkeypatch.context() as patch:
    _at_call(patch, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(stopping.Interrupted, match='after step 40 of 64'):
      loop.train(_config(), tmp_path)
  loop.train(_config(), tmp_path)
  _assert_same(tmp_path, several, rtol=0, atol=0)


def test_run_cannot_go_on_from_within_a_call(tmp_path, monkeypatch):
  with monkeypatch.context() as patch:
    _at_call(patch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(stopping.Interrupted, match='after step 3 of 64'):
      loop.train(_config(steps_per_call=1), tmp_path)
  with pytest.raises(ValueError, match=r'is 8, which does not divide 3, the'):
    loop.train(_config(), tmp_path, overwrite_config=True)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'steps_per_call': 3}, 'log_every_steps = 16, .* got 3; .* is 16'),
    ({'log_every_steps': 20}, 'log_every_steps = 20, .* got 8; .* is 4'),
    ({'checkpoint_every_steps': 100}, 'checkpoint_every_steps = 100, .* is 4'),
    ({'steps_per_call': 0}, 'steps_per_call must be positive, got 0'),
    # 1024 examples in batches of 40 on eight devices: 25 steps.
    ({'batch_size': 40}, 'eval_every_epochs = 1 epochs of 25 steps, .* is 1'),
  ],
)
def test_what_would_fall_inside_a_call_is_an_error(changes, message):
  with pytest.raises(ValueError, match=message):
    experiments.make_experiment(_config(**changes))


def _talks_to_host(compiled):
  words = ('callback', 'infeed', 'outfeed', 'send(', 'recv(')
  return any(word in compiled.as_text() for word in words)


@pytest.fixture(scope='module')
def compiled():
  """An experiment, its first state and its compiled call."""
  experiment = _experiment()
  state = experiment.init()
  with jax.default_matmul_precision(experiment.config.precision):
    return experiment, state, experiment.compile_step(state)[0]


def test_call_asks_the_host_for_nothing_and_frees_the_old_state(compiled):
  experiment, state, call = compiled
  inputs = next(experiment.train_batches(0))
  with jax.transfer_guard('disallow'):
    after = call(state, inputs)
  assert int(after.train.step) == _K
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
  assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(inputs))
  assert not _talks_to_host(call)
  # What the words above are there to find.
  shown = jax.jit(lambda x: jax.debug.print('{}', x)).lower(1.0).compile()
  assert _talks_to_host(shown)


def test_batch_that_was_left_on_the_host_stops_a_run(tmp_path, monkeypatch):
  batches = experiments.Experiment.train_batches

  def on_host(self, start_step):
    yield from map(jax.device_get, batches(self, start_step))

  monkeypatch.setattr(experiments.Experiment, 'train_batches', on_host)
  with pytest.raises(RuntimeError, match='Disallowed host-to-device transfer'):
    loop.train(_config(), tmp_path)
