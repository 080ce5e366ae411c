"""The auxiliary results of a loss function, over slices and replicas."""

from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Aux(NamedTuple):
  """The results of a loss function besides losses.

  Attributes:
    mean: a tree that is averaged over slices and replicas, such as a model's
      state.
    sum: a tree that is added up over them, such as sums of metrics.
  """

  mean: Any = ()
  sum: Any = ()


class Pass(NamedTuple):
  """The result of a forward pass.

  Attributes:
    losses: [T].
    aux: an `Aux`; empty if the loss function returns none.
  """

  losses: jax.Array
  aux: Any


def together(aux):
  """Aux with leading axes for slices, averaged or added up over them."""
  return Aux(
    jax.tree.map(lambda x: jnp.mean(x, axis=0).astype(x.dtype), aux.mean),
    jax.tree.map(lambda x: jnp.sum(x, axis=0), aux.sum),
  )


def merged(first, second):
  """One `Aux` from two that fill different fields."""
  empty = lambda x: isinstance(x, tuple) and not x
  for name, *both in zip(Aux._fields, first, second, strict=True):
    if not any(map(empty, both)):
      raise ValueError(f'features_fn and head_loss_fn both return Aux.{name}')
  return Aux(
    *(b if empty(a) else a for a, b in zip(first, second, strict=True))
  )


def pair_of(fn, name='losses'):
  """The function of losses, or of features, with an `Aux` in any case."""

  def pair(*args):
    out = fn(*args)
    with_aux = isinstance(out, tuple) and out and isinstance(out[-1], Aux)
    if not with_aux and (name != 'losses' or not isinstance(out, tuple)):
      return out, Aux()
    if not with_aux or len(out) != 2:
      raise ValueError(
        f'loss_fn must return {name}, or ({name}, Aux(mean=..., sum=...)); got '
        f'a tuple of {tuple(type(x).__name__ for x in out)}'
      )
    return out

  return pair
