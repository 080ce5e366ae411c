"""The joint update: one pure function from a state and a batch to the next.

It names no method. Whatever the optimizer is, it is handed the task gradients,
the losses, which tasks are present, and a way to evaluate gradients elsewhere;
it takes what it needs of them, and `jit` drops the rest.
"""

from collections.abc import Callable
import dataclasses
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtl_jax import gradients
from mtl_jax import losses
from mtl_jax import transforms
from mtl_jax import types
from mtl_jax.metrics import averages

# Diagnostics of a task gradient aggregation, by the name they are logged under.
_SCALARS = {
  'conflict': 'conflict',
  'mean_cosine': 'mean_cosine',
  'residual': 'residual',
}
_PER_TASK = {'task_weights': 'weight', 'gradient_norms': 'gradient_norm'}


class TrainState(NamedTuple):
  """All that changes from step to step.

  Attributes:
    step: number of updates so far, int32.
    params: parameters.
    model_state: what the model carries besides, such as running statistics.
    opt_state: the optimizer's state.
  """

  step: jax.Array
  params: types.Params
  model_state: types.ModelState
  opt_state: Any


def init_state(
  problem: types.Problem,
  model: types.Model,
  tx: optax.GradientTransformation,
  *,
  seed: int,
  batch: types.Batch,
) -> TrainState:
  """The state training starts from; a function of the seed.

  Args:
    problem: the problem.
    model: the model.
    tx: the optimizer; its first part is an aggregator.
    seed: decides the initial parameters.
    batch: any batch; its shapes are what matters.

  Returns:
    A `TrainState` at step 0.
  """
  key = jax.random.fold_in(jax.random.key(seed), 0)
  params, model_state = model.init(key, problem.preprocess(batch))
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    model_state=model_state,
    opt_state=tx.init(params),
  )


def task_losses(
  problem: types.Problem, predictions: types.Predictions, batch: types.Batch
) -> dict[str, jax.Array]:
  """Mean loss of each task over its present labels, {task: scalar}."""
  return {
    task.name: losses.masked_loss(
      task.loss,
      predictions[task.name],
      batch['labels'][task.name],
      batch['mask'][task.name],
    )
    for task in problem.tasks
  }


def make_train_step(
  problem: types.Problem,
  model: types.Model,
  tx: optax.GradientTransformation,
  *,
  seed: int = 0,
  param_labels: transforms.ParamLabels = transforms.default_labels,
  engine: str = 'unroll',
  micro_batches: int = 1,
) -> Callable[
  [TrainState, types.Batch], tuple[TrainState, dict[str, jax.Array]]
]:
  """Makes the joint update of all tasks.

  Args:
    problem: the problem.
    model: the model.
    tx: the optimizer: an aggregator (in `shared_only`, or `flat_minima`), and
      whatever of optax comes after it.
    seed: decides what dropout draws, together with the step.
    param_labels: see `mtl_jax.shared_only`; the same that `tx` was made with.
    engine: see `mtl_jax.task_grad`.
    micro_batches: see `mtl_jax.task_grad`. The statistics of BatchNorm are
      those of a slice, and the running ones move by their mean.

  Returns:
    A pure function `(state, batch) -> (state, metrics)`, to be jitted with the
    state donated. Every quantity in it is that of the whole batch, so that
    under `jit` any sharding gives the same numbers. `metrics` are scalars:
    `'loss'`, the mean over the tasks that have labels in this batch; per task
    `'<task>/loss'` and its metrics at the unperturbed parameters,
    `'<task>/present'`, 1 if it has labels in this batch and 0 if not (its other
    numbers mean nothing then); and what `mtl_jax.diagnostics` shows.
  """
  names = problem.task_names

  def step(state: TrainState, batch: types.Batch):
    batch = problem.preprocess(batch)
    # The same key in both passes and for all tasks: the same dropout masks.
    key = jax.random.fold_in(jax.random.key(seed), state.step + 1)

    def loss_fn(params, batch):
      predictions, model_state = model.apply(
        params, state.model_state, batch, train=True, key=key
      )
      sums = _metric_sums(problem, predictions, batch)
      return task_losses(problem, predictions, batch), (model_state, sums)

    at, at_each = gradients.task_grad(
      loss_fn,
      names,
      param_labels=param_labels,
      engine=engine,
      micro_batches=micro_batches,
      has_aux=True,
    )
    (losses, (model_state, sums)), task_grads = at(state.params, batch)
    if micro_batches > 1:
      model_state = jax.tree.map(lambda x: jnp.mean(x, axis=0), model_state)
      sums = jax.tree.map(lambda x: jnp.sum(x, axis=0), sums)
    active = jnp.stack([jnp.any(batch['mask'][task] > 0) for task in names])
    labels = (
      param_labels(state.params) if callable(param_labels) else (param_labels)
    )
    updates, opt_state = tx.update(
      task_grads,
      state.opt_state,
      state.params,
      losses=losses,
      active=active,
      grad_fn=lambda task_params: at_each(task_params, batch)[1],
    )
    present = active.astype(losses.dtype)
    metrics = {
      'loss': present @ losses / jnp.maximum(jnp.sum(present), 1),
      **{f'{task}/loss': losses[i] for i, task in enumerate(names)},
      **{f'{task}/present': present[i] for i, task in enumerate(names)},
      **_finish(problem, sums),
      **(_shown(opt_state, names) if _anything_shared(labels) else {}),
    }
    state = TrainState(
      step=state.step + 1,
      params=optax.apply_updates(state.params, updates),
      model_state=model_state,
      opt_state=opt_state,
    )
    return state, metrics

  return step


