"""From a config to an optax chain; the only place where one is built."""

from collections.abc import Sequence
import inspect
import typing
from typing import Any

import jax
import optax

from mtl_jax import transforms
from mtl_jax.models import arguments
from mtl_jax.transforms.contract import labels

# What the trainer gives to `flat_minima`, or a config cannot.
_NOT_OF_FLAT = (
  *('aggregator', 'task_names', 'perturbation', 'combiner', 'param_labels'),
)
_SCHEDULES = ('constant', 'cosine', 'step')


def make_aggregator(
  method: Any,
  task_names: Sequence[str],
  seed: int = 0,
  *,
  axis_name: str | None = None,
  perturbation: str = 'global',
  **given: Any,
) -> transforms.Aggregator | None:
  """The method of a config over shared parameters and heads.

  Args:
    method: an entry of `configs/methods.py`: `aggregator` (a name in
      `mtl_jax.transforms`) or `weighting`, `kwargs`, `head_scale` and `flat`,
      the arguments of `flat_minima` or None.
    task_names: the tasks.
    seed: given to a random method whose `kwargs` name none.
    axis_name: the mapped axis of replicas, if there is one.
    perturbation: see `mtl_jax.flat_minima`.
    **given: see `make_weighting`.

  Returns:
    An aggregator over the whole tree of parameters, with diagnostics; None for
    a weighting by itself, which needs no task gradients.

  Raises:
    ValueError: if there is no aggregator or weighting of that name, one of
      `kwargs` or `flat` is no argument or of the wrong type, or `head_scale`
      is given beside `flat`, which has its own, or a perturbation
      is chosen for a method without any.
  """
  if method.flat is not None and method.head_scale is not None:
    raise ValueError(
      f'method.head_scale is {method.head_scale!r}, which a method with '
      'method.flat does not use; set method.flat.head_scale'
    )
  if method.flat is None and perturbation != 'global':
    raise ValueError(
      f'perturbation is {perturbation!r}, but the method perturbs nothing: '
      'method.flat is None'
    )
  if method.weighting is None:
    names = tuple(filter(_makes_aggregator, transforms.__all__))
    if method.aggregator not in names:
      raise ValueError(
        f'method.aggregator must be one of {names}, got {method.aggregator!r}'
      )
    factory = getattr(transforms, method.aggregator)
    aggregator = factory(
      **_arguments(method.aggregator, factory, method.kwargs, seed=seed),
      num_tasks=len(task_names),
      axis_name=axis_name,
    )
  elif method.flat is None:
    return None
  else:
    weighting = make_weighting(method, seed, **given)
    if isinstance(weighting, transforms.BilevelWeighting):
      raise ValueError(
        f'method.weighting is {method.weighting!r}, which learns its weights '
        'with a look-ahead of its own and has no flat-minima version'
      )
    aggregator = transforms.weighted(
      weighting, num_tasks=len(task_names), axis_name=axis_name
    )
  if method.flat is None:
    return transforms.shared_only(
      aggregator, task_names, head_scale=method.head_scale
    )
  flat = dict(method.flat)
  arguments.check_arguments(
    'method.flat',
    'flat_minima',
    transforms.flat_minima,
    flat,
    hidden=_NOT_OF_FLAT,
  )
  return transforms.flat_minima(
    aggregator, task_names, perturbation=perturbation, **flat
  )


def make_weighting(
  method: Any, seed: int = 0, **given: Any
) -> transforms.LossWeighting | transforms.BilevelWeighting | None:
  """The loss weighting of a config; None for an aggregator.

  Args:
    method: an entry of `configs/methods.py`: `weighting`, a name in
      `mtl_jax.transforms` or None, and `kwargs`. An argument that is itself a
      weighting is given by its name.
    seed: given to a random method whose `kwargs` name none.
    **given: further arguments for factories that take them and whose `kwargs`
      do not name them, such as `steps_per_epoch`.

  Returns:
    The weighting.

  Raises:
    ValueError: if there is no weighting of that name.
  """
  if method.weighting is None:
    return None
  return _weighting_by_name(
    method.weighting, method.kwargs, {'seed': seed, **given}
  )


