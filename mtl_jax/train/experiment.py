"""The problem, data, mesh and jitted functions for a config."""

from collections.abc import Callable
from collections.abc import Iterator
import dataclasses
import logging
import time
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from mtl_jax import gradients
from mtl_jax import models
from mtl_jax import problems
from mtl_jax import types
from mtl_jax.data import pipeline
from mtl_jax.train import build
from mtl_jax.train import calls
from mtl_jax.train import checks
from mtl_jax.train import distributed
from mtl_jax.train import evaluate
from mtl_jax.train import objective as objectives
from mtl_jax.train import placement
from mtl_jax.train import sharding
from mtl_jax.train import step as steps
from mtl_jax.train import window as windows

_logger = logging.getLogger(__name__)


class LoopState(NamedTuple):
  """The state that a step changes and a checkpoint holds.

  Attributes:
    train: parameters, the optimizer's state and so on.
    window: the sums of the metrics since the last line of the log.
  """

  train: steps.TrainState
  window: windows.Window


@dataclasses.dataclass(frozen=True)
class Experiment:
  """A config turned into functions; it does not change during a run.

  Attributes:
    config: the config.
    problem: the problem.
    model: the model.
    mesh: all devices of all processes.
    sources: the data, `{'train': source, 'test': source}` and, if the config
      keeps one, `'validation'`.
    device_data: the training split on the devices; None if it is on the host.
    steps_per_epoch: number of steps in an epoch.
    total_steps: number of steps in the whole run.
    init: `() -> LoopState`, the initial state of a run.
    step: `(LoopState, inputs) -> LoopState`, jitted; donates the state. Takes
      `config.steps_per_call` steps; see `mtl_jax.train.calls`.
    eval_step: `(params, model_state, batch, sums) -> sums`, jitted.
    empty_window: a window without steps, on the host.
    empty_sums: the sums of an evaluation before its first batch, on the host.
  """

  config: ml_collections.ConfigDict
  problem: types.Problem
  model: types.Model
  mesh: jax.sharding.Mesh
  sources: dict[str, types.Source]
  device_data: types.Batch | None
  steps_per_epoch: int
  total_steps: int
  init: Callable[[], LoopState]
  step: Callable[[LoopState, types.Batch], LoopState]
  eval_step: Callable[..., Any]
  empty_window: windows.Window
  empty_sums: Any

  def compile_step(
    self, state: LoopState
  ) -> tuple[Callable[[LoopState, types.Batch], LoopState], float]:
    """The compiled step, and the seconds of the compilation.

    A compiled function cannot be compiled again by accident: it raises for an
    argument with another shape.
    """
    start = time.perf_counter()
    batch = _any_batch(self._source(), self.config, self.mesh)
    shapes = calls.stacked_shapes(batch, self.config.steps_per_call)
    compiled = self.step.lower(state, self._inputs(shapes)).compile()
    return compiled, time.perf_counter() - start

  def train_batches(self, start_step: int) -> Iterator[types.Batch]:
    """The inputs of each call from a step on, on the mesh."""
    steps_per_call = self.config.steps_per_call
    for batch in pipeline.train_batches(
      self._source(),
      seed=self.config.seed,
      batch_size=self.config.batch_size,
      num_steps=self.total_steps,
      start_step=start_step,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
      steps_per_call=steps_per_call,
    ):
      batch = distributed.put_batch(batch, self.mesh, _row_axis(steps_per_call))
      yield self._inputs(batch)

  def _source(self):
    """The source of a step's batch: examples, or their indices."""
    source = self.sources['train']
    if self.device_data is None:
      return source
    return placement.IndexSource(len(source))

  def _inputs(self, batch):
    return batch if self.device_data is None else (self.device_data, batch)

  def new_window(self) -> windows.Window:
    """A window without steps, on the mesh."""
    return jax.device_put(self.empty_window, distributed.replicated(self.mesh))

  def evaluate(self, state: steps.TrainState) -> dict[str, float]:
    """`{'split/task/name': value}` over every split but training's."""
    values = {}
    for split in ('validation', 'test'):
      if split in self.sources:
        for name, value in self._evaluate(split, state).items():
          values[f'{split}/{name}'] = value
    return values

  def _evaluate(self, split, state):
    sums = jax.device_put(self.empty_sums, distributed.replicated(self.mesh))
    for batch in pipeline.eval_batches(
      self.sources[split],
      batch_size=self.config.batch_size,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
    ):
      batch = distributed.put_batch(batch, self.mesh)
      sums = self.eval_step(state.params, state.model_state, batch, sums)
    return evaluate.finish_eval(self.problem, jax.device_get(sums))


