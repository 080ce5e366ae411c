"""The methods behind `method=NAME`, with one entry each.

An entry names a factory in `mtl_jax.transforms`: an `aggregator` of task
gradients, or a `weighting` of losses, which costs one backward pass (a bilevel
one a few more). `kwargs` are those arguments that differ from the factory's
defaults or are worth showing; a config holds all that are numbers, strings,
bools or tuples. `plain` are further arguments for the method without `f_`; they
include `head_scale` (see `mtl_jax.shared_only`) and `clip_shared`, the largest
norm of the update's shared part. `sharing` specifies whether the tasks share a
trunk (`'shared'`, the default) or have one each (`'separate'`).

Every name, except for bilevel weightings, also exists with `f_` in front: the
same method inside `mtl_jax.transforms.flat_minima`, with the radius and options
from the problem's config. A weighting then costs one backward pass a task.
"""

from collections.abc import Mapping
import inspect
import typing
from typing import Any

from configs import common
from mtl_jax import transforms
from mtl_jax.models import arguments

AGGREGATORS: Mapping[str, Mapping[str, Any]] = {
  # Single-task learning: independent networks, trained side by side. Their
  # heads are not scaled by 1 / T: each gets the gradient of its own loss.
  'stl': {
    'aggregator': 'linear',
    'head_scale': 'none',
    'sharing': 'separate',
  },
  'linear': {'aggregator': 'linear'},
  'mgda': {'aggregator': 'mgda', 'kwargs': {'normalization': 'none'}},
  'mgda_l2': {'aggregator': 'mgda', 'kwargs': {'normalization': 'l2'}},
  'mgda_loss': {'aggregator': 'mgda', 'kwargs': {'normalization': 'loss'}},
  'mgda_loss+': {'aggregator': 'mgda', 'kwargs': {'normalization': 'loss+'}},
  'pcgrad': {'aggregator': 'pcgrad', 'kwargs': {'reduction': 'sum'}},
  'gradvac': {'aggregator': 'gradvac'},
  'graddrop': {'aggregator': 'graddrop'},
  'cagrad': {'aggregator': 'cagrad', 'kwargs': {'c': 0.4, 'rescale': 'none'}},
  'imtl_g': {'aggregator': 'imtl_g'},
  # The authors' run: the raw Gram matrix, heads scaled by the weights because
  # losses are weighed, and the update of the shared part clipped at length 1.
  # Its length is sqrt(T), so the clip always acts.
  'nash_mtl': {
    'aggregator': 'nash_mtl',
    'plain': {'scale': 'paper'},
    'head_scale': 'weights',
    'clip_shared': 1.0,
  },
  # LibMTL's run. The authors' own code does not scale heads, multiplies the
  # shared part by T and clips it at length 1.
  'fairgrad': {
    'aggregator': 'fairgrad',
    'kwargs': {'alpha': 2.0},
    'plain': {'scale': 'paper'},
    'head_scale': 'weights',
  },
  'aligned_mtl': {'aggregator': 'aligned_mtl'},
  'upgrad': {'aggregator': 'upgrad'},
  'dualproj': {'aggregator': 'dualproj'},
  'con_fig': {'aggregator': 'con_fig'},
  'sdmgrad': {'aggregator': 'sdmgrad'},
  'moco': {'aggregator': 'moco'},
  'modo': {'aggregator': 'modo'},
  'cr_mogm': {'aggregator': 'cr_mogm'},
  'db_mtl': {'aggregator': 'db_mtl'},
  'gradnorm': {'aggregator': 'gradnorm'},
  'excess_mtl': {'aggregator': 'excess_mtl'},
  'conicgrad': {'aggregator': 'conicgrad'},
  # Two tasks outvote nobody: with these values both methods are the mean.
  'krum': {
    'aggregator': 'krum',
    'kwargs': {'num_byzantine': 0, 'num_selected': 2},
  },
  'trimmed_mean': {'aggregator': 'trimmed_mean', 'kwargs': {'trim': 0}},
  'random_weights': {'aggregator': 'random_weights'},
}