def _weighting_by_name(name, kwargs, given):
  names = tuple(filter(_makes_weighting, transforms.__all__))
  if name not in names:
    raise ValueError(f'method.weighting must be one of {names}, got {name!r}')
  factory = getattr(transforms, name)
  hints = typing.get_type_hints(factory)
  values = {
    key: _weighting_by_name(value, {}, given)
    if hints.get(key) is transforms.LossWeighting
    else value
    for key, value in dict(kwargs).items()
  }
  return factory(**_arguments(name, factory, values, **given))


def _arguments(name, factory, kwargs, **given):
  """`kwargs`, and of `given` what the factory takes besides."""
  taken = inspect.signature(factory).parameters
  values = {
    **{key: value for key, value in given.items() if key in taken},
    **dict(kwargs),
  }
  arguments.check_arguments(
    'method.kwargs', name, factory, values, hidden=('num_tasks', 'axis_name')
  )
  return values


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


def _makes_weighting(name):
  value = getattr(transforms, name)
  return inspect.isfunction(value) and typing.get_type_hints(value).get(
    'return'
  ) in (transforms.LossWeighting, transforms.BilevelWeighting)


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


def _clip(name, norm):
  if not norm > 0:
    raise ValueError(f'{name} must be positive or None, got {norm}')
  return optax.clip_by_global_norm(norm)


def _is_shared(tree):
  """Which leaves are shared, for `optax.masked`."""
  return jax.tree.map(
    lambda label: label == labels.SHARED, transforms.default_labels(tree)
  )


class Optimizer(typing.NamedTuple):
  """What a config's method and optimizer are to the train step.

  Attributes:
    tx: the chain: of task gradients, or of the weighted loss's gradient where
      there is a weighting.
    weighting: a loss weighting that needs no task gradients, or None.
    extra_batches: how many further stacks of task gradients `tx` needs.
    after_step: see `mtl_jax.train.step.make_train_step`.
  """

  tx: optax.GradientTransformationExtraArgs
  weighting: transforms.LossWeighting | transforms.BilevelWeighting | None
  extra_batches: int
  after_step: typing.Callable[..., Any] | None


def make_optimizer(
  config: Any,
  task_names: Sequence[str],
  total_steps: int,
  *,
  axis_name: str | None = None,
  perturbation: str = 'global',
  **given: Any,
) -> Optimizer:
  """The optimizer: aggregate, clip, Adam, decoupled decay, learning rate.

  Anything before the aggregation would act on the stack of task gradients.
  `config.method.clip_shared` is the largest norm of the update's shared part;
  heads are neither counted nor scaled by it.

  Args:
    config: reads `config.method`, `config.optimizer` and `config.seed`.
    task_names: the tasks.
    total_steps: length of the run, for the learning rate.
    axis_name: see `make_aggregator`.
    perturbation: see `make_aggregator`.
    **given: see `make_weighting`.

  Returns:
    An `Optimizer`.

  Raises:
    ValueError: for values that are out of range.
  """
  optimizer = config.optimizer
  aggregator = make_aggregator(
    config.method,
    task_names,
    config.seed,
    axis_name=axis_name,
    perturbation=perturbation,
    **given,
  )
  weighting = make_weighting(config.method, config.seed, **given)
  parts = [] if aggregator is None else [aggregator]
  # A method may be written without the field.
  clip_shared = config.method.get('clip_shared')
  if clip_shared is not None:
    clip = _clip('method.clip_shared', clip_shared)
    parts.append(optax.masked(clip, _is_shared))
  if optimizer.clip is not None:
    parts.append(_clip('optimizer.clip', optimizer.clip))
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
  tx = optax.chain(*parts)
  if optimizer.skip_nonfinite is not None:
    tx = transforms.skip_nonfinite(tx, optimizer.skip_nonfinite)
  if aggregator is None:
    return Optimizer(tx, weighting, 0, None)
  after_step = None
  if getattr(weighting, 'after_step', None) is not None:
    after_step = lambda losses, state, active: transforms.after_step(
      weighting, losses, state, active
    )
  return Optimizer(tx, None, aggregator.extra_batches, after_step)
