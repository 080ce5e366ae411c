"""Multi-task learning in JAX.

The names here need jax, numpy and optax alone: the transformations, and the
task gradients they work on. Everything else (`mtl_jax.data`, `.models`,
`.problems`, `.train`, ...) is imported by its own name.
"""

from mtl_jax.gradients import task_grad
from mtl_jax.gradients import TaskGrad
from mtl_jax.transforms import Aggregator
from mtl_jax.transforms import cagrad
from mtl_jax.transforms import default_labels
from mtl_jax.transforms import diagnostics
from mtl_jax.transforms import flat_minima
from mtl_jax.transforms import FlatMinimaState
from mtl_jax.transforms import from_gram
from mtl_jax.transforms import FromGramState
from mtl_jax.transforms import imtl_g
from mtl_jax.transforms import linear
from mtl_jax.transforms import mgda
from mtl_jax.transforms import pcgrad
from mtl_jax.transforms import shared_only
from mtl_jax.transforms import Solution

__version__ = '0.1.0'

__all__ = [
  'Aggregator',
  'FlatMinimaState',
  'FromGramState',
  'Solution',
  'TaskGrad',
  'cagrad',
  'default_labels',
  'diagnostics',
  'flat_minima',
  'from_gram',
  'imtl_g',
  'linear',
  'mgda',
  'pcgrad',
  'shared_only',
  'task_grad',
]
