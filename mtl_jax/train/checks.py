"""What can be told to be wrong from a config alone."""

import ml_collections

from mtl_jax import gradients
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
  'compute_dtype': ('float32', 'bfloat16'),
  'perturbation': ('global', 'per_device'),
  'parallel.batch_norm': ('global', 'per_device'),
  'parallel.parameters': sharding.PARAMETERS,
  # Those that JAX has for all devices.
  'precision': (
    *('default', 'high', 'highest'),
    *('bfloat16', 'tensorfloat32', 'float32'),
  ),
}


def check_config(config: ml_collections.ConfigDict) -> None:
  """Checks what can be told from a config alone.

  Args:
    config: of `configs/`.

  Raises:
    ValueError: if a value is out of range; names its key.
  """
  for name in _POSITIVE:
    if config[name] < 1:
      raise ValueError(f'{name} must be positive, got {config[name]}')
  for name, choices in _CHOICES.items():
    group, _, key = name.rpartition('.')
    value = (config[group] if group else config)[key]
    if value not in choices:
      raise ValueError(f'{name} must be one of {choices}, got {value!r}')
  if config.parallel.task_devices > 1 and config.model.sharing != 'shared':
    raise ValueError(
      "parallel.task_devices goes with model.sharing='shared' alone, got "
      f'{config.parallel.task_devices} and {config.model.sharing!r}'
    )
  for name in per_device(config):
    # There every device holds everything and does every task.
    for key, only in (('parameters', 'replicated'), ('task_devices', 1)):
      value = config.parallel[key]
      if value != only:
        raise ValueError(
          f"{name}='per_device' goes with parallel.{key}={only!r} alone, got "
          f'{value!r}'
        )


def per_device(config):
  """The keys by which a step has to run on every device by itself."""
  values = {
    'perturbation': config.perturbation,
    'parallel.batch_norm': config.parallel.batch_norm,
  }
  return [name for name, value in values.items() if value == 'per_device']
