"""Gradient manipulation and flat minima as optax transformations.

Needs only jax, numpy and optax, and nothing else from this project. The names
come from the packages below, so a method is exported where it is written.
"""

from mtl_jax.transforms import aggregators
from mtl_jax.transforms import bilevel
from mtl_jax.transforms import contract
from mtl_jax.transforms import weightings
from mtl_jax.transforms import wrappers
from mtl_jax.transforms.aggregators import *  # noqa: F403
from mtl_jax.transforms.bilevel import *  # noqa: F403
from mtl_jax.transforms.contract import *  # noqa: F403
from mtl_jax.transforms.weightings import *  # noqa: F403
from mtl_jax.transforms.wrappers import *  # noqa: F403

__all__ = [
  *contract.__all__,
  *aggregators.__all__,
  *weightings.__all__,
  *bilevel.__all__,
  *wrappers.__all__,
]
