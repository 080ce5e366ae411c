"""Derivatives of the solvers' solutions, against finite differences."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtl_jax
from mtl_jax.transforms.solvers import averse
from mtl_jax.transforms.solvers import cone
from mtl_jax.transforms.solvers import constrained
from mtl_jax.transforms.solvers import fair
from mtl_jax.transforms.solvers import simplex


def _direction(gram, active, c):
  """The multiplier of CAGrad too, for the update depends on it."""
  found, multiplier = averse.conflict_averse(gram, active, c)
  return found.weights * (1 + multiplier)


def _cone_each(gram, active, unused):
  del unused
  u = (1 + jnp.arange(gram.shape[0]) % 3).astype(gram.dtype)
  return cone.dual_cone(gram, active, jnp.diag(u)).weights


def _cone_mean(gram, active, unused):
  del unused
  u = (1 + jnp.arange(gram.shape[0]) % 3).astype(gram.dtype)
  return cone.dual_cone(gram, active, u[None]).weights


def _fair(gram, active, alpha, scale):
  return fair.alpha_fair(gram, active, alpha, scale).weights


def _least_worst(gram, active, rho):
  """The gradient of the constraint is a sum of those of the tasks."""
  size = gram.shape[0]
  q = jnp.where(active, 0.5 - jnp.arange(size) % 2, 0).astype(gram.dtype)
  constraint = constrained.Constraint(gram @ q, q @ gram @ q, rho)
  return constrained.least_worst(gram, constraint, active).weights


def _min_norm(gram, active, unused):
  del unused
  return simplex.min_norm(gram, active).weights


# `(gram, active, number) -> weights`, and which numbers.
SOLVERS = {
  'min_norm': (_min_norm, (0.0,)),
  'conflict_averse': (_direction, (0.4, 0.9)),
  'dual_cone_each': (_cone_each, (0.0,)),
  'dual_cone_mean': (_cone_mean, (0.0,)),
  'fair': (functools.partial(_fair, scale='norm'), (1.0, 0.3, 2.0)),
  'fair_paper': (functools.partial(_fair, scale='paper'), (10.0,)),
  'least_worst': (_least_worst, (0.1,)),
}
# Aggregators that differentiate more than a solver's weights.
DIRECTIONS = {
  'conicgrad': mtl_jax.conicgrad(),
  'conicgrad_20': mtl_jax.conicgrad(angle=20.0),
  'aligned_mtl': mtl_jax.aligned_mtl(),
  'aligned_mtl_rmse': mtl_jax.aligned_mtl('rmse'),
}
NAMES = [*SOLVERS, *DIRECTIONS]
DIMENSIONS = 6


def _of_rows(name):
  """`(J, active, number) -> numbers`, weights or an update."""
  if name in DIRECTIONS:
    tx = DIRECTIONS[name]
    return lambda J, active, _: tx.update(J, tx.init(J[0]), active=active)[0]

  def weights(J, active, number):
    J = jnp.where(active[:, None], J, 0)
    return SOLVERS[name][0](J @ J.T, active, number)

  return weights


def _value(name):
  """`(J, active, number, r) -> number`, a sum of them weighted by r."""

  def value(J, active, number, r):
    found = _of_rows(name)(J, active, number)
    return found @ r[: found.size]

  return value


def _problems(name, size, present):
  """The arguments of `_value`, each with one entry a problem."""
  problems = []
  for option in SOLVERS[name][1] if name in SOLVERS else (0.0,):
    for seed, how_many in enumerate(present):
      rng = np.random.default_rng(seed + 10 * size)
      J = rng.standard_normal((size, DIMENSIONS))
      if size > 1:
        # Some conflict, so that no constraint is idle in all problems.
        J[0] -= 2 * J[1]
      J *= 10.0 ** rng.uniform(-0.5, 0.5, (size, 1))
      active = np.arange(size) < how_many
      problems.append((J, active, option, rng.standard_normal(DIMENSIONS)))
  return [np.stack(x) for x in zip(*problems, strict=True)]


def _four_tasks(name):
  # With two or more away the rotations of `aligned_mtl` meet equal values.
  away = (3,) if name.startswith('aligned') else (3, 2, 1)
  return _problems(name, 4, (4, 4, 4, *away))


@functools.cache
def _in_float64(name, size):
  """Derivatives by J of all problems, and finite differences."""
  value = _value(name)

  def both(J, *others):
    steps = 1e-5 * jnp.eye(J.size).reshape(-1, *J.shape)
    around = J[None] + jnp.concatenate([0 * J[None], steps, -steps])
    at = lambda J: jax.value_and_grad(value)(J, *others)
    values, derivatives = jax.vmap(at)(around)
    up, down = jnp.split(values[1:], 2)
    return derivatives[0], ((up - down) / 2e-5).reshape(J.shape)

  problems = _four_tasks(name)
  if size < 4:
    problems = _problems(name, size, (size,) * 3)
  with jax.enable_x64(True):
    return [np.asarray(x) for x in jax.jit(jax.vmap(both))(*problems)]


def _close(found, right, tolerance, of):
  atol = tolerance * max(1e-2, np.abs(right).max())
  np.testing.assert_allclose(found, right, atol=atol, err_msg=str(of))


@pytest.mark.parametrize(
  ('name', 'size'),
  [
    *((name, 4) for name in NAMES),
    # With a closed form for so few, or where fewer cannot stand for absent.
    *((name, n) for n in (1, 2) for name in ('min_norm', 'conflict_averse')),
    *(('aligned_mtl', n) for n in (1, 2)),
  ],
)
def test_derivative_is_the_finite_difference(name, size):
  for i, pair in enumerate(zip(*_in_float64(name, size), strict=True)):
    _close(*pair, 1e-6, i)


@pytest.mark.parametrize('name', NAMES)
def test_derivative_of_one_problem_in_float32_is_that_of_a_batch_in_float64(
  name,
):
  gradient = jax.jit(jax.grad(_value(name)))
  expected, _ = _in_float64(name, 4)
  for i, (J, active, *others) in enumerate(
    zip(*_four_tasks(name), strict=True)
  ):
    found = gradient(np.float32(J), active, *map(np.float32, others))
    assert found.dtype == jnp.float32
    _close(found, expected[i], 1e-3, i)


def test_derivative_at_a_cosine_of_one_by_hand():
  # Of two unit gradients Nash's weights are (1 + k)^(-1/2), k their cosine.
  def weight(k):
    gram = jnp.array([[1.0, 0.0], [0.0, 1.0]]) + k * jnp.array(
      [[0.0, 1.0], [1.0, 0.0]]
    )
    return _fair(gram, jnp.ones(2, bool), 1.0, 'paper')[0]

  slope = jax.jit(jax.grad(weight))
  for k in (1.0, 0.5):
    np.testing.assert_allclose(slope(k), -0.5 * (1 + k) ** -1.5, rtol=1e-5)


DEGENERATE = {
  'equal': [[1, 2, 3], [1, 2, 3], [1, 2, 3]],
  'parallel': [[1, 2, 3], [0.1, 0.2, 0.3], [10, 20, 30]],
  'opposed': [[1, 2, 3], [-1, -2, -3], [1, 0, 0]],
  'one is zero': [[1, 2, 3], [0, 0, 0], [1, 0, 0]],
  'cancelling': [[1, 0, 0], [0, 1, 0], [-1, -1, 0]],
  'perpendicular': [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
  'all zero': [[0, 0, 0], [0, 0, 0], [0, 0, 0]],
  'unlike lengths': [[1e-4, 1e-4, 0], [0, -1, 1], [1e4, 0, -1e4]],
}


@pytest.mark.parametrize('name', [*SOLVERS, 'conicgrad', 'conicgrad_20'])
def test_derivatives_are_finite_where_gradients_are_dependent(name):
  presence = ([True] * 3, [True, False, True], [False] * 3)
  options = SOLVERS[name][1] if name in SOLVERS else (0.0,)
  cases = list(itertools.product(DEGENERATE, presence, options))
  rows = np.array([DEGENERATE[kind] for kind, *_ in cases], np.float32)
  active = np.array([there for _, there, _ in cases])
  numbers = np.array([option for *_, option in cases], np.float32)
  function = _of_rows(name)
  if name in SOLVERS:
    rows = np.where(active[..., None], rows, 0)
    rows = rows @ rows.swapaxes(1, 2)
    function = SOLVERS[name][0]

  def both(*args):
    return jax.jacrev(function)(*args), jax.jacfwd(function)(*args)

  for found in jax.jit(jax.vmap(both))(rows, active, numbers):
    for case, derivative in zip(cases, found, strict=True):
      assert np.all(np.isfinite(derivative)), case


@pytest.mark.parametrize('name', ['min_norm', 'dual_cone_each', 'fair_paper'])
def test_derivatives_are_finite_for_many_dependent_tasks(name):
  # In float32 some of these matrices cannot be factorised, ridge or not.
  active = jnp.ones(40, bool)
  solve, (option, *_) = SOLVERS[name]
  value = lambda gram: jnp.arange(40.0) @ solve(gram, active, option)
  gradient = jax.jit(jax.vmap(jax.grad(value)))
  cases = list(itertools.product((1, 2, 3, 10), range(6)))
  grams = []
  for dimensions, seed in cases:
    J = np.random.default_rng(seed).standard_normal((40, dimensions))
    if seed % 2:
      J[:, 0] = 0.1 + np.abs(J[:, 0])
    if seed >= 4:
      J = J[:1] + 1e-4 * J
    grams.append(np.float32(J @ J.T))
  for case, found in zip(cases, gradient(np.stack(grams)), strict=True):
    assert np.all(np.isfinite(found)), case


@pytest.mark.parametrize('name', SOLVERS)
def test_solver_is_a_fixed_number_of_steps_on_the_device(name):
  solve, (option, *_) = SOLVERS[name]
  program = str(
    jax.make_jaxpr(lambda gram: solve(gram, jnp.ones(3, bool), option))(
      jnp.eye(3)
    )
  )
  assert 'callback' not in program
  assert 'while' not in program
