"""From a config to an optax chain; the only place where one is built."""

from collections.abc import Sequence
import inspect
from typing import Any

import optax

from mtl_jax import transforms

_SCHEDULES = ('constant', 'cosine', 'step')


def make_aggregator(
  method: Any, task_names: Sequence[str], seed: int = 0
) -> transforms.Aggregator:
  """The method of a config over shared parameters and heads.

  Args:
    method: an entry of `configs/methods.py`: `aggregator` (a name in
      `mtl_jax.transforms`), `kwargs`, `head_scale` and `flat`, the arguments of
      `flat_minima` or None.
    task_names: the tasks.
    seed: given to a random method whose `kwargs` name none.

  Returns:
    An aggregator over the whole tree of parameters, with diagnostics.

  Raises:
    ValueError: if there is no aggregator of that name, or `head_scale` is given
      beside `flat`, which has its own.
  """
  names = tuple(filter(_makes_aggregator, transforms.__all__))
  if method.aggregator not in names:
    raise ValueError(
      f'method.aggregator must be one of {names}, got {method.aggregator!r}'
    )
  if method.flat is not None and method.head_scale is not None:
    raise ValueError(
      f'method.head_scale is {method.head_scale!r}, which a method with '
      'method.flat does not use; set method.flat.head_scale'
    )
  factory = getattr(transforms, method.aggregator)
  kwargs = dict(method.kwargs)
  if 'seed' in inspect.signature(factory).parameters:
    kwargs.setdefault('seed', seed)
  aggregator = factory(**kwargs, num_tasks=len(task_names))
  if method.flat is None:
    return transforms.shared_only(
      aggregator, task_names, head_scale=method.head_scale
    )
  flat = dict(method.flat)
  return transforms.flat_minima(aggregator, task_names, flat.pop('rho'), **flat)


def _makes_aggregator(name):
  """Whether it takes a number of tasks and needs nothing else.

  Wrappers of aggregators need one, and `from_gram` needs a function.
  """
  value = getattr(transforms, name)
  if not inspect.isfunction(value):
    return False
  parameters = inspect.signature(value).parameters
  return 'num_tasks' in parameters and all(
    p.default is not p.empty for p in parameters.values()
  )


def learning_rate_schedule(optimizer: Any, total_steps: int) -> optax.Schedule:
  """The learning rate over the steps of a run.

  Args:
    optimizer: `learning_rate`, and `schedule`: `'constant'`, `'cosine'` (down
      to zero) or `'step'` (halved at half of the run, as in the MTAN protocol).
    total_steps: length of the run.

  Returns:
    A function of the step.

  Raises:
    ValueError: for another schedule or a learning rate that is not positive.
  """
  rate = optimizer.learning_rate
  if not 0 < rate < float('inf'):
    raise ValueError(f'optimizer.learning_rate must be positive, got {rate}')
  if optimizer.schedule not in _SCHEDULES:
    raise ValueError(
      f'optimizer.schedule must be one of {_SCHEDULES}, got '
      f'{optimizer.schedule!r}'
    )
  if optimizer.schedule == 'cosine':
    return optax.cosine_decay_schedule(rate, total_steps)
  if optimizer.schedule == 'step':
    return optax.piecewise_constant_schedule(rate, {total_steps // 2: 0.5})
  return optax.constant_schedule(rate)


def make_tx(
  config: Any, task_names: Sequence[str], total_steps: int
) -> optax.GradientTransformationExtraArgs:
  """The optimizer: aggregate, clip, Adam, decoupled decay, learning rate.

  Anything before the aggregation would act on the stack of task gradients.

  Args:
    config: reads `config.method`, `config.optimizer` and `config.seed`.
    task_names: the tasks.
    total_steps: length of the run, for the learning rate.

  Returns:
    An optax transformation from task gradients to the step.

  Raises:
    ValueError: for values that are out of range.
  """
  optimizer = config.optimizer
  parts = [make_aggregator(config.method, task_names, config.seed)]
  if optimizer.clip is not None:
    if not optimizer.clip > 0:
      raise ValueError(
        f'optimizer.clip must be positive or None, got {optimizer.clip}'
      )
    parts.append(optax.clip_by_global_norm(optimizer.clip))
  parts.append(optax.scale_by_adam())
  if optimizer.weight_decay < 0:
    raise ValueError(
      'optimizer.weight_decay must not be negative, got '
      f'{optimizer.weight_decay}'
    )
  if optimizer.weight_decay:
    parts.append(optax.add_decayed_weights(optimizer.weight_decay))
  rate = learning_rate_schedule(optimizer, total_steps)
  parts.append(optax.scale_by_learning_rate(rate))
  return optax.chain(*parts)
