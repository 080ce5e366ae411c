"""Weightings that learn from a validation batch.

They weigh the tasks' losses so that a step on the training batch helps on the
validation batch. This module holds their common parts; each method has its own
file. None is an aggregator: they evaluate the losses themselves and cost more
than one backward pass.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax.transforms.contract import aggregation
from mtl_jax.transforms.contract import algebra
from mtl_jax.transforms.contract import arguments

LossFn = Callable[[Any, Any], jax.Array]


def check_optimizer(optimizer: Any) -> None:
  """Raises unless `optimizer` is an optax transformation."""
  if not (hasattr(optimizer, 'init') and hasattr(optimizer, 'update')):
    raise TypeError(
      f'optimizer must be an optax.GradientTransformation, got {optimizer!r}'
    )


def check_tasks(num_tasks: int) -> None:
  """Raises unless `num_tasks` is a number of at least 1."""
  if num_tasks is None:
    raise ValueError(f'num_tasks must be at least 1, got {num_tasks}')
  arguments.check_num_tasks(num_tasks)


def dtype_of(params: Any) -> Any:
  """The dtype of weights: float32, or wider if a parameter is.

  Raises:
    ValueError: for a parameter that is not a real floating-point array; the
      message names it.
  """
  aggregation.check_parameters(params)
  return jnp.result_type(
    jnp.float32, *(algebra.wide(leaf.dtype) for leaf in jax.tree.leaves(params))
  )


def task_losses(
  loss_fn: LossFn, batch: Any, active: jax.Array, dtype: Any
) -> Callable[[Any], jax.Array]:
  """The losses as a function of the parameters; 0 for absent tasks.

  Args:
    loss_fn: `(params, batch) -> losses [T]`.
    batch: the second argument of `loss_fn`.
    active: bool [T].
    dtype: of the result.

  Returns:
    `params -> losses [T]`.
  """

  def losses_of(params):
    losses = aggregation.check_losses(loss_fn(params, batch), active.shape[0])
    return jnp.where(active, losses, 0).astype(dtype)

  return losses_of


def descend(params: Any, grads: Any, learning_rate: Any) -> Any:
  """One step of gradient descent; every leaf keeps its dtype."""
  return jax.tree.map(
    lambda p, g: (p - learning_rate * g).astype(p.dtype), params, grads
  )
