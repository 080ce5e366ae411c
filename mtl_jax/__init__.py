"""Multi-task learning in JAX.

The names here are the transformations, their task gradients and the joint
updates. They need only jax, numpy and optax. Everything else (`mtl_jax.data`,
`.models`, `.problems`, `.train`, ...) is imported by its own name.
"""

# From here on a signal ends in one line, even during imports that take seconds.
from mtl_jax.train import command_line as command_line

# isort: split
from mtl_jax import gradients
from mtl_jax import transforms
from mtl_jax import updates
from mtl_jax.gradients import *  # noqa: F403
from mtl_jax.transforms import *  # noqa: F403
from mtl_jax.updates import *  # noqa: F403

__version__ = '0.1.0'

__all__ = [
  *gradients.__all__,
  *transforms.__all__,
  *updates.__all__,
]
