"""Losses and gradients of every task, from loss functions.

Needs jax, numpy and optax, and from this project `types` and `transforms`.
"""

from mtl_jax.gradients._aux import Aux
from mtl_jax.gradients._aux import Pass
from mtl_jax.gradients._task_grad import task_grad
from mtl_jax.gradients._task_grad import TaskGrad
from mtl_jax.gradients._task_grad import weighted_grad
from mtl_jax.gradients._task_grad import WeightedGrad
from mtl_jax.gradients._task_losses import Boundary
from mtl_jax.gradients._task_losses import combined
from mtl_jax.gradients._task_losses import Objective
from mtl_jax.gradients._task_losses import task_losses
from mtl_jax.gradients._task_losses import TaskLosses
from mtl_jax.gradients.engines import ENGINES

__all__ = [
  'ENGINES',
  'Aux',
  'Boundary',
  'Objective',
  'Pass',
  'TaskGrad',
  'TaskLosses',
  'WeightedGrad',
  'combined',
  'task_grad',
  'task_losses',
  'weighted_grad',
]
