"""The common fields of all configs, and the parser for their arguments."""

from collections.abc import Collection
import difflib
from typing import Any

import ml_collections
from ml_collections import config_dict


def parse_arguments(text: str, **defaults: Any) -> ml_collections.ConfigDict:
  """Reads the arguments after `config.py:`, as in `'method=f_cagrad,seed=1'`.

  Args:
    text: arguments separated by commas. One without a value, such as
      `runlocal`, is true.
    **defaults: the known arguments; a value has the type of its default, which
      is a bool, an int, a float or a string.

  Returns:
    All arguments, as attributes.

  Raises:
    ValueError: if an argument is unknown (the message lists the nearest), comes
      twice, or has a value of the wrong type.
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
  """Raises a ValueError with the nearest names if `name` is unknown."""
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
  """A config with every field; a problem's file changes values."""
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
        # 'real', or 'synthetic' for small generated data of the same form.
        'kind': 'real',
        # The folders of the prepared dataset and of its raw files; None is the
        # default of tensorflow-datasets and MTL_JAX_SOURCE_DIR.
        'data_dir': optional(str, None),
        'source_dir': optional(str, None),
        # 'holdout' keeps a validation split, 'paper' trains on everything.
        'split': 'holdout',
        # The place of the training split: 'host', or 'device' if it fits on
        # each device; steps then get only indices.
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
        # Decoupled: not part of the loss, and so not of the perturbation.
        'weight_decay': 0.0,
        # How many steps in a row may be skipped because their update is not
        # finite; None skips none.
        'skip_nonfinite': optional(int, None),
      },
      'batch_size': 256,
      'epochs': 1,
      'seed': seed,
      # How the method is evaluated (mtl_jax/updates): 'stack' holds all task
      # gradients. For methods that use only inner products 'gram' takes a pair
      # of tasks at a time, and 'ghost' forms no task gradients of dense layers.
      # 'features' is a different method, which combines tasks at the features.
      'joint_update': 'stack',
      # How the T gradients are computed: 'unroll', 'vmap', 'scan', or 'auto',
      # which chooses by platform.
      'engine': 'auto',
      # 'per_device': each device perturbs by the task gradients on its own rows
      # of the batch (m-sharpness), and gradients are exchanged once a step. The
      # number of these rows, and hence the result, depends on the number of
      # devices. The same holds for batch_norm below.
      'perturbation': 'global',
      'parallel': {
        # 'replicated': every device holds all parameters. 'sharded': they, the
        # optimizer's state and the task gradients are cut over the devices.
        'parameters': 'replicated',
        # Number of devices among which the tasks are divided, for one part of
        # the batch; a divisor of the number of tasks. More than 1 evaluates
        # with engine 'vmap' and is for models with dense layers: XLA gathers
        # batched convolutions.
        'task_devices': 1,
        # BatchNorm's statistics in training: over the global batch, exchanged
        # at every layer in every pass, or with 'per_device' over each device's
        # rows.
        'batch_norm': 'global',
      },
      'micro_batches': 1,
      # Updates in one compiled call; must divide the intervals below.
      'steps_per_call': 1,
      # The dtype of the model's passes, 'float32' or 'bfloat16'. Parameters,
      # norms, Gram matrices, solvers, losses and the optimizer are always
      # float32.
      'compute_dtype': 'float32',
      # The precision of matrix products and convolutions, in both passes.
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
  """Shrinks a config so that a laptop runs it in seconds, on synthetic data."""
  config.data.kind = 'synthetic'
  config.model.kwargs.update(model_kwargs)
  config.batch_size = 16
  config.epochs = 2
  config.eval_every_epochs = 1
  config.log_every_steps = 5
  config.checkpoint_every_steps = 10
  return config


def optional(kind: type, value: Any) -> config_dict.FieldReference:
  """A config field that can be None and overridden on the command line.

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
