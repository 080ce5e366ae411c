"""What a step differentiates: one batch, its slices, or two halves of it."""

from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtl_jax import gradients
from mtl_jax import slices as slicing
from mtl_jax import transforms
from mtl_jax import types


class TaskGradients(NamedTuple):
  """Task gradients of a batch, and what an aggregator may ask for besides."""

  losses: jax.Array
  aux: Any
  task_grads: types.TaskGrads
  keywords: dict[str, Any]


def task_gradients(
  loss_fn,
  params,
  batch,
  names,
  *,
  replicas,
  extra_batches,
  micro_batches,
  layout=None,
  **options,
):
  """Of the batch; or of its slices, the first for the update.

  Losses and gradients are those of the replica, which its optimizer averages.
  """
  fns = gradients.task_grad(
    loss_fn, names, micro_batches=micro_batches, has_aux=True, **options
  )
  at, at_each = fns if layout is None else layout.task_grad(fns)
  if not extra_batches:
    args = replicas.arguments(batch, names, micro_batches)
    (losses, aux), task_grads = at(params, *args)
    grad_fn = lambda task_params: at_each(task_params, *args)[1]
    aux = of_slices(aux, micro_batches)
    return TaskGradients(losses, aux, task_grads, {'grad_fn': grad_fn})

  number = 1 + extra_batches
  pieces = slicing.independent(batch, number)
  args = [replicas.arguments(piece, names, micro_batches) for piece in pieces]
  found = [at(params, *of_piece) for of_piece in args]
  counts = replicas.label_counts(pieces, names)
  shares = counts / jnp.maximum(jnp.sum(counts, axis=0, keepdims=True), 1)
  losses = jnp.sum(shares * jnp.stack([f[0][0] for f in found]), axis=0)
  aux = of_slices(
    jax.tree.map(
      lambda *xs: jnp.stack(xs),
      *(of_slices(f[0][1], micro_batches) for f in found),
    ),
    number,
  )
  each = lambda task_params, k: at_each(task_params, *args[k])[1]
  keywords = {
    'grad_fn': lambda task_params: each(task_params, 0),
    'extra_grads': tuple(f[1] for f in found[1:]),
    'extra_grad_fn': lambda task_params: tuple(
      each(task_params, k) for k in range(1, number)
    ),
  }
  return TaskGradients(losses, aux, found[0][1], keywords)


def of_slices(aux, slices):
  """The model's state and the sums of the metrics, of all slices together."""
  if slices == 1:
    return aux
  model_state, sums = aux
  return (
    jax.tree.map(lambda x: jnp.mean(x, axis=0), model_state),
    jax.tree.map(lambda x: jnp.sum(x, axis=0), sums),
  )


def in_every_slice(batch, names, number, replicas):
  """Which tasks have labels in each of the slices, bool [T]."""
  pieces = slicing.independent(batch, number)
  return jnp.all(replicas.label_counts(pieces, names) > 0, axis=0)


def weigh(
  weighting, losses_of, state, batch, names, active, lookahead, replicas
):
  """The map from losses to weights and the next state of the weighting."""
  if not isinstance(weighting, transforms.BilevelWeighting):
    return lambda losses: weighting.update(
      replicas.mean(losses), state.weighting, active=active
    )
  train, valid = slicing.independent(batch, 2)
  weights, after = weighting.update(
    losses_of,
    state.params,
    train,
    valid,
    state.weighting,
    learning_rate=lookahead,
    active=in_every_slice(batch, names, 2, replicas),
  )
  # A task that is in one half alone is not weighed; absent ones have weight 0.
  return lambda losses: (jnp.where(active, weights, 0), after)
