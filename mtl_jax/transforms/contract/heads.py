"""Scaling of the heads' gradients."""

from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax.transforms.contract import algebra

HEAD_SCALES = ('none', 'weights')


def head_weights(state: Any) -> jax.Array:
  """The task weights [T] in an aggregator's state, to scale heads by."""
  weights = getattr(state, 'task_weights', None)
  if weights is None:
    raise ValueError(
      "head_scale='weights' needs an aggregator that shows task_weights in its "
      f'state, got the state {type(state).__name__}'
    )
  return weights


def scale_head(
  leaf: jax.Array, owner: int, weights: jax.Array | None, active: Any
) -> jax.Array:
  """A head's gradient times its task's weight; zero for an absent task."""
  if weights is not None:
    wide = weights[owner] * leaf.astype(algebra.wide(leaf.dtype))
    leaf = wide.astype(leaf.dtype)
  return leaf if active is None else jnp.where(active[owner], leaf, 0)
