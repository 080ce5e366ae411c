"""Multi-task learning in JAX.

The names here need jax, numpy and optax alone: the transformations, and the
task gradients they work on. Everything else (`mtl_jax.data`, `.models`,
`.problems`, `.train`, ...) is imported by its own name.
"""

from mtl_jax import command_line as command_line  # Before what takes seconds.
from mtl_jax import transforms
from mtl_jax.feature_updates import feature_update
from mtl_jax.feature_updates import FeatureUpdate
from mtl_jax.ghost_updates import ghost_update
from mtl_jax.gradients import task_grad
from mtl_jax.gradients import TaskGrad
from mtl_jax.gram_based import GramUpdate
from mtl_jax.gram_based import GramUpdateState
from mtl_jax.gram_updates import gram_update
from mtl_jax.transforms import *  # noqa: F403
from mtl_jax.weighted_gradients import weighted_grad
from mtl_jax.weighted_gradients import WeightedGrad

__version__ = '0.1.0'

__all__ = [
  'FeatureUpdate',
  'GramUpdate',
  'GramUpdateState',
  'TaskGrad',
  'WeightedGrad',
  'feature_update',
  'ghost_update',
  'gram_update',
  'task_grad',
  'weighted_grad',
  *transforms.__all__,
]
