"""The table of methods that every property is tested on. One row a method."""

from collections.abc import Callable
from collections.abc import Mapping
import dataclasses
import functools
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references

import mtl_jax

# The matrix of SimplexLab/TorchJD's tests, and losses to go with it.
GOLDEN_MATRIX = np.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
GOLDEN_LOSSES = np.array([1.0, 2.0])

# As many as the largest number of tasks in these tests.
LOSSES = 0.25 + np.arange(40) * 7 % 11
WEIGHTS = tuple(0.5 + i % 3 for i in range(40))


@dataclasses.dataclass(frozen=True)
class Method:
  """A row of the table.

  Attributes:
    name: what the test is called.
    factory: of `mtl_jax`.
    reference: `(J [T, D], losses [T]) -> [N, D]` in float64: all the updates
      that are right. More than one for a random method, equally likely. None
      for the sum weighted by `per_task`.
    golden: [3], the update on `GOLDEN_MATRIX`, from outside or by hand.
    scale: `T -> number`, what T identical gradients are multiplied by.
    arguments: of the factory.
    per_task: arguments of the factory with one entry a task.
    needs_losses: whether `update` raises without `losses`.
    random: whether the state holds a key.
    wrong: (argument, value) pairs that the factory refuses.
  """

  name: str
  factory: Callable[..., Any]
  reference: Callable[..., np.ndarray] | None
  golden: tuple[float, float, float]
  scale: Callable[[int], float] = lambda size: 1.0
  arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  per_task: Mapping[str, tuple[Any, ...]] = dataclasses.field(
    default_factory=dict
  )
  needs_losses: bool = False
  random: bool = False
  wrong: tuple[tuple[str, Any], ...] = ()

  def make(self, tasks, **options):
    """The aggregator for these of the (up to 40) tasks."""
    per_task = {
      name: tuple(values[i] for i in tasks)
      for name, values in self.per_task.items()
    }
    return self.factory(**self.arguments, **per_task, **options)

  def right(self, J, losses, tasks):
    """All right updates [N, D] for the gradients J of `tasks`."""
    J, losses = np.asarray(J, np.float64), np.asarray(losses, np.float64)
    if self.reference is not None:
      return self.reference(J, losses)
    (weights,) = self.per_task.values()
    return references.weighted(np.take(weights, tasks))(J, losses)


