"""The projection on the dual cone, and the methods that never conflict."""

import itertools

import batches
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references_solvers
from scipy import optimize

import mtl_jax
from mtl_jax.transforms.solvers import cone

_SOLVE = batches.batched(cone.dual_cone)


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


def _project(problems):
  """Solutions of all pairs (J, u)."""
  return _SOLVE([(J @ J.T, np.ones(len(J), bool), u) for J, u in problems])


@pytest.mark.parametrize(
  ('size', 'dimensions'), [(2, (3,)), (3, (2, 5)), (10, (5,)), (40, (20, 60))]
)
def test_projection_satisfies_its_optimality_conditions(size, dimensions):
  names = list(itertools.product(dimensions, (0, 2, 5), range(6)))
  problems = []
  for width, decades, seed in names:
    J = _rows(size, width, decades, seed)
    share = np.random.default_rng(seed).uniform(0, 1, size)
    problems.append((J, share[None] / np.linalg.norm(J, axis=1)))
  for name, (J, u), found in zip(
    names, problems, _project(problems), strict=True
  ):
    lengths, u, v = np.linalg.norm(J, axis=1), u[0], found.weights
    d = v @ J
    # As long as rounding at least: some cones hold nothing but zero.
    size_of = max(np.linalg.norm(d), 1e-3 * (v @ lengths))
    added = (v - u) * lengths
    gains = J @ d / lengths / size_of
    assert added.min() >= -1e-6 * (u @ lengths), name
    assert gains.min() >= -1e-3 * (size_of > np.linalg.norm(d)) - 1e-5, name
    touched = added > 1e-4 * (v @ lengths)
    assert np.abs(gains[touched]).max(initial=0) <= 1e-3, name
    if size_of == np.linalg.norm(d):
      assert found.residual <= 1e-5, name
      assert np.abs(gains[touched]).max(initial=0) <= 1e-5, name
      right = references_solvers.on_dual_cone(J, u @ J)
      np.testing.assert_allclose(
        d, right, atol=2e-5 * size_of, err_msg=str(name)
      )


def test_sum_of_projections_is_that_of_one_after_the_other():
  J = _rows(3, 5, 1, 1)
  u = np.random.default_rng(0).uniform(0, 1, (3, 3))
  together = _project([(J, u)])[0].weights
  apart = sum(found.weights for found in _project([(J, x[None]) for x in u]))
  np.testing.assert_allclose(together @ J, apart @ J, rtol=1e-5, atol=1e-5)


def test_residual_of_one_projection_is_what_its_docstring_says(monkeypatch):
  # Too few steps leave something to see.
  monkeypatch.setattr(cone, '_ITERATIONS', 4)
  solve = batches.batched(lambda *problem: cone.dual_cone(*problem))
  for seed in (0, 1, 3):
    J = _rows(10, 6, 1, seed)
    lengths = np.linalg.norm(J, axis=1)
    u = 1 / lengths
    found = solve([(J @ J.T, np.ones(10, bool), u[None])])[0]
    v = found.weights
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
  J = np.array([[3.0, 0.0], [-4.0, 3.0]], np.float32)
  solve = lambda gram: cone.dual_cone(gram, jnp.ones(2, bool), jnp.ones((1, 2)))
  # The sum is (-1, 3).
  np.testing.assert_allclose(
    jax.jit(solve)(J @ J.T).residual, 1 / np.sqrt(10), rtol=1e-5
  )


def _updates_of(factory):
  def update(J):
    tx = factory(num_tasks=J.shape[0])
    updates, state = tx.update(J, tx.init(jnp.zeros(J.shape[1])))
    return updates, state.task_weights, state.residual

  return batches.batched(update)


METHODS = {
  'upgrad': _updates_of(mtl_jax.upgrad),
  'dualproj': _updates_of(mtl_jax.dualproj),
  'mgda': _updates_of(mtl_jax.mgda),
}


def _update(method, J):
  return METHODS[method]([(J,)])[0]


def _worst_cosine(J, d):
  lengths = np.linalg.norm(J, axis=1)
  return (J @ d / lengths).min() / np.linalg.norm(d)


