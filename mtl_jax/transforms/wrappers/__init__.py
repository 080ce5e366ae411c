"""Transformations around an aggregator."""

from mtl_jax.transforms.wrappers._every import every
from mtl_jax.transforms.wrappers._every import EveryState
from mtl_jax.transforms.wrappers._flat_minima import flat_minima
from mtl_jax.transforms.wrappers._flat_minima import FlatMinimaState
from mtl_jax.transforms.wrappers._per_group import per_group
from mtl_jax.transforms.wrappers._per_group import PerGroupState
from mtl_jax.transforms.wrappers._shared_only import shared_only
from mtl_jax.transforms.wrappers._skip_nonfinite import left_out
from mtl_jax.transforms.wrappers._skip_nonfinite import skip_nonfinite
from mtl_jax.transforms.wrappers._skip_nonfinite import SkipNonfiniteState
from mtl_jax.transforms.wrappers._weighted import after_step
from mtl_jax.transforms.wrappers._weighted import weighted
from mtl_jax.transforms.wrappers.ball import Perturbation

__all__ = [
  'EveryState',
  'FlatMinimaState',
  'PerGroupState',
  'Perturbation',
  'SkipNonfiniteState',
  'after_step',
  'every',
  'flat_minima',
  'left_out',
  'per_group',
  'shared_only',
  'skip_nonfinite',
  'weighted',
]
