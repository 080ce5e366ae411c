"""The table of methods that every property is tested on. One row a method."""

from collections.abc import Callable
import functools
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
from method_row import GOLDEN_LOSSES as GOLDEN_LOSSES
from method_row import GOLDEN_MATRIX as GOLDEN_MATRIX
from method_row import LOSSES as LOSSES
import numpy as np
import pytest
import quick_compile
import rows_basic
import rows_geometry
import rows_solvers
import rows_stochastic
import rows_weightings

METHODS = (
  *rows_basic.METHODS,
  *rows_solvers.METHODS,
  *rows_geometry.METHODS,
  *rows_stochastic.METHODS,
  *rows_weightings.METHODS,
)


def params(methods):
  """The methods as parameters of a test, by name."""
  return [pytest.param(m, id=m.name) for m in methods]


ALL = params(METHODS)
RANDOM = params(m for m in METHODS if m.random)
# Random methods whose outcomes the reference can enumerate.
ENUMERATED = params(m for m in METHODS if m.random and m.draws is None)
SYMMETRIC = params(m for m in METHODS if not m.random and m.symmetric)
NEEDS_LOSSES = params(m for m in METHODS if m.needs_losses)
NEEDS_TASKS = params(m for m in METHODS if m.needs_tasks)
WEIGHTED = params(m for m in METHODS if m.weights == 'gradients')
STEPWISE = params(m for m in METHODS if m.stepwise)

# Three tasks of which each conflicts with the others, so that nothing a method
# does is left out.
CONFLICTING = np.array(
  [
    [2.0, -0.5, -0.4, 0.3, 0.1],
    [-0.6, 1.0, -0.5, 0.2, -0.3],
    [-0.5, -0.3, 0.7, -0.4, 0.2],
  ],
  np.float32,
)


class Compiled(NamedTuple):
  """A method with `num_tasks`, jitted once for all tests.

  Attributes:
    tx: the aggregator.
    update: `(task_grads, state, losses, active) -> (updates, state)`, jitted.
    traces: grows by an entry whenever `update` is traced.
  """

  tx: Any
  update: Callable[..., Any]
  traces: list[None]


@functools.cache
def _compiled(name, tasks):
  (method,) = (m for m in METHODS if m.name == name)
  tx = method.make(tasks, num_tasks=len(tasks))
  traces = []

  def update(task_grads, state, losses, active):
    traces.append(None)
    return tx.update(
      task_grads,
      state,
      losses=losses,
      active=active,
      **method.extras(task_grads),
    )

  return Compiled(tx, quick_compile.jit(update), traces)


def compiled(method, tasks):
  """The row's aggregator for these tasks, from the cache if it can be."""
  # Tasks differ by their number alone, unless an argument tells them apart.
  tasks = tuple(tasks) if method.per_task else tuple(range(len(tasks)))
  return _compiled(method.name, tasks)


def run(method, J, *, losses=None, active=None, tasks=None, state=None):
  """One jitted update of a method with `num_tasks`.

  Args:
    method: row of the table.
    J: [T, D] task gradients.
    losses: [T]; `LOSSES` of the tasks if None.
    active: [T] or None.
    tasks: which tasks the rows are; the first T if None.
    state: to go on from; the initial one if None.

  Returns:
    update [D], a NumPy array, and the new state.
  """
  J = jnp.asarray(J)
  tasks = range(len(J)) if tasks is None else tasks
  method = compiled(method, tasks)
  if losses is None:
    losses = np.take(LOSSES, tasks)
  if active is not None:
    active = jnp.asarray(active)
  if state is None:
    state = method.tx.init(jnp.zeros(J.shape[1], J.dtype))
  losses = jnp.asarray(losses, jnp.float32)
  updates, state = method.update(J, state, losses, active)
  return np.asarray(updates), state


def close(actual, expected, J, tolerance=1e-5):
  """Raises unless equal up to rounding relative to the longest gradient."""
  size = np.linalg.norm(np.asarray(J, np.float64), axis=1).max()
  np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * size)


def structure(state):
  """What must not change from one update to the next."""
  shapes = jax.tree.map(jax.typeof, state)
  return jax.tree.structure(shapes), [
    (x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(shapes)
  ]


def matrix(size, dimensions, seed=0):
  """Gradients in general position, with conflicts, of unlike lengths."""
  rng = np.random.default_rng(seed)
  J = rng.standard_normal((size, dimensions))
  lengths = 10.0 ** rng.uniform(-0.5, 0.5, (size, 1))
  return (lengths * J).astype(np.float32)