def make_eval_step(
  problem: types.Problem, model: types.Model
) -> Callable[..., Any]:
  """Makes the evaluation of one batch.

  Args:
    problem: the problem.
    model: the model.

  Returns:
    A pure function `(params, model_state, batch) -> sums`; a tree of arrays to
    be added up over the batches of a split and given to `finish_eval`.
  """
  with_loss = _with_loss(problem)

  def step(params, model_state, batch):
    batch = problem.preprocess(batch)
    predictions, _ = model.apply(params, model_state, batch, train=False)
    return _metric_sums(with_loss, predictions, batch)

  return step


def finish_eval(problem: types.Problem, sums: Any) -> dict[str, float]:
  """The numbers of a split from its sums.

  Args:
    problem: the problem.
    sums: what the evaluation step returned, added up over all batches.

  Returns:
    `{'<task>/loss': mean loss, '<task>/<metric>': value}`; NaN for a task
    without a label in the split.
  """
  values = _finish(_with_loss(problem), sums)
  return {name: float(value) for name, value in values.items()}


def _with_loss(problem):
  """The problem with the loss of each task as its first metric."""
  return dataclasses.replace(
    problem,
    tasks=tuple(
      dataclasses.replace(
        task,
        metrics=(
          averages.average('loss', task.loss, higher_is_better=False),
          *task.metrics,
        ),
      )
      for task in problem.tasks
    ),
  )


def _metric_sums(problem, predictions, batch):
  return {
    task.name: {
      metric.name: metric.accumulate(
        predictions[task.name],
        batch['labels'][task.name],
        batch['mask'][task.name],
      )
      for metric in task.metrics
    }
    for task in problem.tasks
  }


def _finish(problem, sums):
  return {
    f'{task.name}/{metric.name}': metric.finish(sums[task.name][metric.name])
    for task in problem.tasks
    for metric in task.metrics
  }


def _anything_shared(labels):
  """Whether tasks can conflict at all; single-task networks cannot."""
  return 'shared' in jax.tree.leaves(labels)


def _shown(opt_state, names):
  """Diagnostics as scalars: those of the loss gradients without a prefix."""
  metrics = {}
  for name, value in transforms.diagnostics(opt_state).items():
    part, _, kind = name.rpartition('/')
    prefix = 'flat_' if part.endswith('flat') else ''
    if kind in _SCALARS:
      metrics[prefix.replace('_', '/') + _SCALARS[kind]] = value
    elif kind in _PER_TASK:
      for i, task in enumerate(names):
        metrics[f'{task}/{prefix}{_PER_TASK[kind]}'] = value[i]
  return metrics
