"""The training loop: from a config and a folder to the metrics of a run.

What comes after a step comes in a fixed order: log, evaluate, save. So a
checkpoint is never ahead of the log, and a run that starts again cuts the log
back to its checkpoint and goes on as if it had never stopped.
"""

import contextlib
import logging
import os
import pathlib
from typing import Any

import jax
import ml_collections

from mtl_jax.train import checkpoint
from mtl_jax.train import checks
from mtl_jax.train import distributed
from mtl_jax.train import experiment as experiments
from mtl_jax.train import progress
from mtl_jax.train import radius
from mtl_jax.train import run_directory
from mtl_jax.train import stopping
from mtl_jax.train import window as windows
from mtl_jax.train import writers

_logger = logging.getLogger(__name__)


def train(
  config: ml_collections.ConfigDict,
  workdir: str | os.PathLike[str],
  *,
  overwrite_config: bool = False,
) -> dict[str, float]:
  """Trains and evaluates; goes on where an earlier call stopped.

  Everything is a function of the config: a run that was stopped or killed and
  started again ends with the same numbers as one that was not, times apart.
  Ctrl-C and SIGTERM save a checkpoint and leave.

  Args:
    config: of `configs/`.
    workdir: the run directory, of this run alone.
    overwrite_config: go on in a directory of another config.

  Returns:
    The last evaluation, `{'test/<task>/<metric>': value, ...}`.

  Raises:
    ValueError: if the directory is of another config (tells the keys that
      differ), its checkpoints do not fit or none can be read, or a value of
      the config is out of range.
    NonFiniteLossError: if a loss is not finite; names task and step.
    Interrupted: after a signal, when all is saved.
  """
  if '://' in str(workdir):
    raise ValueError(
      f'workdir must be a folder of a mounted file system, got {workdir!r}; a '
      'bucket can be mounted, with gcsfuse for example'
    )
  # First of all: JAX would not say which key a wrong precision is of.
  checks.check_config(config)
  with jax.default_matmul_precision(config.precision):
    return _train(config, pathlib.Path(workdir), overwrite_config)


def _train(config, workdir, overwrite_config):
  changes = run_directory.config_changes(workdir, config.to_dict())
  if changes and not overwrite_config:
    raise ValueError(
      f'workdir {workdir} holds a run of another config; name another one, or '
      'pass --overwrite_config to go on there with this one:\n  '
      + '\n  '.join(changes)
    )
  record = run_directory.read_record(workdir)
  if record and record['finished'] and not changes:
    _logger.info('%s holds this run, finished; nothing to do.', workdir)
    return _last_evaluation(writers.read_lines(workdir))
  experiment = experiments.make_experiment(config)
  # Process 0 changes the files when every process has looked at them.
  distributed.wait_for_all('workdir is checked')
  if distributed.is_main():
    workdir.mkdir(parents=True, exist_ok=True)
    run_directory.write_config(workdir, config.to_dict())
  checkpoints = checkpoint.Checkpoints(workdir, keep=config.keep_checkpoints)
  with contextlib.closing(checkpoints):
    return _Run(experiment, workdir, checkpoints).run()


