"""Joint updates and optax chains from a config."""

from collections.abc import Sequence
import functools
import inspect
import typing
from typing import Any

import jax
import optax

from mtl_jax import transforms
from mtl_jax import updates
from mtl_jax.models import arguments
from mtl_jax.transforms import aggregators
from mtl_jax.transforms import bilevel
from mtl_jax.transforms import weightings
from mtl_jax.transforms.contract import labels

# Arguments of `flat_minima` from the trainer, or that a config cannot hold.
_NOT_OF_FLAT = (
  *('aggregator', 'task_names', 'perturbation', 'combiner', 'param_labels'),
)
_SCHEDULES = ('constant', 'cosine', 'step')


def joint_update(
  config: Any,
  task_names: Sequence[str],
  *,
  axis_name: str | None = None,
  **given: Any,
) -> updates.JointUpdate:
  """The method of a config as the joint update `config.joint_update`.

  Args:
    config: reads `config.method`, an entry of `configs/methods.py`;
      `config.joint_update`, one of `UPDATES`; `config.perturbation`,
      `config.optimizer.learning_rate` (for look-aheads) and `config.seed`.
    task_names: the tasks.
    axis_name: the mapped axis of replicas, if there is one.
    **given: further arguments for weightings that take them and whose `kwargs`
      do not name them, such as `steps_per_epoch`.

  Returns:
    The joint update.

  Raises:
    ValueError: for an unknown name, and for a method and an update that do not
      go together; the message names both.
  """
  method, how = config.method, config.joint_update
  if how not in UPDATES:
    raise ValueError(
      f'joint_update must be one of {tuple(UPDATES)}, got {how!r}'
    )
  _check_method(method, config.perturbation)
  weighting = make_weighting(method, config.seed, **given)
  if weighting is not None and method.flat is None:
    if how != 'stack':
      raise ValueError(
        f'joint_update is {how!r}, but method.weighting '
        f'{method.weighting!r} takes the gradient of a weighted loss; '
        "joint_update must be 'stack' for it"
      )
    if isinstance(weighting, transforms.BilevelWeighting):
      return updates.bilevel_update(
        weighting, task_names, lookahead=config.optimizer.learning_rate
      )
    return updates.weighted_update(weighting, task_names)
  # Other updates refuse replicas, and name the key of the config.
  aggregator = _aggregator(
    *(method, weighting, task_names, config.seed),
    axis_name if how == 'stack' else None,
  )
  return UPDATES[how](aggregator, method, task_names, config.perturbation)


def _stack(aggregator, method, task_names, perturbation):
  if method.flat is None:
    tx = transforms.shared_only(
      aggregator, task_names, head_scale=method.head_scale
    )
  else:
    tx = transforms.flat_minima(
      aggregator, task_names, perturbation=perturbation, **dict(method.flat)
    )
  return updates.stack_update(tx)


def _gram_based(factory, aggregator, method, task_names, perturbation):
  del perturbation  # Of replicas, which these updates refuse.
  flat, head_scale = None, method.head_scale
  if method.flat is not None:
    options = dict(method.flat)
    head_scale = options.pop('head_scale', 'none')
    combine = options.pop('combine', 'separate')
    if combine != 'separate':
      raise ValueError(
        f"{factory.__name__} needs method.flat.combine='separate', "
        f'got {combine!r}'
      )
    flat = transforms.Perturbation(**options)
  return factory(aggregator, task_names, flat=flat, head_scale=head_scale)


def _features(aggregator, method, task_names, perturbation):
  del perturbation
  if method.flat is not None:
    raise ValueError(
      "joint_update='features' combines tasks at the features, where no "
      'parameters are to perturb; method.flat must be None for it'
    )
  return updates.feature_update(
    aggregator, task_names, head_scale=method.head_scale
  )


# Values of `config.joint_update`, and the functions that make the updates.
UPDATES = {
  'stack': _stack,
  'gram': functools.partial(_gram_based, updates.gram_update),
  'ghost': functools.partial(_gram_based, updates.ghost_update),
  'features': _features,
}


def _check_method(method, perturbation):
  """Raises for fields of a method that exclude each other."""
  if method.flat is not None and method.head_scale is not None:
    raise ValueError(
      f'method.head_scale is {method.head_scale!r}, which a method with '
      'method.flat does not use; set method.flat.head_scale'
    )
  if method.flat is not None:
    arguments.check_arguments(
      'method.flat',
      'flat_minima',
      transforms.flat_minima,
      dict(method.flat),
      hidden=_NOT_OF_FLAT,
    )
  if method.flat is None and perturbation != 'global':
    raise ValueError(
      f'perturbation is {perturbation!r}, but the method perturbs nothing: '
      'method.flat is None'
    )


