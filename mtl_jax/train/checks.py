"""Checks that need only the config."""

import ml_collections

from mtl_jax import gradients
from mtl_jax.train import build
from mtl_jax.train import sharding

_POSITIVE = (
  'epochs',
  'micro_batches',
  'steps_per_call',
  'eval_every_epochs',
  'log_every_steps',
  'checkpoint_every_steps',
  'keep_checkpoints',
)
_CHOICES = {
  'data.kind': ('real', 'synthetic'),
  'data.split': ('holdout', 'paper'),
  'data.placement': ('host', 'device'),
  'engine': gradients.ENGINES,
  'joint_update': tuple(build.UPDATES),
  'compute_dtype': ('float32', 'bfloat16'),
  'perturbation': ('global', 'per_device'),
  'parallel.batch_norm': ('global', 'per_device'),
  'parallel.parameters': sharding.PARAMETERS,
  # The precisions that JAX has for all devices.
  'precision': (
    *('default', 'high', 'highest'),
    *('bfloat16', 'tensorfloat32', 'float32'),
  ),
}


# Every config has these entries; a user's config may have more.
ENTRIES = {
  '': (
    *('problem', 'data', 'model', 'method', 'optimizer', 'parallel'),
    *('batch_size', 'epochs', 'seed', 'engine', 'perturbation'),
    'joint_update',
    *('micro_batches', 'steps_per_call', 'compute_dtype', 'precision'),
    *('eval_every_epochs', 'log_every_steps', 'checkpoint_every_steps'),
    'keep_checkpoints',
  ),
  'data': ('kind', 'data_dir', 'source_dir', 'split', 'placement'),
  'model': ('name', 'sharing', 'kwargs'),
  'method': ('name', 'aggregator', 'weighting', 'kwargs', 'head_scale', 'flat'),
  'optimizer': (
    *('learning_rate', 'schedule', 'clip', 'weight_decay', 'skip_nonfinite'),
  ),
  'parallel': ('parameters', 'task_devices', 'batch_norm'),
}


def check_config(config: ml_collections.ConfigDict) -> None:
  """Raises for faults that the config alone shows.

  Args:
    config: of `configs/`.

  Raises:
    ValueError: if an entry is missing, a value is out of range, or the method
      differs from its name; the message names the key.
  """
  for group, entries in ENTRIES.items():
    held = config[group] if group else config
    for entry in entries:
      if not isinstance(held, ml_collections.ConfigDict) or entry not in held:
        key = f'{group}.{entry}'.removeprefix('.')
        raise ValueError(f'the config has no entry {key!r}')
  for name in _POSITIVE:
    if config[name] < 1:
      raise ValueError(f'{name} must be positive, got {config[name]}')
  for name, choices in _CHOICES.items():
    group, _, key = name.rpartition('.')
    value = (config[group] if group else config)[key]
    if value not in choices:
      raise ValueError(f'{name} must be one of {choices}, got {value!r}')
  # JAX takes no more bits.
  if not 0 <= config.seed < 2**63:
    raise ValueError(f'seed must be in [0, 2**63), got {config.seed}')
  _check_name(config)
  if config.parallel.task_devices > 1 and config.model.sharing != 'shared':
    raise ValueError(
      "parallel.task_devices above 1 needs model.sharing='shared', got "
      f'{config.parallel.task_devices} and {config.model.sharing!r}'
    )
  for name in per_device(config):
    # In that mode every device holds everything and does every task.
    for key, only in (('parameters', 'replicated'), ('task_devices', 1)):
      value = config.parallel[key]
      if value != only:
        raise ValueError(
          f"{name}='per_device' needs parallel.{key}={only!r}, got {value!r}"
        )


def _check_name(config):
  """Raises if a run would be recorded under another method's name."""
  # A user's config may use any method name.
  told = config.method.get('stands_for')
  if told is None:
    return
  method = config.method
  found = {
    'name': method.name,
    'aggregator': method.aggregator,
    'weighting': method.weighting,
    'sharing': config.model.sharing,
    'flat': method.flat is not None,
    'kwargs': {key: method.kwargs.get(key) for key in told.kwargs},
  }
  for key, value in told.to_dict().items():
    if found[key] != value:
      where = 'model' if key == 'sharing' else 'method'
      raise ValueError(
        f'{where}.{key} is {found[key]!r}, where method={told.name} means '
        f"{value!r}; choose a method by method=NAME after the config's colon"
      )


def per_device(config):
  """The keys for which each device has to run the step separately."""
  values = {
    'perturbation': config.perturbation,
    'parallel.batch_norm': config.parallel.batch_norm,
  }
  return [name for name, value in values.items() if value == 'per_device']
