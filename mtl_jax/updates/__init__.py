"""Joint updates from the losses of all tasks to one gradient.

Needs jax, numpy and optax, and from this project `types`, `transforms` and
`gradients`.
"""

from mtl_jax.updates._features import feature_update
from mtl_jax.updates._ghost import ghost_update
from mtl_jax.updates._gram import gram_update
from mtl_jax.updates._gram_based import GramUpdateState
from mtl_jax.updates._joint import Found
from mtl_jax.updates._joint import JointUpdate
from mtl_jax.updates._stack import stack_update
from mtl_jax.updates._weighted import bilevel_update
from mtl_jax.updates._weighted import weighted_update
from mtl_jax.updates._weighted import WeightedUpdateState

__all__ = [
  'Found',
  'GramUpdateState',
  'JointUpdate',
  'WeightedUpdateState',
  'bilevel_update',
  'feature_update',
  'ghost_update',
  'gram_update',
  'stack_update',
  'weighted_update',
]
