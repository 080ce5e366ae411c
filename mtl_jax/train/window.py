"""Averages of training metrics, kept on the device until they are logged.

Adding a step costs no transfer. The sums are part of a checkpoint, so that a
resumed run logs the same averages as an uninterrupted run.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import math
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class NonFiniteLossError(FloatingPointError):
  """The loss of a task is not finite."""


class Window(NamedTuple):
  """The metrics of the steps since the last line of the log.

  Attributes:
    sums: sum of each metric; for a task's metric, over the steps with its
      labels.
    count: number of steps, int32.
    first_bad: for each task the first step after which its loss was not finite,
      0 if there is none; steps count from 1.
  """

  sums: dict[str, Any]
  count: Any
  first_bad: dict[str, Any]


def empty(metrics: Sequence[str], task_names: Sequence[str]) -> Window:
  """A window without steps, in NumPy arrays."""
  return Window(
    sums={name: np.zeros((), np.float32) for name in metrics},
    count=np.zeros((), np.int32),
    first_bad={task: np.zeros((), np.int32) for task in task_names},
  )


def add(
  window: Window, metrics: Mapping[str, jax.Array], step: jax.Array
) -> Window:
  """The window with one more step; pure.

  Args:
    window: the window.
    metrics: scalars. For every task `'<task>/loss'`, and `'<task>/present'`, 0
      if this step had no labels for it: then its numbers are not counted.
    step: number of the step, counted from 1.

  Returns:
    The new window.
  """

  def counted(name):
    task = _task(name, window.first_bad)
    if task is None:
      return metrics[name]
    # A select instead of a product: an absent task's number may be anything.
    return jnp.where(metrics[f'{task}/present'] > 0, metrics[name], 0)

  def is_bad(task):
    return ~jnp.isfinite(counted(f'{task}/loss'))

  return Window(
    sums={name: window.sums[name] + counted(name) for name in window.sums},
    count=window.count + 1,
    first_bad={
      task: jnp.where((bad == 0) & is_bad(task), step, bad)
      for task, bad in window.first_bad.items()
    },
  )


def means(window: Window) -> dict[str, float]:
  """The mean of each metric over the steps in a window on the host.

  A task's metrics are averaged over the steps with labels for it, and are NaN
  without such steps. `'<task>/present'`, the share of those steps, is included
  if it is below 1.

  Args:
    window: the window.

  Returns:
    `{name: mean}`.
  """
  count, values = int(window.count), {}
  for name, x in window.sums.items():
    task = _task(name, window.first_bad)
    if task is not None and name == f'{task}/present':
      if x < count:
        values[name] = float(x) / count
      continue
    steps = count if task is None else int(window.sums[f'{task}/present'])
    values[name] = float(x) / steps if steps else math.nan
  return values


def _task(name, task_names):
  """The task of a metric; None for a metric of all tasks."""
  task = name.partition('/')[0]
  return task if task in task_names else None


def check_finite(window: Window) -> None:
  """Raises a `NonFiniteLossError` with task and step for a non-finite loss."""
  bad = {task: int(x) for task, x in window.first_bad.items() if x > 0}
  if bad:
    step = min(bad.values())
    tasks = [repr(task) for task in bad if bad[task] == step]
    raise NonFiniteLossError(
      f'the loss of {" and ".join(tasks)} is not finite at step {step}; a '
      'smaller learning rate or gradient clipping (optimizer.clip) may help'
    )


def check_evaluation(values: Mapping[str, float], step: int) -> None:
  """The same for `{'split/task/loss': value}` from an evaluation."""
  for name, value in values.items():
    if name.endswith('/loss') and not np.isfinite(value):
      raise NonFiniteLossError(f'{name} is not finite after step {step}')