WEIGHTINGS: Mapping[str, Mapping[str, Any]] = {
  'equal': {'weighting': 'equal_weights'},
  # For two tasks; set other splits on the command line.
  'static': {
    'weighting': 'static_weights',
    'kwargs': {'weights': (0.6, 0.4)},
  },
  'uncertainty': {'weighting': 'uncertainty'},
  'dwa': {'weighting': 'dwa', 'kwargs': {'temperature': 2.0}},
  'rlw': {'weighting': 'rlw'},
  'gls': {'weighting': 'gls'},
  'si': {'weighting': 'si'},
  'imtl_l': {'weighting': 'imtl_l'},
  'stch': {'weighting': 'stch'},
  'famo': {'weighting': 'famo'},
  'dtp': {'weighting': 'dtp'},
  'cosmos': {'weighting': 'cosmos'},
  'pbi': {'weighting': 'pbi'},
  'first_then': {
    'weighting': 'first_then',
    'kwargs': {'first': 'equal_weights', 'steps': 200, 'then': 'si'},
  },
}

BILEVEL: Mapping[str, Mapping[str, Any]] = {
  'auto_lambda': {'weighting': 'auto_lambda'},
  'moml': {'weighting': 'moml'},
  'forum': {'weighting': 'forum'},
}

METHODS: Mapping[str, Mapping[str, Any]] = {
  **AGGREGATORS,
  **WEIGHTINGS,
  **BILEVEL,
}

NAMES = (
  *METHODS,
  *(f'f_{name}' for name in METHODS if name not in BILEVEL),
)

_FLAT = {
  'rho': 0.05,
  'adaptive': False,
  'norm': 'separate',
  'combine': 'separate',
  'head_scale': 'none',
  'eps': 1e-12,
}
# Arguments from the trainer, and arguments for the layout over devices.
_NOT_OF_A_CONFIG = ('seed', 'num_tasks', 'axis_name', 'shard_axis', 'reduce')


def entry(name: str, **flat: Any) -> dict[str, Any]:
  """The values of a method.

  Args:
    name: one of `NAMES`.
    **flat: the problem's values for `rho`, `rho_heads`, `adaptive`, `norm`,
      `combine` and `head_scale`; only methods with `f_` use them.

  Returns:
    `{'name', 'stands_for', 'aggregator', 'weighting', 'kwargs', 'head_scale',
    'clip_shared', 'flat', 'sharing'}`. One of `aggregator` and `weighting` is
    None. `flat` is None for a method without `f_`; `head_scale` None means the
    method's own default, and `clip_shared` None no clip. `stands_for` holds the
    values that the name implies; a run must have them.

  Raises:
    ValueError: if there is no such method; the message lists the nearest.
  """
  common.check_known(name, NAMES, 'method')
  flat_minima = name.startswith('f_')
  base = name.removeprefix('f_')
  values = METHODS[base]
  factory = values.get('aggregator') or values['weighting']
  kwargs = values.get('kwargs', {})
  # Values only for methods without `f_`.
  plain = {} if flat_minima else values
  return {
    'name': name,
    'stands_for': {
      'name': name,
      'aggregator': values.get('aggregator'),
      'weighting': values.get('weighting'),
      'sharing': values.get('sharing', 'shared'),
      'flat': flat_minima,
      # `mgda_l2` names one of mgda's choices.
      'kwargs': {
        key: value
        for key, value in kwargs.items()
        if base.endswith(f'_{value}')
      },
    },
    'aggregator': values.get('aggregator'),
    'weighting': values.get('weighting'),
    'kwargs': _all_kwargs(factory, {**kwargs, **plain.get('plain', {})}),
    'head_scale': plain.get('head_scale'),
    'clip_shared': plain.get('clip_shared'),
    'flat': {**_FLAT, 'rho_heads': None, **flat} if flat_minima else None,
    'sharing': values.get('sharing', 'shared'),
  }


def _all_kwargs(factory, given):
  """Every argument of a factory that can be written on the command line."""
  function = getattr(transforms, factory)
  hints = typing.get_type_hints(function)
  kwargs = dict(given)
  for key, parameter in inspect.signature(function).parameters.items():
    value = given.get(key, parameter.default)
    if key in _NOT_OF_A_CONFIG or value is parameter.empty:
      continue
    held = arguments.plain_default(hints[key], value)
    if held is not None:
      kind, value = held
      as_it_is = value is not None and kind is not object
      kwargs[key] = value if as_it_is else common.optional(kind, value)
  return kwargs
