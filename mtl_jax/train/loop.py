"""The training loop, from a config and a folder to the metrics of a run.

After a step the order is fixed: log, evaluate, save. A checkpoint is thus never
ahead of the log. A restarted run cuts the log back to its checkpoint and
continues as if it had never stopped.
"""

from collections.abc import Iterator
import contextlib
import logging
import math
import os
import pathlib
from typing import Any

import jax
import ml_collections

from mtl_jax.train import checkpoint
from mtl_jax.train import checks
from mtl_jax.train import distributed
from mtl_jax.train import experiment as experiments
from mtl_jax.train import lock
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
  """Trains and evaluates; continues where an earlier call stopped.

  Everything is a function of the config: a run that was stopped or killed and
  started again ends with the same numbers as an uninterrupted run, except for
  times. Ctrl-C and SIGTERM save a checkpoint and end the run.

  Args:
    config: of `configs/`.
    workdir: the run directory, for this run only.
    overwrite_config: whether to continue in a directory with another config.
      Both configs must be the same run, with one problem, data, batch size,
      seed, model and method.

  Returns:
    The last evaluation, `{'test/<task>/<metric>': value, ...}`.

  Raises:
    ValueError: if the directory has another config (the message lists the keys
      that differ), another process trains there, its checkpoints do not fit or
      none can be read, or a value in the config is out of range. The
      directory's `config.json`, `run.json` and `metrics.jsonl` are then
      unchanged.
    NonFiniteLossError: if a loss is not finite; the message names task and
      step.
    Interrupted: after a signal, when everything is saved.
  """
  if '://' in str(workdir):
    raise ValueError(
      f'workdir must be a folder of a mounted file system, got {workdir!r}; a '
      'bucket can be mounted, with gcsfuse for example'
    )
  # First, because JAX would not name the key of a wrong precision.
  checks.check_config(config)
  with jax.default_matmul_precision(config.precision):
    return _train(config, pathlib.Path(workdir), overwrite_config)


def _train(config, workdir, overwrite_config):
  plain = config.to_dict()
  record = run_directory.read_record(workdir)
  if record and record['finished']:
    if not run_directory.config_changes(workdir, plain):
      _logger.info('%s holds this run, finished; nothing to do.', workdir)
      return _last_evaluation(writers.read_lines(workdir))
  with _alone_in(workdir):
    changes = run_directory.config_changes(workdir, plain)
    if changes and not overwrite_config:
      raise ValueError(
        f'workdir {workdir} holds a run of another config; name another one, '
        'or pass --overwrite_config to go on there with this one:\n  '
        + '\n  '.join(changes)
      )
    experiment = experiments.make_experiment(config)
    # Process 0 changes the files after every process has read them.
    distributed.wait_for_all('workdir is checked')
    checkpoints = checkpoint.Checkpoints(workdir, keep=config.keep_checkpoints)
    with contextlib.closing(checkpoints):
      return _Run(experiment, workdir, checkpoints, changes).run()


@contextlib.contextmanager
def _alone_in(workdir: pathlib.Path) -> Iterator[None]:
  """Process 0 holds the lock of the directory, for all processes."""
  with contextlib.ExitStack() as stack:
    refusal = None
    if distributed.is_main():
      try:
        stack.enter_context(lock.hold(workdir))
      except ValueError as error:
        refusal = error
    # The others would wait for a process that has ended.
    if distributed.agree(refusal is not None):
      raise refusal or ValueError(f'process 0 refuses workdir {workdir}')
    yield


