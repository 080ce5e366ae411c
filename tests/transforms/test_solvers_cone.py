"""The projection on the dual cone, and the methods that never conflict."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references_solvers
from scipy import optimize

import mtl_jax
from mtl_jax.transforms.solvers import cone

_SOLVE = jax.jit(cone.dual_cone)


def _rows(size, dimensions, decades, seed):
  """Gradients [T, D], with lengths from 10^-decades to 10^decades."""
  rng = np.random.default_rng(seed + 100 * size)
  J = rng.standard_normal((size, dimensions))
  # Half of the problems have a direction that all tasks like a little: with
  # more tasks than dimensions there is often none.
  if seed % 2:
    J[:, 0] = 0.01 + 0.3 * np.abs(J[:, 0])
  J /= np.linalg.norm(J, axis=1, keepdims=True)
  J *= 10.0 ** rng.uniform(-decades, decades, (size, 1))
  return J.astype(np.float32).astype(np.float64)


def _project(J, u):
  """Weights v in float64, and the residual."""
  found = _SOLVE(
    jnp.asarray(J @ J.T, jnp.float32),
    jnp.ones(len(J), bool),
    jnp.asarray(u, jnp.float32),
  )
  return np.asarray(found.weights, np.float64), float(found.residual)


_SIZES = [(2, 3), (3, 2), (3, 5), (10, 5), (40, 20), (40, 60)]


@pytest.mark.parametrize('decades', [0, 2, 5])
@pytest.mark.parametrize(('size', 'dimensions'), _SIZES)
def test_projection_satisfies_its_optimality_conditions(
  size, dimensions, decades
):
  for seed in range(6):
    J = _rows(size, dimensions, decades, seed)
    lengths = np.linalg.norm(J, axis=1)
    u = np.random.default_rng(seed).uniform(0, 1, size) / lengths
    v, residual = _project(J, u[None])
    d = v @ J
    # As long as rounding at least: some cones hold nothing but zero.
    size_of = max(np.linalg.norm(d), 1e-3 * (v @ lengths))
    added = (v - u) * lengths
    gains = J @ d / lengths / size_of
    assert added.min() >= -1e-6 * (u @ lengths)
    assert gains.min() >= -1e-3 * (size_of > np.linalg.norm(d)) - 1e-5
    touched = added > 1e-4 * (v @ lengths)
    assert np.abs(gains[touched]).max(initial=0) <= 1e-3
    if size_of == np.linalg.norm(d):
      assert residual <= 1e-5
      assert np.abs(gains[touched]).max(initial=0) <= 1e-5
      right = references_solvers.on_dual_cone(J, u @ J)
      np.testing.assert_allclose(d, right, atol=2e-5 * size_of)


def test_sum_of_projections_is_that_of_one_after_the_other():
  J = _rows(5, 4, 1, 1)
  u = np.random.default_rng(0).uniform(0, 1, (3, 5))
  together, _ = _project(J, u)
  apart = sum(_project(J, row[None])[0] for row in u)
  np.testing.assert_allclose(together @ J, apart @ J, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('seed', [0, 1, 3])
def test_residual_of_one_projection_is_what_its_docstring_says(
  seed, monkeypatch
):
  # Too few steps leave something to see.
  monkeypatch.setattr(cone, '_ITERATIONS', 4)
  J = _rows(10, 6, 1, seed)
  lengths = np.linalg.norm(J, axis=1)
  u = 1 / lengths
  found = cone.dual_cone(
    jnp.asarray(J @ J.T, jnp.float32),
    jnp.ones(10, bool),
    jnp.asarray(u, jnp.float32)[None],
  )
  v = np.asarray(found.weights, np.float64)
  d = v @ J
  gains = J @ d / lengths
  added = (v - u) * lengths > 1e-5
  wrong = np.where(added, np.abs(gains), np.maximum(-gains, 0)).max()
  right = wrong / max(np.linalg.norm(d), 1e-3 * (v @ lengths))
  assert right > 1e-4
  np.testing.assert_allclose(found.residual, right, rtol=1e-2)


def test_residual_tells_a_conflict_that_nothing_was_done_about(monkeypatch):
  nothing = lambda matrix, linear: jnp.zeros_like(linear)
  monkeypatch.setattr(cone, '_nonnegative_quadratic', nothing)
  J = np.array([[3.0, 0.0], [-4.0, 3.0]])
  found = cone.dual_cone(
    jnp.asarray(J @ J.T, jnp.float32), jnp.ones(2, bool), jnp.ones((1, 2))
  )
  # The sum is (-1, 3).
  np.testing.assert_allclose(found.residual, 1 / np.sqrt(10), rtol=1e-5)


METHODS = {
  'upgrad': mtl_jax.upgrad,
  'dualproj': mtl_jax.dualproj,
  'mgda': mtl_jax.mgda,
}


@functools.cache
def _compiled(method, size):
  tx = METHODS[method](num_tasks=size)
  return tx.init, jax.jit(tx.update)


def _update(method, J):
  init, update = _compiled(method, len(J))
  J = jnp.asarray(J, jnp.float32)
  return update(J, init(J[0]))


def _worst_cosine(J, d):
  lengths = np.linalg.norm(J, axis=1)
  return (J @ d / lengths).min() / np.linalg.norm(d)


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('decades', [0, 2, 5])
@pytest.mark.parametrize(('size', 'dimensions'), [(2, 3), (10, 12), (40, 60)])
def test_update_conflicts_with_no_task(method, size, dimensions, decades):
  for seed in range(4):
    J = _rows(size, dimensions, decades, seed)
    update, state = _update(method, J)
    assert _worst_cosine(J, np.asarray(update, np.float64)) >= -1e-4
    assert state.residual <= 1e-4


@pytest.mark.parametrize('method', ['upgrad', 'dualproj'])
def test_badly_scaled_tasks_are_a_trap_for_a_regularised_problem(method):
  # The same problem with 1e-4 on the diagonal of the Gram matrix over its
  # trace: the shortest gradients are hardly seen.
  J = _rows(10, 12, 3, 1)
  update, _ = _update(method, J)
  assert _worst_cosine(J, np.asarray(update, np.float64)) >= -1e-5
  scaled = J / np.linalg.norm(J)
  rows = np.concatenate([scaled, 1e-2 * np.eye(10)], axis=1)
  u = np.full((1, 10), 0.1) if method == 'dualproj' else 0.1 * np.eye(10)
  v = sum(p + optimize.nnls(rows.T, -p @ rows, maxiter=1000)[0] for p in u)
  assert _worst_cosine(J, v @ J) <= -0.3


@pytest.mark.parametrize('factor', [1e-4, 1e4])
def test_upgrad_is_linear_in_the_length_of_each_gradient(factor):
  J = _rows(5, 8, 0, 0)
  update, _ = _update('upgrad', J)
  scales = np.array([1, factor, 1, 1, 1])
  scaled, _ = _update('upgrad', scales[:, None] * J)
  alone = references_solvers.on_dual_cone(J, J[1]) / 5
  size = np.linalg.norm(scaled)
  np.testing.assert_allclose(
    scaled, update + (factor - 1) * alone, atol=1e-5 * size
  )


@pytest.mark.parametrize('method', ['upgrad', 'dualproj'])
def test_update_vanishes_where_every_direction_conflicts(method):
  # Zero is inside the hull of these.
  angles = np.deg2rad([0, 100, 200, 290])
  J = np.stack([np.cos(angles), np.sin(angles)], axis=1)
  J *= np.array([[1e-2], [1], [30], [1e2]])
  update, state = _update(method, J)
  terms = np.asarray(state.task_weights) @ np.linalg.norm(J, axis=1)
  assert np.linalg.norm(update) <= 1e-5 * terms


@pytest.mark.parametrize('size', [2, 3, 5])
def test_absent_tasks_have_no_weight_and_no_influence(size):
  J = _rows(size, 3, 0, 1)
  alone, _ = _project(J, np.eye(size))
  padded = np.zeros((size + 2, 3))
  padded[1:-1], padded[0], padded[-1] = J, -J[0], 5.0
  active = jnp.array([False, *[True] * size, False])
  gram = np.where(active[:, None] & active[None, :], padded @ padded.T, 0)
  found = _SOLVE(
    jnp.asarray(gram, jnp.float32), active, jnp.eye(size + 2)
  ).weights
  np.testing.assert_allclose(found[1:-1], alone, atol=1e-5)
  np.testing.assert_array_equal(found[jnp.array([0, -1])], 0)


def test_batch_of_problems_has_the_solutions_of_each():
  problems = [_rows(4, 3, 1, seed) for seed in range(4)]
  grams = jnp.stack([jnp.asarray(J @ J.T, jnp.float32) for J in problems])
  solve = lambda gram: cone.dual_cone(gram, jnp.ones(4, bool), jnp.eye(4))
  found = jax.jit(jax.vmap(solve))(grams).weights
  for J, weights in zip(problems, found, strict=True):
    expected, _ = _project(J, np.eye(4))
    np.testing.assert_allclose(
      weights @ J, expected @ J, atol=1e-5 * np.linalg.norm(J)
    )