class _Run:
  """One start of a run: its state, its files and its clock."""

  def __init__(
    self,
    experiment: experiments.Experiment,
    workdir: pathlib.Path,
    checkpoints: checkpoint.Checkpoints,
  ):
    self._experiment = experiment
    self._config = experiment.config
    self._workdir = workdir
    self._checkpoints = checkpoints
    fresh = experiment.init()
    restored = checkpoints.restore(fresh)
    self._state, info = restored or (fresh, _AT_START)
    self._step = info['step']
    self._evaluated = info['evaluated']
    self._clock = progress.Clock(info['wall_time_s'])
    if self._step > experiment.total_steps:
      raise ValueError(
        f'epochs is {self._config.epochs}, which ends at step '
        f'{experiment.total_steps}, but the checkpoint in {workdir} is of step '
        f'{self._step}'
      )
    if self._step % self._config.steps_per_call:
      raise ValueError(
        f'steps_per_call is {self._config.steps_per_call}, which does not '
        f'divide {self._step}, the step of the checkpoint in {workdir}'
      )
    # Where and when the window before ended.
    self._mark = (self._step, self._clock.seconds)
    # A window that is full and not yet logged, with its last step.
    self._full: tuple[int, windows.Window] | None = None
    self._record = self._make_record(resumed=restored is not None)
    radius.warn_if_too_small(self._config, self._state.train.params['shared'])

  def run(self) -> dict[str, float]:
    """Takes the steps that are left."""
    with contextlib.ExitStack() as stack:
      stop = stack.enter_context(stopping.StopRequest())
      self._writer = None
      if distributed.is_main():
        self._writer = stack.enter_context(
          contextlib.closing(
            writers.MetricsWriter(
              self._workdir,
              start_step=self._step,
              evaluated=self._evaluated,
            )
          )
        )
      self._write_record()
      step, seconds = self._experiment.compile_step(self._state)
      self._record['compile_time_s'] = seconds
      _logger.info('Compiled in %.1f s.', seconds)
      self._progress = stack.enter_context(
        progress.Progress(
          self._step,
          self._experiment.total_steps,
          show=distributed.is_main(),
        )
      )
      self._clock.start()
      if not self._evaluated:
        self._evaluate()
      stopped = self._take_steps(step, stop)
      self._save()
      self._checkpoints.wait()
      self._record['wall_time_s'] = self._clock.seconds
      if not stopped:
        self._record['finished'] = run_directory.now()
      self._write_record()
    if stopped:
      raise stopping.Interrupted(
        f'{stop.signal_name or "another process"} stopped the run after step '
        f'{self._step} of {self._experiment.total_steps}; it is saved, and the '
        'same command goes on'
      )
    return _last_evaluation(writers.read_lines(self._workdir))

  def _take_steps(self, step, stop):
    """Trains to the end, or until asked to stop; tells which."""
    config, total = self._config, self._experiment.total_steps
    epochs = config.eval_every_epochs * self._experiment.steps_per_epoch
    for batch in self._experiment.train_batches(self._step):
      with jax.transfer_guard('disallow'):
        self._state = step(self._state, batch)
      self._step += config.steps_per_call
      # The window before this call: the device is at work meanwhile.
      self._log()
      last = self._step == total
      full = last or self._step % config.log_every_steps == 0
      if full:
        self._full = (self._step, self._state.window)
        self._state = self._state._replace(window=self._experiment.new_window())
      self._evaluated = not last and self._step % epochs != 0
      if self._is_asked_to_stop(stop, full):
        return True
      if not self._evaluated:
        self._evaluate()
      if self._step % config.checkpoint_every_steps == 0:
        self._save()
      self._progress.update(self._step)
    return False

  def _is_asked_to_stop(self, stop, full):
    if jax.process_count() == 1:
      return stop.signal_name is not None
    # All processes must stop after the same step; to ask costs a transfer.
    return full and distributed.agree(stop.signal_name is not None)

  def _log(self):
    """Writes the full window, if there is one."""
    if self._full is None:
      return
    step, window = self._full[0], jax.device_get(self._full[1])
    self._full = None
    seconds = self._clock.seconds
    steps, passed = step - self._mark[0], seconds - self._mark[1]
    self._mark = (step, seconds)
    means = windows.means(window)
    self._progress.note = f'loss {means["loss"]:.4f}'
    self._write(step, {**means, 'steps_per_second': steps / passed}, 'train/')
    windows.check_finite(window)

  def _evaluate(self):
    self._log()
    with self._clock.paused(self._state):
      values = self._experiment.evaluate(self._state.train)
      self._write(self._step, values)
      self._evaluated = True
      self._progress.say(self._describe(values))
      windows.check_evaluation(values, self._step)

  def _save(self):
    self._log()
    with self._clock.paused(self._state):
      # What is not finite must not become where a run goes on.
      windows.check_finite(jax.device_get(self._state.window))
      if self._writer is not None:
        self._writer.sync()
      info = {
        'step': self._step,
        'wall_time_s': self._clock.seconds,
        'evaluated': self._evaluated,
      }
      if self._step > 0:
        self._checkpoints.save(self._step, self._state, info)

  def _write(self, step, values, prefix=''):
    if self._writer is not None:
      self._writer.write(
        step,
        {prefix + name: value for name, value in values.items()},
        epoch=step / self._experiment.steps_per_epoch,
        wall_time=self._clock.seconds,
      )

  def _describe(self, values):
    problem = self._experiment.problem
    scores = [
      f'{task.name} {task.metrics[0].name} '
      f'{values[f"test/{task.name}/{task.metrics[0].name}"]:.4f}'
      for task in problem.tasks
    ]
    epoch = self._step / self._experiment.steps_per_epoch
    return f'epoch {epoch:.4g}, step {self._step}, test: {", ".join(scores)}'

  def _make_record(self, *, resumed):
    config, experiment = self._config, self._experiment
    record = run_directory.make_record(
      experiment.problem,
      method=config.method.name,
      seed=config.seed,
      num_parameters=sum(
        x.size for x in jax.tree.leaves(self._state.train.params)
      ),
      steps=experiment.total_steps,
    )
    before = run_directory.read_record(self._workdir)
    if resumed and before:
      record['started'] = before['started']
    record['wall_time_s'] = self._clock.seconds
    _logger.info(
      '%s on %s, seed %d: %d parameters, %d steps in %d epochs, on %d x %s%s',
      config.method.name,
      config.problem,
      config.seed,
      record['num_parameters'],
      experiment.total_steps,
      config.epochs,
      record['num_devices'],
      record['device'],
      f'; going on after step {self._step}' if self._step else '',
    )
    return record

  def _write_record(self):
    if distributed.is_main():
      run_directory.write_record(self._workdir, self._record)


# What a checkpoint would say of a run that has taken no step.
_AT_START: dict[str, Any] = {'step': 0, 'wall_time_s': 0.0, 'evaluated': True}


def _last_evaluation(lines):
  for line in reversed(lines):
    values = writers.evaluation(line)
    if values:
      return values
  return {}
