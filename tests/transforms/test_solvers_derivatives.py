"""Derivatives of the solvers' solutions, against finite differences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick_compile

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


def _cone(gram, active, together):
  size = gram.shape[0]
  u = (1 + jnp.arange(size) % 3).astype(gram.dtype)
  u = u[None] if together else jnp.diag(u)
  return cone.dual_cone(gram, active, u).weights


def _fair(gram, active, alpha, scale):
  return fair.alpha_fair(gram, active, alpha, scale).weights


def _least_worst(gram, active):
  """The gradient of the constraint is a sum of those of the tasks."""
  size = gram.shape[0]
  q = jnp.where(active, 0.5 - jnp.arange(size) % 2, 0).astype(gram.dtype)
  constraint = constrained.Constraint(gram @ q, q @ gram @ q, 0.1)
  return constrained.least_worst(gram, constraint, active).weights


SOLVERS = {
  'min_norm': lambda gram, active: simplex.min_norm(gram, active).weights,
  'conflict_averse_0.4': functools.partial(_direction, c=0.4),
  'conflict_averse_0.9': functools.partial(_direction, c=0.9),
  'dual_cone_each': functools.partial(_cone, together=False),
  'dual_cone_mean': functools.partial(_cone, together=True),
  'nash': functools.partial(_fair, alpha=1.0, scale='norm'),
  'fair_0.3': functools.partial(_fair, alpha=0.3, scale='norm'),
  'fair_2': functools.partial(_fair, alpha=2.0, scale='norm'),
  'fair_10_paper': functools.partial(_fair, alpha=10.0, scale='paper'),
  'least_worst': _least_worst,
}


@functools.cache
def _value_and_gradient(name, size):
  """Of a weighted sum of the weights, by the task gradients."""

  def value(J, r):
    return r @ SOLVERS[name](J @ J.T, jnp.ones(size, bool))

  return quick_compile.jit(value), quick_compile.jit(jax.grad(value))


def _problem(size, seed):
  rng = np.random.default_rng(seed + 10 * size)
  J = rng.standard_normal((size, 6))
  if size > 1:
    # Some conflict, so that no constraint is idle in all problems.
    J[0] -= 2 * J[1]
  J *= 10.0 ** rng.uniform(-0.5, 0.5, (size, 1))
  return J, rng.standard_normal(size)


@pytest.mark.parametrize('size', [1, 2, 4])
@pytest.mark.parametrize('name', SOLVERS)
def test_derivative_is_the_finite_difference(name, size):
  value, gradient = _value_and_gradient(name, size)
  with jax.enable_x64(True):
    for seed in range(3):
      J, r = _problem(size, seed)
      found = np.asarray(gradient(J, r))
      right = np.zeros_like(J)
      for place in np.ndindex(J.shape):
        step = np.zeros_like(J)
        step[place] = 1e-5
        right[place] = (value(J + step, r) - value(J - step, r)) / 2e-5
      np.testing.assert_allclose(
        found, right, atol=1e-6 * max(1e-2, np.abs(right).max())
      )


@pytest.mark.parametrize('name', SOLVERS)
def test_derivative_in_float32_is_that_in_float64(name):
  _, gradient = _value_and_gradient(name, 4)
  for seed in range(3):
    J, r = _problem(4, seed)
    found = gradient(J.astype(np.float32), r.astype(np.float32))
    assert found.dtype == jnp.float32
    with jax.enable_x64(True):
      right = np.asarray(gradient(J, r))
    np.testing.assert_allclose(
      found, right, atol=1e-3 * max(1e-2, np.abs(right).max())
    )


DIRECTIONS = {
  'conicgrad': mtl_jax.conicgrad(),
  'conicgrad_20': mtl_jax.conicgrad(angle=20.0),
  'aligned_mtl': mtl_jax.aligned_mtl(),
  'aligned_mtl_rmse': mtl_jax.aligned_mtl('rmse'),
}


@pytest.mark.parametrize('size', [1, 2, 3, 4])
@pytest.mark.parametrize('name', DIRECTIONS)
def test_derivative_of_the_update_is_the_finite_difference(name, size):
  tx = DIRECTIONS[name]
  value = lambda J, d: tx.update(J, tx.init(J[0]))[0] @ d
  gradient = quick_compile.jit(jax.grad(value))
  value = quick_compile.jit(value)
  for seed in range(3):
    J, _ = _problem(size, seed)
    d = np.random.default_rng(seed).standard_normal(J.shape[1])
    found = np.asarray(gradient(J.astype(np.float32), d.astype(np.float32)))
    with jax.enable_x64(True):
      exact = np.asarray(gradient(J, d))
      right = np.zeros_like(J)
      for place in np.ndindex(J.shape):
        step = np.zeros_like(J)
        step[place] = 1e-5
        right[place] = (value(J + step, d) - value(J - step, d)) / 2e-5
    largest = max(1e-2, np.abs(right).max())
    np.testing.assert_allclose(exact, right, atol=1e-6 * largest)
    np.testing.assert_allclose(found, right, atol=1e-3 * largest)


@pytest.mark.parametrize('name', ['conicgrad', 'conicgrad_20'])
def test_derivatives_of_the_update_are_finite_for_dependent_gradients(name):
  tx = DIRECTIONS[name]
  both = quick_compile.jit(
    lambda J, active: [
      derivative(lambda J: tx.update(J, tx.init(J[0]), active=active)[0])(J)
      for derivative in (jax.jacrev, jax.jacfwd)
    ]
  )
  for active in ([True] * 3, [True, False, True], [False] * 3):
    for J in DEGENERATE.values():
      for found in both(np.array(J, np.float32), np.array(active)):
        assert np.all(np.isfinite(found))


def test_derivative_at_a_cosine_of_one_by_hand():
  # Of two unit gradients Nash's weights are (1 + k)^(-1/2), k their cosine.
  def weight(k):
    gram = jnp.array([[1.0, 0.0], [0.0, 1.0]]) + k * jnp.array(
      [[0.0, 1.0], [1.0, 0.0]]
    )
    return _fair(gram, jnp.ones(2, bool), 1.0, 'paper')[0]

  for k in (1.0, 0.5):
    np.testing.assert_allclose(
      jax.grad(weight)(k), -0.5 * (1 + k) ** -1.5, rtol=1e-5
    )


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


@pytest.mark.parametrize('name', SOLVERS)
def test_derivatives_are_finite_where_gradients_are_dependent(name):
  both = quick_compile.jit(
    lambda *args: (
      jax.jacrev(SOLVERS[name])(*args),
      jax.jacfwd(SOLVERS[name])(*args),
    )
  )
  for active in ([True] * 3, [True, False, True], [False] * 3):
    there = np.array(active)
    for J in DEGENERATE.values():
      J = np.where(there[:, None], np.array(J, np.float32), 0)
      backward, forward = both(J @ J.T, there)
      assert np.all(np.isfinite(backward))
      assert np.all(np.isfinite(forward))


@pytest.mark.parametrize(
  'name', ['min_norm', 'dual_cone_each', 'fair_10_paper']
)
def test_derivatives_are_finite_for_many_dependent_tasks(name):
  # In float32 some of these matrices cannot be factorised, ridge or not.
  active = jnp.ones(40, bool)
  gradient = quick_compile.jit(
    jax.grad(lambda gram: jnp.arange(40.0) @ SOLVERS[name](gram, active))
  )
  for dimensions in (1, 2, 3, 10):
    for seed in range(6):
      J = np.random.default_rng(seed).standard_normal((40, dimensions))
      if seed % 2:
        J[:, 0] = 0.1 + np.abs(J[:, 0])
      if seed >= 4:
        J = J[:1] + 1e-4 * J
      assert np.all(np.isfinite(gradient(jnp.asarray(J @ J.T, jnp.float32))))


@pytest.mark.parametrize('name', SOLVERS)
def test_derivative_of_a_batch_is_that_of_each(name):
  _, gradient = _value_and_gradient(name, 4)
  J, r = zip(*(_problem(4, seed) for seed in range(4)), strict=True)
  J, r = np.stack(J).astype(np.float32), np.stack(r).astype(np.float32)
  found = quick_compile.jit(jax.vmap(gradient.__wrapped__))(J, r)
  for i in range(4):
    right = np.asarray(gradient(J[i], r[i]))
    np.testing.assert_allclose(
      found[i], right, atol=1e-4 * max(1e-2, np.abs(right).max())
    )


@pytest.mark.parametrize('name', SOLVERS)
def test_solver_is_a_fixed_number_of_steps_on_the_device(name):
  solve = lambda gram: SOLVERS[name](gram, jnp.ones(3, bool))
  program = str(jax.make_jaxpr(solve)(jnp.eye(3)))
  assert 'callback' not in program
  assert 'while' not in program
