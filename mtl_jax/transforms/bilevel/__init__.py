"""Loss weightings that learn from a look-ahead step."""

from mtl_jax.transforms.bilevel._auto_lambda import auto_lambda
from mtl_jax.transforms.bilevel._forum import forum
from mtl_jax.transforms.bilevel._moml import moml

__all__ = [
  'auto_lambda',
  'forum',
  'moml',
]