class _Run:
  """One start of a run: its state, its files and its clock."""

  def __init__(
    self,
    experiment: experiments.Experiment,
    workdir: pathlib.Path,
    checkpoints: checkpoint.Checkpoints,
    changes: list[str],
  ):
    self._experiment = experiment
    self._config = experiment.config
    self._workdir = workdir
    self._checkpoints = checkpoints
    fresh = experiment.init()
    restored = checkpoints.restore(fresh)
    self._state, info = restored or (fresh, _AT_START)
    self._step = info['step']
    # Checkpoints from older versions lack this entry.
    self._evaluation = info.get('evaluation', _AT_START['evaluation'])
    if restored is not None:
      self._check_goes_on(info, changes)
    # A run that ends here because epochs is smaller now is evaluated here.
    ends_here = self._step == experiment.total_steps
    self._evaluated = info['evaluated'] and not (
      ends_here and self._evaluation['step'] != self._step
    )
    self._clock = progress.Clock(info['wall_time_s'])
    # The step and time at which the previous window ended.
    self._mark = (self._step, self._clock.seconds)
    # A full window that is not yet logged, with its last step.
    self._full: tuple[int, windows.Window] | None = None
    self._record = self._make_record(restored is not None, changes)
    # Raises if it cannot be read, before anything is written.
    writers.read_lines(workdir)
    radius.warn_if_too_small(self._config, self._state.train.params['shared'])

  def run(self) -> dict[str, float]:
    """Takes the remaining steps."""
    with contextlib.ExitStack() as stack:
      stop = stack.enter_context(stopping.StopRequest())
      # Everything that may fail at the start comes before any change to a file.
      step, seconds = self._experiment.compile_step(self._state)
      self._record['compile_time_s'] = seconds
      _logger.info('Compiled in %.1f s.', seconds)
      self._write_record()
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
    return self._evaluation['values']

  def _check_goes_on(self, info, changes):
    """Raises if a checkpoint belongs to a different run than the config."""
    config, workdir, step = self._config, self._workdir, self._step
    other = [x for x in changes if x.startswith(_OF_ONE_RUN)]
    if other:
      smaller = any(x.startswith('batch_size:') for x in other)
      raise ValueError(
        f'workdir {workdir} holds {step} steps of another run, which this '
        'config cannot go on with; name another workdir, or remove its '
        'checkpoints to start anew'
        + ('; micro_batches saves memory with the same batch' * smaller)
        + ':\n  '
        + '\n  '.join(other)
      )
    steps_now = self._experiment.steps_per_epoch
    steps_then = info.get('steps_per_epoch', steps_now)
    if steps_then != steps_now:
      raise ValueError(
        f'an epoch of {config.problem} has {steps_now} steps, but had '
        f'{steps_then} when the checkpoint in {workdir} was written: the data '
        'are others'
      )
    if step > self._experiment.total_steps:
      raise ValueError(
        f'epochs is {config.epochs}, which ends at step '
        f'{self._experiment.total_steps}, but the checkpoint in {workdir} is '
        f'of step {step}'
      )
    if step % config.steps_per_call:
      raise ValueError(
        f'steps_per_call is {config.steps_per_call}, which does not divide '
        f'{step}, the step of the checkpoint in {workdir}'
      )
    untrained = [x for x in changes if not x.startswith(_WITHOUT_TRAINING)]
    if step == self._experiment.total_steps and untrained:
      raise ValueError(
        f'the run in {workdir} is at its last step, {step}: nothing would be '
        'trained with this config; name another workdir, or set more epochs:'
        '\n  ' + '\n  '.join(untrained)
      )

  def _take_steps(self, step, stop):
    """Trains to the end or to a stop request; returns whether it stopped."""
    config, total = self._config, self._experiment.total_steps
    epochs = config.eval_every_epochs * self._experiment.steps_per_epoch
    for batch in self._experiment.train_batches(self._step):
      with jax.transfer_guard('disallow'):
        self._state = step(self._state, batch)
      self._step += config.steps_per_call
      # The window before this call: the device works meanwhile.
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
    # All processes must stop after the same step, and asking costs a transfer.
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
      self._evaluation = {'step': self._step, 'values': values}
      self._progress.say(self._describe(values))
      windows.check_evaluation(values, self._step)

  def _save(self):
    self._log()
    with self._clock.paused(self._state):
      # A run must not continue from a state that is not finite.
      windows.check_finite(jax.device_get(self._state.window))
      if self._writer is not None:
        self._writer.sync()
      info = {
        'step': self._step,
        'wall_time_s': self._clock.seconds,
        'evaluated': self._evaluated,
        'evaluation': self._evaluation,
        'steps_per_epoch': self._experiment.steps_per_epoch,
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

  def _make_record(self, resumed, changes):
    config, experiment = self._config, self._experiment
    record = run_directory.make_record(
      experiment.problem,
      config.to_dict(),
      num_parameters=sum(
        x.size for x in jax.tree.leaves(self._state.train.params)
      ),
      steps=experiment.total_steps,
    )
    before = run_directory.read_record(self._workdir)
    if resumed and before:
      record['started'] = before['started']
      record['config_changes'] = before.get('config_changes', [])
    if resumed and changes:
      record['config_changes'] += [{'step': self._step, 'changes': changes}]
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


# The checkpoint information for a run without any step.
_AT_START: dict[str, Any] = {
  'step': 0,
  'wall_time_s': 0.0,
  'evaluated': True,
  'evaluation': {'step': 0, 'values': {}},
}

# Beginnings of lines in `config_changes` for keys that a run cannot change
# midway. Otherwise the whole run would be reported under the last values, or
# its epochs would be counted with two batch sizes.
_OF_ONE_RUN = (
  *('problem:', 'seed:', 'batch_size:', 'data.kind:', 'data.split:'),
  *('model.name:', 'model.sharing:'),
  *('method.name:', 'method.aggregator:', 'method.weighting:'),
)
# Keys that may change when no step is left.
_WITHOUT_TRAINING = (
  *('epochs:', 'data.data_dir:', 'data.source_dir:'),
  *('log_every_steps:', 'checkpoint_every_steps:', 'keep_checkpoints:'),
)


def _last_evaluation(lines):
  for line in reversed(lines):
    values = writers.evaluation(line)
    if values:
      # The log has null for a non-finite number.
      return {k: math.nan if x is None else x for k, x in values.items()}
  return {}
