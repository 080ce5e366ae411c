"""Weights on the simplex that a method keeps from update to update."""

import jax
import jax.numpy as jnp


def start(num_tasks: int, dtype) -> jax.Array:
  """Equal weights [T]."""
  return jnp.full(num_tasks, 1 / num_tasks, dtype)


def share(weights: jax.Array, active: jax.Array) -> jax.Array:
  """The weights of the active tasks, rescaled to the sum 1.

  Args:
    weights: [T], not negative.
    active: bool [T].

  Returns:
    [T], 0 for absent tasks; equal weights where the active ones have none.
  """
  present = jnp.where(active, weights, 0)
  total = jnp.sum(present)
  equal = (active / jnp.maximum(jnp.sum(active), 1)).astype(weights.dtype)
  return jnp.where(total > 0, present / jnp.where(total > 0, total, 1), equal)


def keep(old: jax.Array, new: jax.Array, active: jax.Array) -> jax.Array:
  """New weights for the active tasks, within their old share.

  Args:
    old: [T], the weights in memory, with the sum 1.
    new: [T], with the sum 1 over the active tasks.
    active: bool [T].

  Returns:
    [T], with the sum 1; those of absent tasks are `old`.
  """
  # Computed from the absent tasks instead of the active ones, so that rounding
  # does not make the sum drift.
  room = jnp.maximum(1 - jnp.sum(jnp.where(active, 0, old)), 0)
  return jnp.where(active, room * new, old)


def relative(inner: jax.Array, active: jax.Array) -> jax.Array:
  """Inner products in units of the squared mean length of the gradients.

  Args:
    inner: [T, T], of a stack with itself or with one from another batch.
    active: bool [T].

  Returns:
    [T, T], of degree 0 in the gradients; zeros where no length is positive. A
    negative diagonal entry, which is possible with two batches, is not a
    length.
  """
  lengths = jnp.sqrt(jnp.maximum(jnp.diagonal(inner), 0))
  mean = jnp.sum(jnp.where(active, lengths, 0)) / jnp.maximum(
    jnp.sum(active), 1
  )
  inverse = jnp.where(mean > 0, 1 / jnp.where(mean > 0, mean, 1), 0)
  both = active[:, None] & active[None, :]
  # Divided twice, because the square of a mean length can leave float32.
  return jnp.where(both, inner, 0) * inverse * inverse