def make_experiment(config: ml_collections.ConfigDict) -> Experiment:
  """Builds the experiment for a config; compiles nothing yet.

  Process 0 prepares missing data before the other processes continue.

  Args:
    config: of `configs/`.

  Returns:
    An `Experiment`.

  Raises:
    ValueError: if a value in the config is out of range; the message names it.
  """
  checks.check_config(config)
  problem = problems.by_name(config.problem)
  mesh = distributed.make_mesh(task_devices=config.parallel.task_devices)
  layout = sharding.Layout(
    mesh, problem.task_names, parameters=config.parallel.parameters
  )
  distributed.check_batch_size(config.batch_size, mesh, config.micro_batches)
  axis_name = distributed.DATA_AXIS if checks.per_device(config) else None
  trunk = models.by_name(config.model.name, **config.model.kwargs)
  # Trunks with BatchNorm have the attribute.
  if config.parallel.batch_norm == 'global' and hasattr(
    trunk, 'batch_norm_axis'
  ):
    trunk = trunk.clone(batch_norm_axis=axis_name)
  model = models.make_model(trunk, problem.tasks, sharing=config.model.sharing)
  model = models.in_dtype(model, config.compute_dtype)
  sources = _load(problem, config.data)
  epoch = pipeline.steps_per_epoch(sources['train'], config.batch_size)
  total_steps = config.epochs * epoch
  calls.check_steps_per_call(config, epoch)
  losses = layout.around(
    gradients.task_losses(
      objectives.objective(problem, model, axis_name=axis_name),
      problem.task_names,
      engine=config.engine,
      micro_batches=config.micro_batches,
      axis_name=axis_name,
    )
  )
  joint = build.joint_update(
    config, problem.task_names, axis_name=axis_name, steps_per_epoch=epoch
  )
  tx = build.optimizer(config, total_steps)
  step = steps.make_train_step(problem, losses, joint, tx, seed=config.seed)
  if axis_name is not None:
    step = sharding.per_device(step, mesh)
  eval_step = evaluate.make_eval_step(problem, model)

  def init(batch):
    return steps.init_state(
      problem, model, joint, tx, seed=config.seed, batch=batch
    )

  def step_and_add(state, batch):
    train, metrics = step(state.train, batch)
    return LoopState(train, windows.add(state.window, metrics, train.step))

  def eval_and_add(params, model_state, batch, sums):
    more = eval_step(layout.gather(params), model_state, batch)
    return jax.tree.map(jnp.add, sums, more)

  whole, rows = distributed.replicated(mesh), distributed.batch_sharded(mesh)
  batch = _any_batch(sources['train'], config, mesh)
  state = jax.eval_shape(init, batch)
  _, metrics = jax.eval_shape(step, state, batch)
  inputs = distributed.batch_sharded(mesh, _row_axis(config.steps_per_call))
  device_data = None
  if config.data.placement == 'device':
    device_data = placement.put(sources['train'], mesh)
    inputs = (whole, inputs)
  sums = jax.eval_shape(eval_step, state.params, state.model_state, batch)
  empty_window = windows.empty(sorted(metrics), problem.task_names)
  shards = layout.of_state(state)
  loop_shards = LoopState(shards, whole)
  return Experiment(
    config=config,
    problem=problem,
    model=model,
    mesh=mesh,
    sources=sources,
    device_data=device_data,
    steps_per_epoch=epoch,
    total_steps=total_steps,
    init=lambda: LoopState(
      jax.jit(init, out_shardings=shards)(batch),
      jax.device_put(empty_window, whole),
    ),
    step=jax.jit(
      calls.make_call(
        step_and_add,
        steps_per_call=config.steps_per_call,
        placement=config.data.placement,
      ),
      donate_argnums=0,
      in_shardings=(loop_shards, inputs),
      out_shardings=loop_shards,
    ),
    eval_step=jax.jit(
      eval_and_add,
      donate_argnums=3,
      in_shardings=(shards.params, whole, rows, whole),
      out_shardings=whole,
    ),
    empty_window=empty_window,
    empty_sums=jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), sums),
  )


def _load(problem, data):
  """The sources of all splits; process 0 prepares missing data."""
  options = {
    'kind': data.kind,
    'data_dir': data.data_dir,
    'source_dir': data.source_dir,
    'split_scheme': data.split,
  }
  splits = ['train', 'validation', 'test']
  if data.split == 'paper':
    splits.remove('validation')
  _logger.info('Loading %s; the first time it is prepared.', problem.name)
  with distributed.process_zero_first('data are prepared'):
    if data.kind == 'real' and problem.prepare is not None:
      problem.prepare(**options)
  return {split: problem.load(split, **options) for split in splits}


def _row_axis(steps_per_call):
  """The axis of the examples in a call's inputs."""
  return 0 if steps_per_call == 1 else 1


def _any_batch(source, config, mesh):
  """A batch for its shapes."""
  rows = config.batch_size // jax.process_count()
  indices = np.arange(rows) % len(source)
  return distributed.put_batch(source.__getitems__(indices), mesh)