METHODS = (
  Method(
    name='linear',
    factory=mtl_jax.linear,
    reference=references.linear,
    # TorchJD's test_values (Mean), and by hand.
    golden=(1.0, 1.0, 1.0),
    wrong=(
      ('weights', (-1.0, 2.0)),
      ('weights', (0.0, 0.0)),
      ('weights', (float('nan'), 1.0)),
      ('weights', (float('inf'), 1.0)),
      ('weights', ()),
    ),
  ),
  Method(
    name='linear_weighted',
    factory=mtl_jax.linear,
    reference=None,
    per_task={'weights': WEIGHTS},
    scale=lambda size: sum(WEIGHTS[:size]),
    # 0.5 g_1 + 1.5 g_2.
    golden=(7.0, 2.0, 2.0),
  ),
  Method(
    name='mgda',
    factory=mtl_jax.mgda,
    reference=references.mgda('none'),
    # TorchJD's test_values. By hand: orthogonal to g_2 - g_1 = (10, 0, 0).
    golden=(0.0, 1.0, 1.0),
    wrong=(('normalization', 'L2'), ('normalization', None)),
  ),
  Method(
    name='mgda_l2',
    factory=mtl_jax.mgda,
    arguments={'normalization': 'l2'},
    reference=references.mgda('l2'),
    # By hand: two unit vectors have equal weights.
    golden=(1.0, 1.0, 1.0),
  ),
  Method(
    name='mgda_loss',
    factory=mtl_jax.mgda,
    arguments={'normalization': 'loss'},
    reference=references.mgda('loss'),
    # By hand: the Gram matrix of (-4, 1, 1) and (3, 1/2, 1/2) is
    # [[18, -11], [-11, 9.5]], so w_1 = 20.5 / 49.5 and d_1 = 6 - 10 w_1.
    golden=(6 - 205 / 49.5, 1.0, 1.0),
    needs_losses=True,
  ),
  Method(
    name='mgda_loss+',
    factory=mtl_jax.mgda,
    arguments={'normalization': 'loss+'},
    reference=references.mgda('loss+'),
    # By hand: lengths 1 and 1/2 with the cosine k = -22 / sqrt(18 * 38), so
    # w_1 = (1/4 - k/2) / (5/4 - k) = 0.320676 and d_1 = 6 - 10 w_1.
    golden=(2.793236, 1.0, 1.0),
    needs_losses=True,
  ),
  Method(
    name='pcgrad',
    factory=mtl_jax.pcgrad,
    reference=references.pcgrad('sum'),
    scale=float,
    # TorchJD's test_values. By hand: (1 + 22/18) g_1 + (1 + 22/38) g_2.
    golden=(0.584795, 3.801170, 3.801170),
    random=True,
    wrong=(
      ('reduction', 'none'),
      ('seed', 'zero'),
      ('seed', 0.5),
      ('seed', None),
    ),
  ),
  Method(
    name='pcgrad_mean',
    factory=mtl_jax.pcgrad,
    arguments={'reduction': 'mean'},
    reference=references.pcgrad('mean'),
    golden=(0.292398, 1.900585, 1.900585),
    random=True,
  ),
  # On the golden matrix g_w is (u, 1, 1) with u from -4 to 6, and the dual is
  # u + 2 + c sqrt(3) sqrt(u^2 + 2). For c below 1 / sqrt(3) it falls towards
  # u = -4, so that d = g_0 + c sqrt(3 / 18) g_1.
  Method(
    name='cagrad_0.1',
    factory=mtl_jax.cagrad,
    arguments={'c': 0.1, 'rescale': '1+c'},
    reference=references.cagrad(0.1, divisor=1.1),
    golden=(0.836701 / 1.1, 1.040825 / 1.1, 1.040825 / 1.1),
    wrong=(
      ('c', -0.5),
      ('c', float('nan')),
      ('c', float('inf')),
      ('rescale', 1),
      ('rescale', '1+c**2'),
    ),
  ),
  Method(
    name='cagrad_0.5',
    factory=mtl_jax.cagrad,
    arguments={'c': 0.5},
    reference=references.cagrad(0.5),
    scale=lambda size: 1.5,
    # TorchJD's test_values, and by hand as above.
    golden=(0.183503, 1.204124, 1.204124),
  ),
  Method(
    name='cagrad_0.9',
    factory=mtl_jax.cagrad,
    arguments={'c': 0.9, 'rescale': '1+c^2'},
    reference=references.cagrad(0.9, divisor=1.81),
    scale=lambda size: 1.9 / 1.81,
    # By hand: both tasks gain the same where d_1 = 0, and |d - g_0|^2 = 2.43
    # leaves d_2 = d_3 = 1 + sqrt(0.715).
    golden=(0.0, 1.845577 / 1.81, 1.845577 / 1.81),
  ),
  Method(
    name='imtl_g',
    factory=mtl_jax.imtl_g,
    reference=references.imtl_g,
    # TorchJD's test_values. By hand: w_1 : w_2 = sqrt(38) : sqrt(18).
    golden=(0.076696, 1.0, 1.0),
  ),
)


ALL = [pytest.param(m, id=m.name) for m in METHODS]
DETERMINISTIC = [pytest.param(m, id=m.name) for m in METHODS if not m.random]
RANDOM = [pytest.param(m, id=m.name) for m in METHODS if m.random]
NEEDS_LOSSES = [pytest.param(m, id=m.name) for m in METHODS if m.needs_losses]

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
    return tx.update(task_grads, state, losses=losses, active=active)

  # These tests compile much and compute little.
  options = {'xla_backend_optimization_level': 0}
  return Compiled(tx, jax.jit(update, compiler_options=options), traces)


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
