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

import mtl_jax

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


# How many updates one program makes.
_BATCH = 8


class Batch(NamedTuple):
  """Updates of several stacks, each from a state of its own.

  Attributes:
    updates: [N, D], a NumPy array.
    shown: what `diagnostics` shows of the new states, [N, ...] each, in NumPy.
    states: the new states, for `run_all` to go on from; leaves [8, ...], the
      last ones to no purpose. None where one call was not enough.
  """

  updates: Any
  shown: dict[str, Any]
  states: Any


class _CompiledBatch(NamedTuple):
  tx: Any
  update: Callable[..., Any]
  traces: list[None]


@functools.cache
def _compiled_batch(name, tasks):
  (method,) = (m for m in METHODS if m.name == name)
  tx = method.make(tasks, num_tasks=len(tasks))
  traces = []

  def update(task_grads, state, losses, active):
    traces.append(None)
    updates, state = tx.update(
      task_grads,
      state,
      losses=losses,
      active=active,
      **method.extras(task_grads),
    )
    return updates, state, mtl_jax.diagnostics(state)

  return _CompiledBatch(tx, quick_compile.jit(jax.vmap(update)), traces)


def compiled_batch(method, tasks):
  """Like `compiled`: `update` takes and gives rows of everything."""
  tasks = tuple(tasks) if method.per_task else tuple(range(len(tasks)))
  return _compiled_batch(method.name, tasks)


def dimensions(size):
  """D of the stacks of `run_all`: one for few tasks, one for many."""
  return 5 if size < 5 else 60


def initial(method, size):
  """The initial state for the first `size` tasks."""
  tx = compiled_batch(method, range(size)).tx
  return tx.init(np.zeros(dimensions(size), np.float32))


def stack(states):
  """States for `run_all`, the last again and again where they are too few.

  Not by jax, which would compile a program for every shape.
  """

  def rows(*arrays):
    arrays = [*arrays, *arrays[-1:] * (_BATCH - len(arrays))]
    if jnp.issubdtype(arrays[0].dtype, jax.dtypes.prng_key):
      data = np.stack([jax.random.key_data(x) for x in arrays])
      return jax.random.wrap_key_data(data)
    return np.stack([np.asarray(x) for x in arrays])

  return jax.tree.map(rows, *states)


def run_all(
  method, stacks, *, losses=None, active=None, tasks=None, states=None
):
  """One update from each of several stacks, in one program for all tests.

  Args:
    method: row of the table.
    stacks: [N, T, D]; no two programs are compiled unless T or D differ.
    losses: [N, T] or [T]; `LOSSES` of the tasks if None.
    active: [N, T] or None, which is a program of its own.
    tasks: which tasks the rows are; the first T if None.
    states: of an earlier `Batch`, or from `stack`; the initial state for each
      if None.

  Returns:
    A `Batch`.
  """
  stacks = np.asarray(stacks, np.float32)
  number, size, dims = stacks.shape
  tasks = range(size) if tasks is None else tasks
  compiled = compiled_batch(method, tasks)
  losses = np.take(LOSSES, tasks) if losses is None else np.asarray(losses)
  given = [stacks, np.broadcast_to(losses, (number, size)).astype(np.float32)]
  if active is not None:
    given.append(np.broadcast_to(active, (number, size)))
  if states is None:
    states = stack([compiled.tx.init(np.zeros(dims, np.float32))])
  elif number > _BATCH:
    raise ValueError(f'{number} stacks for {_BATCH} states')
  found = []
  for start in range(0, number, _BATCH):
    # The last rows again and again where too few are left.
    rows = np.minimum(np.arange(start, start + _BATCH), number - 1)
    J, of_losses, *present = (x[rows] for x in given)
    updates, new, shown = compiled.update(
      J,
      states,
      of_losses,
      present[0] if present else None,
    )
    found.append((np.asarray(updates), jax.tree.map(np.asarray, shown)))
  updates, shown = jax.tree.map(
    lambda *parts: np.concatenate(parts)[:number], *found
  )
  return Batch(updates, shown, new if len(found) == 1 else None)


def assert_finite(shown, names):
  """Everything that is shown of each of the named states is finite."""
  for name, values in shown.items():
    for i, row in enumerate(names):
      assert np.all(np.isfinite(values[i])), (row, name, values[i])


def close(actual, expected, J, tolerance=1e-5, what=''):
  """Raises unless equal up to rounding relative to the longest gradient."""
  size = np.linalg.norm(np.asarray(J, np.float64), axis=1).max()
  np.testing.assert_allclose(
    actual, expected, rtol=0, atol=tolerance * size, err_msg=str(what)
  )


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


@functools.cache
def eager_golden(method):
  """The update on `GOLDEN_MATRIX` and the state after it, without `jit`."""
  tx = method.make_golden()
  J = jnp.asarray(GOLDEN_MATRIX, jnp.float32)
  return tx.update(
    J,
    tx.init(jnp.zeros(3)),
    losses=jnp.asarray(GOLDEN_LOSSES, jnp.float32),
    **method.extras(J),
  )
