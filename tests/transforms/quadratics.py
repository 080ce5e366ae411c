"""Tasks with quadratic losses, whose flat-minima update is a closed form.

Task i has the loss 1/2 (x_i - c_i)' A_i (x_i - c_i), where x_i holds the shared
parameters and those of its head. A_i is full, so that each part of x_i matters
for the gradient of the other. `Quadratics.update` is the whole update of
`flat_minima` in float64 NumPy, from the equations of DESIGN, section 4.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import methods
import numpy as np
import quick_compile

import mtl_jax

# Not in alphabetical order: the task axis follows the names, not a dictionary.
NAMES = ('segmentation', 'depth', 'normals')
SIZE = len(NAMES)
SHARED = 6
HEAD = 3

# The first row of each factory.
FACTORIES = tuple({m.factory: m for m in reversed(methods.METHODS)}.values())[
  ::-1
]

# Those of which the reference knows the draws: a
# method that draws for each coordinate draws anew for each leaf.
KNOWN = tuple(
  m for m in methods.METHODS if not (m.random and m.weights == 'none')
)

by_name = lambda rows: {'argvalues': rows, 'ids': [row.name for row in rows]}


def tree(shared, heads, names=NAMES):
  """Parameters or task gradients from shared [..., 6] and heads [T, 3]."""
  lead = shared.shape[:-1]
  return {
    'shared': {
      'kernel': shared[..., :4].reshape(*lead, 2, 2),
      'bias': shared[..., 4:],
    },
    'heads': {
      name: {'scale': head[:2], 'offset': head[2]}
      for name, head in zip(names, heads, strict=True)
    },
  }


def vectors(params, names=NAMES, xp=np):
  """The inverse of `tree`: shared [..., 6] and heads [T, 3]."""
  shared = params['shared']
  lead = shared['bias'].shape[:-1]
  heads = [params['heads'][name] for name in names]
  return (
    xp.concatenate(
      [shared['kernel'].reshape(*lead, 4), shared['bias']], axis=-1
    ),
    xp.stack(
      [xp.concatenate([h['scale'], h['offset'].reshape(1)]) for h in heads]
    ),
  )


def compiled(method, size=SIZE):
  """The method for the first `size` tasks, its update jitted once for all."""
  return _compiled(method.name, size)


@functools.cache
def _compiled(name, size):
  method = next(m for m in methods.METHODS if m.name == name)
  tx = method.make_alone(range(size), num_tasks=size)
  return mtl_jax.Aggregator(
    tx.init,
    quick_compile.jit(tx.aggregate),
    head_scale=tx.head_scale,
    weights=tx.weights,
  )


def losses(size=SIZE):
  return jnp.asarray(methods.LOSSES[:size], jnp.float32)


def filled(task_grads, keep, fill):
  """Task gradients with `fill` everywhere in those that are not kept."""
  rows = lambda x: jnp.where(keep[:, None], x, fill)
  return tree(*map(rows, vectors(task_grads, xp=jnp)))


# What an aggregator inside `flat_minima` makes of its rows; no two alike.
COEFFICIENTS = np.array([0.5, -1.0, 2.0], np.float32)


class Recorded(NamedTuple):
  """State of `recording`.

  Attributes:
    task_weights: `COEFFICIENTS` times the mark; zero before an update.
    mark: tells one state from another.
    stack: the task gradients of the last update.
    losses: of the last update.
    active: of the last update.
  """

  task_weights: Any
  mark: Any
  stack: Any
  losses: Any
  active: Any


def recording():
  """An aggregator that remembers what it is given, and sums it.

  `flat_minima` knows no more of any other.
  """

  def init(params):
    rows = lambda p: jnp.zeros((SIZE, *p.shape))
    zeros = jnp.zeros(SIZE)
    stack = jax.tree.map(rows, params)
    return Recorded(zeros, jnp.ones(()), stack, zeros, zeros > 0)

  def aggregate(stack, state, params=None, *, losses, active=None, **_):
    del params
    weights = state.mark * jnp.asarray(COEFFICIENTS)
    active = jnp.ones(SIZE, bool) if active is None else active
    updates = jax.tree.map(lambda x: jnp.tensordot(weights, x, 1), stack)
    return updates, Recorded(weights, state.mark, stack, losses, active)

  return mtl_jax.Aggregator(init, aggregate, weights='gradients')


# The situations of `flat`: whether there are radii, which tasks are active,
# whose gradients are kept, and what stands in the place of the others and of
# the losses of absent tasks.
RADII = {'rho': 0.3, 'rho_heads': 0.7}
_ALL, _NONE = (True, True, True), (False, False, False)
_PRESENT = (True, False, True)
SITUATIONS = {
  'all tasks': (1, _ALL, _ALL, 0),
  'radius zero': (0, _ALL, _ALL, 0),
  'one absent, NaN': (1, _PRESENT, _PRESENT, np.nan),
  'one absent, infinite': (1, _PRESENT, _PRESENT, np.inf),
  'one absent, finite': (1, _PRESENT, _PRESENT, 1e3),
  'none active': (1, _NONE, _NONE, np.nan),
  'one gradient zero': (1, _ALL, (False, True, True), 0),
  'all gradients zero': (1, _ALL, _NONE, 0),
}


class Flat(NamedTuple):
  """What `flat_minima` makes of a situation.

  Attributes:
    updates: laid out like the parameters.
    task_params: what `grad_fn` was given.
    shown: what `diagnostics` shows.
  """

  updates: Any
  task_params: Any
  shown: Any


def situations(problem, make):
  """One update in every situation.

  Args:
    problem: of three tasks.
    make: `(rho=, rho_heads=) -> flat_minima(...)`, with radii that may be
      traced; or a dictionary of such.

  Returns:
    a `Flat` by the name of the situation, or a dictionary of such.
  """
  makes = make if isinstance(make, dict) else {None: make}
  states = {
    name: make(rho=0.1, rho_heads=0.1).init(problem.params)
    for name, make in makes.items()
  }

  def one(states, times, active, keep, fill):
    radii = {name: times * radius for name, radius in RADII.items()}
    return {
      name: run(name, radii, states[name], active, keep, fill) for name in makes
    }

  def run(name, radii, state, active, keep, fill):
    seen = []

    def grad_fn(task_params):
      seen.append(task_params)
      return filled(problem.grad_fn(task_params), keep, fill)

    updates, state = makes[name](**radii).update(
      filled(problem.task_grads, keep, fill),
      state,
      problem.params,
      grad_fn=grad_fn,
      losses=jnp.where(active, losses(), fill),
      active=active,
    )
    return Flat(updates, *seen, mtl_jax.diagnostics(state))

  rows = [np.array(x) for x in zip(*SITUATIONS.values(), strict=True)]
  rows[0], rows[3] = (x.astype(np.float32) for x in (rows[0], rows[3]))
  mapped = quick_compile.jit(jax.vmap(one, in_axes=(None, 0, 0, 0, 0)))
  found = jax.tree.map(np.asarray, mapped(states, *rows))
  by_situation = lambda flat: {
    situation: jax.tree.map(lambda x, i=i: x[i], flat)
    for i, situation in enumerate(SITUATIONS)
  }
  if isinstance(make, dict):
    return {name: by_situation(flat) for name, flat in found.items()}
  return by_situation(found[None])


def head_scale(method):
  """The closed form scales heads by coefficients of the task gradients."""
  return 'weights' if method.weights == 'gradients' else 'none'


@functools.cache
def flat(method):
  """`situations` of `flat_minima` around a method, at `Quadratics.random()`."""
  return situations(
    Quadratics.random(),
    functools.partial(
      mtl_jax.flat_minima,
      # Traced once for both of its calls.
      compiled(method),
      NAMES,
      head_scale=head_scale(method),
    ),
  )


@dataclasses.dataclass(frozen=True)
class Quadratics:
  """T quadratic tasks and the point the parameters are at.

  Attributes:
    names: the tasks.
    A: [T, 9, 9].
    c: [T, 9].
    shared: [6].
    heads: [T, 3].
  """

  names: tuple[str, ...]
  A: np.ndarray
  c: np.ndarray
  shared: np.ndarray
  heads: np.ndarray

  @classmethod
  def random(cls, names=NAMES, seed=0):
    rng = np.random.default_rng(seed)
    size, dims = len(names), SHARED + HEAD
    root = rng.standard_normal((size, dims, dims))
    return cls(
      names,
      root @ np.swapaxes(root, 1, 2) / dims + 0.1 * np.eye(dims),
      rng.standard_normal((size, dims)),
      rng.standard_normal(SHARED),
      rng.standard_normal((size, HEAD)),
    )

  def take(self, tasks):
    """The same problem with these of the tasks alone."""
    tasks = list(tasks)
    names = tuple(self.names[i] for i in tasks)
    return Quadratics(
      names, self.A[tasks], self.c[tasks], self.shared, self.heads[tasks]
    )

  @property
  def params(self):
    to_jax = lambda x: jnp.asarray(x, jnp.float32)
    return tree(to_jax(self.shared), to_jax(self.heads), self.names)

  def grad_fn(self, task_params):
    """Task parameters to task gradients, in JAX."""
    shared, heads = vectors(task_params, self.names, jnp)
    x = jnp.concatenate([shared, heads], axis=1)
    A, c = jnp.asarray(self.A, jnp.float32), jnp.asarray(self.c, jnp.float32)
    g = jnp.einsum('tij,tj->ti', A, x - c, precision='highest')
    return tree(g[:, :SHARED], g[:, SHARED:], self.names)

  @property
  def task_params(self):
    """All tasks at the parameters."""
    shared = jnp.asarray(np.tile(self.shared, (len(self.names), 1)), 'float32')
    return tree(shared, jnp.asarray(self.heads, jnp.float32), self.names)

  @property
  def task_grads(self):
    return self.grad_fn(self.task_params)

  def gradient(self, x):
    """Row i of the result is the gradient of task i at row i of x [T, 9]."""
    return np.einsum('tij,tj->ti', self.A, x - self.c)

  def perturbed(self, *, rho, rho_heads, adaptive=False, norm='separate'):
    """The task parameters x + e [T, 9], in NumPy."""
    shared = np.tile(self.shared, (len(self.names), 1))
    x = np.concatenate([shared, self.heads], axis=1)
    g = self.gradient(x)
    measured = np.abs(x) * g if adaptive else g
    direction = x**2 * g if adaptive else g
    parts = [slice(0, SHARED), slice(SHARED, None)]
    if norm == 'joint':
      lengths = [np.linalg.norm(measured, axis=1, keepdims=True)] * 2
    else:
      lengths = [
        np.linalg.norm(measured[:, part], axis=1, keepdims=True)
        for part in parts
      ]
    e = np.zeros_like(x)
    for part, length, radius in zip(
      parts, lengths, (rho, rho_heads), strict=True
    ):
      e[:, part] = radius * direction[:, part] / length
    return x + e

  def stacks(
    self, *, combine='separate', combiner=np.sum, **perturbation
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What is aggregated, in NumPy.

    Args:
      combine: as in `flat_minima`.
      combiner: rows [2, 6] to [6].
      **perturbation: as in `perturbed`.

    Returns:
      the stack [T, 6] that is aggregated first, the flat gradients [T, 6], and
      the SAM gradients [T, 9].
    """
    g = self.gradient(self.perturbed(rho=0, rho_heads=0))
    s = self.gradient(self.perturbed(**perturbation))
    of_loss = g[:, :SHARED]
    of_flat = s[:, :SHARED] - of_loss
    if combine == 'direct':
      return s[:, :SHARED], of_flat, s
    if combine == 'each':
      both = np.stack([of_loss, of_flat], axis=1)
      return np.stack([combiner(rows) for rows in both]), of_flat, s
    return of_loss, of_flat, s

  def update(
    self,
    aggregate: Callable[[np.ndarray], np.ndarray],
    *,
    combine='separate',
    combiner: Callable[[np.ndarray], np.ndarray] | None = None,
    head_scale='none',
    **perturbation,
  ):
    """The right updates, in NumPy.

    Args:
      aggregate: J [T, 6] to all right updates [N, 6]; outcome n of every call
        stands for the same draw of a random method.
      combine: as in `flat_minima`.
      combiner: rows [2, 6] to [6]; their sum if None.
      head_scale: as in `flat_minima`.
      **perturbation: as in `perturbed`.

    Returns:
      shared [N, 6] and heads [N, T, 3].
    """
    combiner = combiner or (lambda rows: rows.sum(axis=0))
    first, of_flat, s = self.stacks(
      combine=combine, combiner=combiner, **perturbation
    )
    shared = results = aggregate(first)
    if combine in ('separate', 'second'):
      pairs = np.stack([results, aggregate(of_flat)], axis=1)
      if combine == 'separate':
        shared = pairs.sum(axis=1)
      else:
        shared = np.stack([combiner(pair) for pair in pairs])
    # Weights [N, T] from the result, for the rows are linearly independent.
    weights = np.linalg.lstsq(first.T, results.T, rcond=None)[0].T
    if head_scale == 'none':
      weights = np.ones_like(weights)
    return shared, weights[:, :, None] * s[:, SHARED:]


def assert_is_one_of(updates, expected, names=NAMES, tolerance=1e-4, name=''):
  """An update must be one of the right ones (`Quadratics.update`).

  Tolerances are relative to the update's length; flat gradients are differences
  of float32 numbers, which leaves them about five digits.
  """
  shared, heads = vectors(updates, names)
  misses = [
    max(
      np.linalg.norm(shared - right_shared) / np.linalg.norm(right_shared),
      np.linalg.norm(heads - right_heads) / np.linalg.norm(right_heads),
    )
    for right_shared, right_heads in zip(*expected, strict=True)
  ]
  # `not <` and not `>`: NaN is a miss.
  assert min(misses) < tolerance, (name, misses, shared, heads, expected)
