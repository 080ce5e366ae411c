"""Gradient manipulation and flat minima as optax transformations.

Needs jax, numpy and optax, and nothing else of this project.
"""

from mtl_jax.transforms._aggregator import Aggregator
from mtl_jax.transforms._cagrad import cagrad
from mtl_jax.transforms._diagnostics import diagnostics
from mtl_jax.transforms._flat_minima import flat_minima
from mtl_jax.transforms._flat_minima import FlatMinimaState
from mtl_jax.transforms._from_gram import from_gram
from mtl_jax.transforms._from_gram import FromGramState
from mtl_jax.transforms._from_gram import Solution
from mtl_jax.transforms._imtl_g import imtl_g
from mtl_jax.transforms._labels import default_labels
from mtl_jax.transforms._labels import ParamLabels
from mtl_jax.transforms._linear import linear
from mtl_jax.transforms._mgda import mgda
from mtl_jax.transforms._pcgrad import pcgrad
from mtl_jax.transforms._shared_only import shared_only

__all__ = [
  'Aggregator',
  'FlatMinimaState',
  'FromGramState',
  'ParamLabels',
  'Solution',
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
]
