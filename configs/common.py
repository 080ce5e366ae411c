"""What all configs share: the text after the colon, and common fields."""

from collections.abc import Collection
import difflib
from typing import Any

import ml_collections
from ml_collections import config_dict


def parse_arguments(text: str, **defaults: Any) -> ml_collections.ConfigDict:
  """Reads `'method=f_cagrad,runlocal,seed=1'`, what follows `config.py:`.

  Args:
    text: arguments parted by commas. One without a value, such as `runlocal`,
      is true.
    **defaults: the arguments there are; a value has the type of its default,
      which is a bool, an int, a float or a string.

  Returns:
    All arguments, as attributes.

  Raises:
    ValueError: if an argument is unknown (it tells the nearest), comes twice,
      or has a value of the wrong type.
  """
  values = dict(defaults)
  seen = set()
  for item in filter(None, text.split(',')):
    name, equals, value = (part.strip() for part in item.partition('='))
    check_known(name, defaults, 'config argument')
    if name in seen:
      raise ValueError(f'config argument {name!r} is given twice, in {text!r}')
    seen.add(name)
    values[name] = _parse(name, value if equals else 'true', defaults[name])
  return ml_collections.ConfigDict(values)


def _parse(name, value, default):
  if isinstance(default, bool):
    if value not in ('true', 'false'):
      raise ValueError(
        f'config argument {name!r} is true or false, got {value!r}'
      )
    return value == 'true'
  try:
    return type(default)(value)
  except ValueError:
    kind = {int: 'an integer', float: 'a number'}[type(default)]
    raise ValueError(
      f'config argument {name!r} must be {kind}, got {value!r}'
    ) from None


def check_known(name: str, known: Collection[str], what: str) -> None:
  """Raises a ValueError that tells the nearest names if `name` is unknown."""
  if name not in known:
    near = difflib.get_close_matches(name, known, cutoff=0.5)
    hint = f'did you mean {" or ".join(map(repr, near))}? ' if near else ''
    raise ValueError(
      f'unknown {what} {name!r}; {hint}expected one of {sorted(known)}'
    )


def make_config(
  *,
  problem: str,
  method: dict[str, Any],
  model: str,
  model_kwargs: dict[str, Any],
  seed: int,
) -> ml_collections.ConfigDict:
  """A config with every field there is; a problem's file changes values."""
  method = dict(method)
  sharing = method.pop('sharing')
  for key in ('aggregator', 'weighting', 'head_scale'):
    method[key] = optional(str, method[key])
  method['clip_shared'] = optional(float, method['clip_shared'])
  if method['flat'] is not None:
    flat = method['flat']
    method['flat'] = {**flat, 'rho_heads': optional(float, flat['rho_heads'])}
  return ml_collections.ConfigDict(
    {
      'problem': problem,
      'data': {
        # 'real', or 'synthetic' for a small built-in stand-in of the same form.
        'kind': 'real',
        # Where the prepared dataset lies, and the raw files it is made from;
        # None is the default of tensorflow-datasets and MTL_JAX_SOURCE_DIR.
        'data_dir': optional(str, None),
        'source_dir': optional(str, None),
        # 'holdout' keeps a validation split out, 'paper' trains on everything.
        'split': 'holdout',
        # Where the training split lies: 'host', or 'device' for one that fits
        # there, on each; steps then get indices only.
        'placement': 'host',
      },
      'model': {'name': model, 'sharing': sharing, 'kwargs': model_kwargs},
      'method': method,
      'optimizer': {
        'learning_rate': 1e-3,
        # 'constant', 'cosine' (to zero) or 'step'.
        'schedule': 'constant',
        # Largest global norm of the aggregated gradient; None does not clip.
        'clip': optional(float, None),
        # Decoupled: no part of the loss, so no part of the perturbation.
        'weight_decay': 0.0,
        # How many steps in a row may be left out because their update is not
        # finite; None leaves none out.
        'skip_nonfinite': optional(int, None),
      },
      'batch_size': 256,
      'epochs': 1,
      'seed': seed,
      # How the method is evaluated (mtl_jax/updates): 'stack' of all task
      # gradients; for methods that look at inner products alone 'gram', pairs
      # of tasks at a time, or 'ghost', without the task gradients of dense
      # layers; 'features', another method: tasks are combined at the features.
      'joint_update': 'stack',
      # How the T gradients are computed: 'unroll', 'vmap', 'scan', or 'auto',
      # which chooses by platform.
      'engine': 'auto',
      # 'per_device': each device perturbs by the task gradients of its own rows
      # of the batch (m-sharpness), and gradients are exchanged once a step. How
      # many rows those are, and so the numbers, depends on how many devices
      # there are; so it is with batch_norm below.
      'perturbation': 'global',
      'parallel': {
        # 'replicated': every device holds all parameters. 'sharded': they, the
        # optimizer's state and the task gradients are cut over the devices.
        'parameters': 'replicated',
        # Devices that share out the tasks of one part of the batch; a divisor
        # of the number of tasks. More than 1 evaluates with engine 'vmap', and
        # is for models of dense layers: XLA gathers batched convolutions.
        'task_devices': 1,
        # Whose statistics BatchNorm uses in training: those of the whole batch,
        # exchanged at every layer in every pass, or with 'per_device' those of
        # the rows of each device.
        'batch_norm': 'global',
      },
      'micro_batches': 1,
      # Updates in one compiled call; must divide the intervals below.
      'steps_per_call': 1,
      # Of the model's passes, 'float32' or 'bfloat16'; parameters, norms, Gram
      # matrices, solvers, losses and the optimizer are float32 in either.
      'compute_dtype': 'float32',
      # Of matrix products and convolutions, in both passes.
      'precision': 'highest',
      'eval_every_epochs': 1,
      'log_every_steps': 50,
      'checkpoint_every_steps': 1000,
      'keep_checkpoints': 2,
    }
  )


def run_local(
  config: ml_collections.ConfigDict, **model_kwargs: Any
) -> ml_collections.ConfigDict:
  """Shrinks a config to what a laptop runs in seconds, on synthetic data."""
  config.data.kind = 'synthetic'
  config.model.kwargs.update(model_kwargs)
  config.batch_size = 16
  config.epochs = 2
  config.eval_every_epochs = 1
  config.log_every_steps = 5
  config.checkpoint_every_steps = 10
  return config


def optional(kind: type, value: Any) -> config_dict.FieldReference:
  """A field of a config that can be None and overridden on the command line.

  Args:
    kind: type of its values; `object` takes any literal, a number or a tuple.
    value: its value, which may be None.

  Returns:
    The field. A plain None could not be overridden.
  """
  field = config_dict.placeholder(kind)
  if value is not None:
    field.set(value)
  return field
