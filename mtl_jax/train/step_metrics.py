"""The report of a step: losses, metrics and diagnostics, by name."""

import dataclasses

import jax
import jax.numpy as jnp

from mtl_jax import transforms
from mtl_jax.metrics import averages

# Diagnostics of an aggregation, with the names under which they are logged.
_SCALARS = ('conflict', 'mean_cosine', 'residual')
_PER_TASK = {'task_weights': 'weight', 'gradient_norms': 'gradient_norm'}


def with_loss(problem):
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


def metric_sums(problem, predictions, batch):
  """Sums of every metric of every task, {task: {metric: tree}}."""
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


def finish(problem, sums):
  """The metrics from their sums, {'task/metric': scalar}."""
  return {
    f'{task.name}/{metric.name}': metric.finish(sums[task.name][metric.name])
    for task in problem.tasks
    for metric in task.metrics
  }


def of_step(problem, param_labels, found, active, states):
  """The report of a step, {name: scalar}; see `make_train_step`.

  Args:
    problem: the problem.
    param_labels: see `mtl_jax.shared_only`.
    found: the result of the joint update.
    active: bool [T], the tasks whose labels changed the parameters.
    states: states of the joint update and the optimizer after the step.
  """
  names = problem.task_names
  present = active.astype(found.losses.dtype)
  total = jnp.sum(jnp.where(active, found.losses, 0))
  return {
    'loss': total / jnp.maximum(jnp.sum(present), 1),
    **{f'{task}/loss': found.losses[i] for i, task in enumerate(names)},
    **{f'{task}/present': present[i] for i, task in enumerate(names)},
    **finish(problem, found.aux.sum),
    **_shown(states, names, param_labels, found.grads),
  }


def _shown(states, names, param_labels, tree):
  """Diagnostics as scalars, without a prefix for the loss gradients.

  With several aggregators, as for groups of parameters, their place follows the
  name. If nothing is shared, tasks cannot conflict and only skipped steps are
  reported.
  """
  labels = param_labels(tree) if callable(param_labels) else param_labels
  together = 'shared' in jax.tree.leaves(labels)
  metrics = {}
  left_out = transforms.left_out(states)
  seen = [transforms.diagnostics(state) for state in states]
  for name, value in [item for one in seen for item in one.items()]:
    *parts, kind = name.split('/')
    flat = 'flat' in parts
    place = ''.join(f'/{p}' for p in parts if p not in ('loss', 'flat'))
    if kind == 'skipped':
      # Per step, so that the mean over steps is the share of skipped ones.
      metrics[kind] = left_out.astype(jnp.float32)
    elif not together:
      continue
    elif kind in _SCALARS:
      metrics[f'{"flat/" if flat else ""}{kind}{place}'] = value
    elif kind in _PER_TASK:
      shown = f'{"flat_" if flat else ""}{_PER_TASK[kind]}{place}'
      for i, task in enumerate(names):
        metrics[f'{task}/{shown}'] = value[i]
  return metrics
