"""The methods, one entry each: what `method=NAME` stands for.

`aggregator` is the name of a factory in `mtl_jax.transforms` and `kwargs` are
its arguments. `sharing` tells whether the tasks share a trunk (`'shared'`, the
default) or have one each (`'separate'`). Every name also exists with `f_` in
front: the same aggregator inside `mtl_jax.transforms.flat_minima`, with the
radius and options that the problem's config gives.
"""

from collections.abc import Mapping
from typing import Any

from configs import common

METHODS: Mapping[str, Mapping[str, Any]] = {
  # Single-task learning: independent networks, trained side by side. Their
  # heads are not scaled by 1 / T: each sees the gradient of its own loss.
  'stl': {
    'aggregator': 'linear',
    'head_scale': 'none',
    'sharing': 'separate',
  },
  'linear': {'aggregator': 'linear'},
  'mgda': {'aggregator': 'mgda', 'kwargs': {'normalization': 'none'}},
  'pcgrad': {'aggregator': 'pcgrad', 'kwargs': {'reduction': 'sum'}},
  'cagrad': {'aggregator': 'cagrad', 'kwargs': {'c': 0.4, 'rescale': 'none'}},
  'imtl_g': {'aggregator': 'imtl_g'},
}

_FLAT = {
  'rho': 0.05,
  'adaptive': False,
  'norm': 'separate',
  'combine': 'separate',
  'head_scale': 'none',
}


def entry(name: str, **flat: Any) -> dict[str, Any]:
  """The values of a method.

  Args:
    name: a name in `METHODS`, or one with `f_` before it.
    **flat: what the problem sets of `rho`, `rho_heads`, `adaptive`, `norm`,
      `combine` and `head_scale`; used by the methods with `f_` only.

  Returns:
    `{'name', 'aggregator', 'kwargs', 'head_scale', 'flat', 'sharing'}`. `flat`
    is None for a method without `f_`; `head_scale` None means the aggregator's
    own default.

  Raises:
    ValueError: if there is no such method; it tells the nearest.
  """
  names = [*METHODS, *(f'f_{key}' for key in METHODS)]
  common.check_known(name, names, 'method')
  flat_minima = name.startswith('f_')
  values = METHODS[name.removeprefix('f_')]
  return {
    'name': name,
    'aggregator': values['aggregator'],
    'kwargs': dict(values.get('kwargs', {})),
    'head_scale': None if flat_minima else values.get('head_scale'),
    'flat': {**_FLAT, 'rho_heads': None, **flat} if flat_minima else None,
    'sharing': values.get('sharing', 'shared'),
  }
