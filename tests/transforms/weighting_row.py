"""A row of the table of loss weightings, and what rows are made of."""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import weighting_references as references

import mtl_jax

SHARES = tuple(0.5 + i % 3 for i in range(40))
BOUNDS = tuple(-0.1 * (i % 4) for i in range(40))
NADIR = tuple(1.0 + i % 3 for i in range(40))
KINDS = tuple(('gaussian', 'softmax')[i % 2] for i in range(40))
GAMMAS = tuple(0.5 * (1 + i % 3) for i in range(40))


@dataclasses.dataclass(frozen=True)
class Row:
  """A row of the table.

  Attributes:
    name: what the test is called.
    make: `tasks -> LossWeighting` for these of 40 tasks.
    golden: [2], the weights of the first update on losses [1, 2], by hand or
      from outside.
    reference: `tasks -> Reference`; None for a random method.
    objective: `losses [T] -> scalar` whose gradient are the weights of the
      first update of the first T tasks; None for a method without one.
    factory: of `mtl_jax`, for the arguments it refuses.
    arguments: that it needs besides.
    wrong: (argument, value) pairs.
    positive: whether losses must be positive.
    symmetric: whether the order of tasks does not matter.
    independent: whether a task's weight depends on its own losses alone, and
      not on the time.
  """

  name: str
  make: Callable[[Any], mtl_jax.LossWeighting]
  golden: Any
  reference: Callable[[Any], references.Reference] | None
  objective: Callable[[jax.Array], jax.Array] | None = None
  factory: Callable[..., Any] | None = None
  arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
  wrong: tuple[tuple[str, Any], ...] = ()
  positive: bool = False
  symmetric: bool = True
  independent: bool = False


def of(values, tasks):
  """The entries of these tasks."""
  return tuple(values[i] for i in tasks)


def array(values, losses):
  """The entries of the first T tasks, like the losses."""
  return jnp.asarray(values[: losses.size], losses.dtype)


def cosine(a, b):
  return a @ b / jnp.linalg.norm(a) / jnp.linalg.norm(b)


def boundary(losses, r, ideal, theta):
  unit = r / jnp.linalg.norm(r)
  above = losses - ideal
  along = above @ unit
  return along + theta * jnp.linalg.norm(above - along * unit)


def balanced(losses, bounds):
  """FAMO's objective with the weights of its start; c is held."""
  left = losses - bounds
  c = 1 / jax.lax.stop_gradient(jnp.mean(1 / left))
  return c * jnp.mean(jnp.log(left))


def schedule(count):
  # Three quarters of the way from 1 to 2 in two steps, then there.
  return jnp.minimum(1 + 0.375 * count, 2.0)


NEVER_WEIGHTS = tuple(
  ('weights', value)
  for value in (
    (-1.0, 2.0),
    (0.0, 0.0),
    (float('nan'), 1.0),
    (float('inf'), 1.0),
    (),
    2.0,
  )
)
NEVER_PREFERENCES = tuple(('preference', v) for _, v in NEVER_WEIGHTS)
NEVER_RATES = tuple(
  ('learning_rate', v) for v in (0.0, -1.0, float('nan'), float('inf'))
)


class Scheduled(references.Reference):
  """Odd tasks go from 1 to 2, even ones stay at their share."""

  def __init__(self, tasks):
    self.tasks, self.steps = tasks, 0

  def update(self, losses):
    moving = (1.0, 1.375, 1.75)[self.steps] if self.steps < 3 else 2.0
    self.steps += 1
    return np.array([moving if i % 2 else SHARES[i] for i in self.tasks])


class FirstThen(references.Reference):
  """Three updates of the first, all others of the second."""

  def __init__(self, size):
    self.first = references.Uncertainty(size, 0.5)
    self.then = references.Famo(size, 1e-3)
    self.updates = 0

  def update(self, losses):
    self.updates += 1
    return (self.first if self.updates <= 3 else self.then).update(losses)

  def after_step(self, new_losses):
    if self.updates > 3:
      self.then.after_step(new_losses)


def params(rows):
  return [pytest.param(row, id=row.name) for row in rows]