def _aggregator(method, weighting, task_names, seed, axis_name):
  """The aggregator that a method names."""
  given = {'num_tasks': len(task_names), 'axis_name': axis_name}
  if isinstance(weighting, transforms.BilevelWeighting):
    raise ValueError(
      f'method.weighting is {method.weighting!r}, which learns its weights '
      'with a look-ahead of its own and has no flat-minima version'
    )
  if weighting is not None:
    return transforms.weighted(weighting, **given)
  factory = _named((aggregators,), 'method.aggregator', method.aggregator)
  kwargs = _arguments(method.aggregator, factory, method.kwargs, seed=seed)
  return factory(**kwargs, **given)


def make_weighting(
  method: Any, seed: int = 0, **given: Any
) -> transforms.LossWeighting | transforms.BilevelWeighting | None:
  """The loss weighting in a config; None for an aggregator.

  Args:
    method: an entry of `configs/methods.py`: `weighting`, a name in
      `mtl_jax.transforms` or None, and `kwargs`. If an argument is itself a
      weighting, its name is given.
    seed: passed to a random method whose `kwargs` have none.
    **given: further arguments for factories that take them and whose `kwargs`
      do not name them, such as `steps_per_epoch`.

  Returns:
    The weighting.

  Raises:
    ValueError: if there is no weighting with that name.
  """
  if method.weighting is None:
    return None
  return _weighting_by_name(
    method.weighting, method.kwargs, {'seed': seed, **given}
  )


def _weighting_by_name(name, kwargs, given):
  rooms = (weightings, bilevel)
  factory = _named(rooms, 'method.weighting', name)
  hints = typing.get_type_hints(factory)
  values = {
    key: _weighting_by_name(value, {}, given)
    if hints.get(key) is transforms.LossWeighting
    else value
    for key, value in dict(kwargs).items()
  }
  return factory(**_arguments(name, factory, values, **given))


def _arguments(name, factory, kwargs, **given):
  """`kwargs`, and the arguments in `given` that the factory also takes."""
  taken = inspect.signature(factory).parameters
  values = {
    **{key: value for key, value in given.items() if key in taken},
    **dict(kwargs),
  }
  arguments.check_arguments(
    'method.kwargs', name, factory, values, hidden=('num_tasks', 'axis_name')
  )
  return values


def _named(rooms, key, name):
  """The factory with a name in rooms of `transforms`."""
  known = {x: room for room in rooms for x in room.__all__}
  if name not in known:
    raise ValueError(f'{key} must be one of {tuple(known)}, got {name!r}')
  return getattr(known[name], name)


def learning_rate_schedule(optimizer: Any, total_steps: int) -> optax.Schedule:
  """The learning rate over a run's steps.

  Args:
    optimizer: `learning_rate`, and `schedule`: `'constant'`, `'cosine'` (down
      to zero) or `'step'` (halved halfway through the run, as in the MTAN
      protocol).
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
  """Mask of the shared leaves, for `optax.masked`."""
  return jax.tree.map(
    lambda label: label == labels.SHARED, transforms.default_labels(tree)
  )


def optimizer(
  config: Any, total_steps: int
) -> optax.GradientTransformationExtraArgs:
  """The optimizer for one gradient: clip, Adam, decoupled decay, learning rate.

  `config.method.clip_shared` is the largest norm of the update's shared part;
  it neither counts nor scales heads.

  Args:
    config: reads `config.optimizer` and `config.method.clip_shared`.
    total_steps: length of the run, for the learning rate.

  Returns:
    An optax transformation.

  Raises:
    ValueError: for values out of range.
  """
  options = config.optimizer
  parts = []
  # A method may omit the field.
  clip_shared = config.method.get('clip_shared')
  if clip_shared is not None:
    clip = _clip('method.clip_shared', clip_shared)
    parts.append(optax.masked(clip, _is_shared))
  if options.clip is not None:
    parts.append(_clip('optimizer.clip', options.clip))
  parts.append(optax.scale_by_adam())
  if options.weight_decay < 0:
    raise ValueError(
      f'optimizer.weight_decay must not be negative, got {options.weight_decay}'
    )
  if options.weight_decay:
    parts.append(optax.add_decayed_weights(options.weight_decay))
  rate = learning_rate_schedule(options, total_steps)
  parts.append(optax.scale_by_learning_rate(rate))
  tx = optax.chain(*parts)
  if options.skip_nonfinite is not None:
    tx = transforms.skip_nonfinite(tx, options.skip_nonfinite)
  return tx