@pytest.mark.parametrize('method', METHODS)
def test_update_conflicts_with_no_task(method):
  for size, dimensions in ((2, 3), (10, 12), (40, 60)):
    names = list(itertools.product((0, 2, 5), range(4)))
    problems = [
      (_rows(size, dimensions, decades, seed),) for decades, seed in names
    ]
    for name, (J,), (update, _, residual) in zip(
      names, problems, METHODS[method](problems), strict=True
    ):
      assert _worst_cosine(J, update) >= -1e-4, (size, name)
      assert residual <= 1e-4, (size, name)


@pytest.mark.parametrize('method', ['upgrad', 'dualproj'])
def test_badly_scaled_tasks_are_a_trap_for_a_regularised_problem(method):
  # The same problem with 1e-4 on the diagonal of the Gram matrix over its
  # trace: the shortest gradients are hardly seen.
  J = _rows(10, 12, 3, 1)
  update, _, _ = _update(method, J)
  assert _worst_cosine(J, update) >= -1e-5
  scaled = J / np.linalg.norm(J)
  rows = np.concatenate([scaled, 1e-2 * np.eye(10)], axis=1)
  u = np.full((1, 10), 0.1) if method == 'dualproj' else 0.1 * np.eye(10)
  v = sum(p + optimize.nnls(rows.T, -p @ rows, maxiter=1000)[0] for p in u)
  assert _worst_cosine(J, v @ J) <= -0.3


def test_upgrad_is_linear_in_the_length_of_each_gradient():
  J = _rows(10, 12, 0, 0)
  update, _, _ = _update('upgrad', J)
  alone = references_solvers.on_dual_cone(J, J[1]) / 10
  for factor in (1e-4, 1e4):
    scales = np.where(np.arange(10) == 1, factor, 1)
    scaled, _, _ = _update('upgrad', scales[:, None] * J)
    np.testing.assert_allclose(
      scaled,
      update + (factor - 1) * alone,
      atol=1e-5 * np.linalg.norm(scaled),
      err_msg=str(factor),
    )


@pytest.mark.parametrize('method', ['upgrad', 'dualproj'])
def test_update_vanishes_where_every_direction_conflicts(method):
  # Zero is inside the hull of these.
  angles = np.deg2rad([0, 100, 200, 290, 10, 90, 190, 300, 20, 180])
  J = np.zeros((10, 12))
  J[:, :2] = np.stack([np.cos(angles), np.sin(angles)], axis=1)
  J *= 10.0 ** np.resize([-2, 0, 1.5, 2], 10)[:, None]
  update, weights, _ = _update(method, J)
  terms = weights @ np.linalg.norm(J, axis=1)
  assert np.linalg.norm(update) <= 1e-5 * terms


@pytest.mark.parametrize(('size', 'among'), [(2, 4), (3, 5)])
def test_absent_tasks_have_no_weight_and_no_influence(size, among):
  J = _rows(size, 3, 0, 1)
  alone = _project([(J, np.eye(size))])[0].weights
  padded = np.full((among, 3), 5.0)
  padded[1:-1], padded[0] = J, -J[0]
  active = np.array([False, *[True] * size, False])
  gram = np.where(active[:, None] & active[None, :], padded @ padded.T, 0)
  found = _SOLVE([(gram, active, np.eye(among))])[0].weights
  np.testing.assert_allclose(found[active], alone, atol=1e-5)
  np.testing.assert_array_equal(found[~active], 0)


def test_batch_of_problems_has_the_solutions_of_each():
  problems = [(_rows(4, 3, 1, seed), np.eye(4)) for seed in range(4)]
  solve = jax.jit(
    lambda gram: cone.dual_cone(gram, jnp.ones(4, bool), jnp.eye(4)).weights
  )
  for (J, _), found in zip(problems, _project(problems), strict=True):
    expected = solve(jnp.asarray(J @ J.T, jnp.float32))
    np.testing.assert_allclose(
      found.weights @ J, expected @ J, atol=1e-5 * np.linalg.norm(J)
    )
