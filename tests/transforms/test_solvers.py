"""The solvers against independent float64 ones and their own conditions."""

import itertools

import batches
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from scipy import optimize

from mtl_jax.transforms.solvers import averse
from mtl_jax.transforms.solvers import simplex

KINDS = ('plain', 'scaled', 'near', 'aligned_scaled', 'low_rank', 'duplicated')

_solve_min_norm = batches.batched(simplex.min_norm)
_solve_averse = batches.batched(averse.conflict_averse)


def _rows(kind, size, dimensions=60, seed=0):
  rng = np.random.default_rng(seed + 100 * size)
  J = rng.standard_normal((size, dimensions))
  if kind == 'scaled':
    J *= 10.0 ** rng.uniform(-2, 2, (size, 1))
  elif kind == 'near':
    J = J[:1] + 0.1 * J
  elif kind == 'aligned_scaled':
    J += rng.standard_normal((1, dimensions))
    J *= 10.0 ** rng.uniform(-2, 2, (size, 1))
  elif kind == 'low_rank':
    J = rng.standard_normal((size, 3)) @ rng.standard_normal((3, dimensions))
    J += rng.standard_normal((1, dimensions))
  elif kind == 'duplicated':
    J[size // 2 :] = J[: size - size // 2]
  return J.astype(np.float32).astype(np.float64)


def _many_decades(size, dimensions, decades):
  """Problems with lengths from 10^-decades to 10^decades.

  With more tasks than dimensions zero is often inside.
  """
  rng = np.random.default_rng(size)
  J = rng.standard_normal((12, size, dimensions))
  J /= np.linalg.norm(J, axis=2, keepdims=True)
  J *= 10.0 ** rng.uniform(-decades, decades, (12, size, 1))
  return list(J.astype(np.float32).astype(np.float64))


def _there(J):
  return np.ones(len(J), bool)


def _min_norm(problems):
  return _solve_min_norm([(J @ J.T, _there(J)) for J in problems])


def _averse(problems):
  """Solutions and multipliers of pairs (J, c)."""
  return _solve_averse([(J @ J.T, _there(J), c) for J, c in problems])


def _shortfall(slopes, w, lengths):
  """How far a slope lies below the mean slope, over the task's length."""
  return max(0, np.max((w @ slopes - slopes) / lengths))


def _assert_on_simplex(w, of):
  assert w.min() >= 0, of
  np.testing.assert_allclose(w.sum(), 1, rtol=1e-5, err_msg=str(of))


@pytest.mark.parametrize('size', [2, 3, 40])
def test_min_norm_finds_the_least_norm(size):
  names = list(itertools.product(KINDS, range(5)))
  problems = [_rows(kind, size, seed=seed) for kind, seed in names]
  for name, J, found in zip(names, problems, _min_norm(problems), strict=True):
    _assert_on_simplex(found.weights, name)
    least = np.linalg.norm(references.least_norm_weights(J) @ J)
    assert np.linalg.norm(found.weights @ J) <= least * (1 + 1e-4), name
    assert found.residual <= 1e-4, name


@pytest.mark.parametrize(
  ('size', 'dimensions'), [(2, (3,)), (3, (5, 2)), (40, (10, 60))]
)
def test_min_norm_is_optimal_and_its_residual_is_that_of_its_docstring(
  size, dimensions
):
  # At the least-norm point d every <g_i, d> >= |d|^2.
  problems = {
    ('scaled', seed): _rows('scaled', size, 60, seed) for seed in (0, 1)
  }
  for width, decades in itertools.product(dimensions, (0, 2, 8)):
    for i, J in enumerate(_many_decades(size, width, decades)):
      problems[width, decades, i] = J
  for (name, J), found in zip(
    problems.items(), _min_norm(list(problems.values())), strict=True
  ):
    w, lengths = found.weights, np.linalg.norm(J, axis=1)
    residual = _shortfall(J @ (w @ J), w, lengths) / (w @ lengths)
    assert residual <= 1e-4, name
    atol = 1e-6 if name[0] == 'scaled' else 1e-5
    np.testing.assert_allclose(
      found.residual, residual, atol=atol, err_msg=str(name)
    )


@pytest.mark.parametrize(
  ('size', 'dimensions'), [(2, (1,)), (3, (1, 2)), (40, (10,))]
)
def test_min_norm_of_cancelling_rows_is_zero(size, dimensions):
  names = list(itertools.product(dimensions, ('plain', 'scaled')))
  problems = [_rows(kind, size, width) for width, kind in names]
  for J in problems:
    J[-1] = -J[:-1].sum(axis=0)  # Zero lies in the hull.
  for name, J, found in zip(names, problems, _min_norm(problems), strict=True):
    scale = found.weights @ np.linalg.norm(J, axis=1)
    # A squared norm is known up to rounding, so the norm up to its root.
    assert np.linalg.norm(found.weights @ J) <= 2e-3 * scale, name


def test_min_norm_puts_all_weight_on_zero_gradients():
  found = _min_norm([np.array([[0, 0], [0, 3.0], [0, 0]])])[0]
  np.testing.assert_allclose(found.weights, [0.5, 0, 0.5])


@pytest.mark.parametrize(('size', 'among'), [(2, 3), (3, 40)])
def test_absent_tasks_have_no_weight_and_no_influence(size, among):
  J = _rows('plain', size)
  alone = {
    'min_norm': _min_norm([J])[0].weights,
    'conflict_averse': _averse([(J, 0.5)])[0][0].weights,
  }
  places = list(itertools.combinations(range(among), size))[
    :: 1 if size == 2 else 997
  ]
  grams, actives = [], []
  for place in places:
    active = np.isin(np.arange(among), place)
    gram = np.zeros((among, among))
    gram[np.ix_(active, active)] = J @ J.T
    grams.append(gram)
    actives.append(active)
  problems = list(zip(grams, actives, [0.5] * len(places), strict=True))
  found = {
    'min_norm': _solve_min_norm(
      [(gram, active) for gram, active, _ in problems]
    ),
    'conflict_averse': [s for s, _ in _solve_averse(problems)],
  }
  for name, solutions in found.items():
    for active, solution in zip(actives, solutions, strict=True):
      np.testing.assert_allclose(
        solution.weights[active], alone[name], atol=1e-5, err_msg=name
      )
      np.testing.assert_allclose(solution.weights[~active], 0, err_msg=name)


def _dual(J, c):
  """The dual objective in float64, and its least value by SLSQP."""
  mean = J.mean(axis=0)
  lengths = np.linalg.norm(J, axis=1)
  unit = np.linalg.norm(mean) * lengths.min()

  def value(w):
    return (
      w @ J @ mean + c * np.linalg.norm(mean) * np.linalg.norm(w @ J)
    ) / unit

  best = np.inf
  for start in (np.ones(len(J)), 1 / lengths):
    found = optimize.minimize(
      value,
      start / start.sum(),
      bounds=[(0, 1)] * len(J),
      constraints={'type': 'eq', 'fun': lambda w: w.sum() - 1},
      method='SLSQP',
      options={'maxiter': 2000, 'ftol': 1e-14},
    )
    best = min(best, found.fun)
  return value, best


@pytest.mark.parametrize('size', [2, 3, 10])
def test_conflict_averse_finds_the_least_dual_value(size):
  names = list(itertools.product(KINDS, (0.1, 0.5, 0.9)))
  problems = [(_rows(kind, size), c) for kind, c in names]
  for name, (J, c), (found, _) in zip(
    names, problems, _averse(problems), strict=True
  ):
    _assert_on_simplex(found.weights, name)
    value, best = _dual(J, c)
    assert value(found.weights) <= best + 1e-4 * max(abs(best), 1e-3), name
    assert found.residual <= 1e-4, name


@pytest.mark.parametrize(
  ('size', 'dimensions'), [(2, 3), (3, 2), (10, 5), (40, 10)]
)
def test_conflict_averse_is_optimal_and_its_residual_is_that_of_its_docstring(
  size, dimensions
):
  problems = {}
  for decades, c in itertools.product((0, 2), (0.1, 0.5, 0.9)):
    for i, J in enumerate(_many_decades(size, dimensions, decades)):
      problems[decades, c, i] = (J, c)
  for kind in ('plain', 'scaled', 'aligned_scaled'):
    problems[kind] = (_rows(kind, size), 0.4)
  for (name, (J, c)), (found, _) in zip(
    problems.items(), _averse(list(problems.values())), strict=True
  ):
    w, lengths = found.weights, np.linalg.norm(J, axis=1)
    _assert_on_simplex(w, name)
    mean, d = J.mean(axis=0), w @ J
    slopes = J @ mean / np.linalg.norm(mean)
    slopes += c * (J @ d) / np.linalg.norm(d)
    residual = _shortfall(slopes, w, lengths) / (1 + c)
    assert residual <= 1e-4, name
    np.testing.assert_allclose(
      found.residual, residual, atol=1e-4, err_msg=str(name)
    )


@pytest.mark.parametrize(('size', 'dimensions'), [(3, 2), (10, 3), (40, 2)])
def test_conflict_averse_direction_is_best_among_many_conflicting_tasks(
  size, dimensions
):
  # So few dimensions put the optimum close to the kink of the dual, where
  # Newton steps alone do not find it.
  names = list(itertools.product(('plain', 'scaled'), (0.4, 0.9), range(8)))
  problems = [(_rows(kind, size, dimensions, s), c) for kind, c, s in names]
  for name, (J, c), (found, multiplier) in zip(
    names, problems, _averse(problems), strict=True
  ):
    assert found.residual <= 1e-4, name
    mean = J.mean(axis=0)
    direction = mean + multiplier * found.weights @ J
    best = references.conflict_averse_direction(J, c)
    scale = np.linalg.norm(mean) * np.linalg.norm(J, axis=1).min()
    gain = (J @ best).min()
    short = gain - (J @ direction).min()
    assert short <= 1e-4 * abs(gain) + 2e-3 * scale, name


def test_cagrad_is_the_best_of_its_ball_with_more_tasks_than_dimensions():
  problems = list(itertools.product(_many_decades(3, 2, 1), (0.5, 0.9)))
  for (J, c), (found, multiplier) in zip(
    problems, _averse(problems), strict=True
  ):
    mean = J.mean(axis=0)
    direction = mean + multiplier * found.weights @ J
    best = references.conflict_averse_direction(J, c)
    np.testing.assert_allclose(
      (J @ direction).min(),
      (J @ best).min(),
      atol=1e-4 * np.linalg.norm(mean) * np.linalg.norm(J, axis=1).max(),
    )
    np.testing.assert_allclose(
      direction, best, atol=2e-3 * np.linalg.norm(mean)
    )


def _opposed(off):
  """Pairs of gradients, `off` from opposed; every other of like lengths."""
  rng = np.random.default_rng(0)
  J = rng.standard_normal((12, 2, 6))
  J[:, 1] = off * J[:, 1] - J[:, 0]
  lengths = 10.0 ** rng.uniform(-1, 1, (12, 2, 1))
  lengths[::2, 1] = lengths[::2, 0] * rng.uniform(0.9, 1.1, (6, 1))
  return list((lengths * J).astype(np.float32).astype(np.float64))


def test_cagrad_of_two_opposed_tasks_is_the_best_of_a_ball_that_holds_zero():
  names = [
    (off, i, c)
    for off in (1e-6, 1e-4, 1e-3, 1e-2, 1)
    for i in range(12)
    for c in (1.0, 2.0)
  ]
  problems = [(_opposed(off)[i], c) for off, i, c in names]
  for name, (J, c), (found, multiplier) in zip(
    names, problems, _averse(problems), strict=True
  ):
    _assert_on_simplex(found.weights, name)
    assert found.residual <= 1e-4, name
    mean = J.mean(axis=0)
    direction = mean + multiplier * found.weights @ J
    radius = c * np.linalg.norm(mean)
    assert np.linalg.norm(direction - mean) <= 1.01 * radius, name
    best = (J @ references.conflict_averse_direction(J, c)).min()
    lengths = np.linalg.norm(J, axis=1)
    # Rounding, and what is given up of the direction across both gradients.
    slack = 1e-4 * lengths.max() + 7.5e-4 * c * lengths.min()
    assert (J @ direction).min() >= best - slack * radius, name


def test_cagrad_of_two_opposed_tasks_by_hand():
  # Zero is the best for both of the first two; the mean is -0.5 for the worst
  # of the first. Both of the third gain by a step across, whose length float32
  # does not quite see.
  problems = [
    (np.array([[1.0, 0], [-2, 0]]), 2.0),
    (np.array([[0.66, 0], [-0.64, 0]]), 1.0),
    (np.array([[1.0, 0], [-2, 0.001]]), 2.0),
  ]
  zero, also_zero, across = (
    J.mean(axis=0) + multiplier * found.weights @ J
    for (J, _), (found, multiplier) in zip(
      problems, _averse(problems), strict=True
    )
  )
  np.testing.assert_allclose(zero, 0, atol=1e-4)
  np.testing.assert_allclose(also_zero, 0, atol=1e-6)
  assert (problems[2][0] @ across).min() > 0


DEGENERATE = {
  'duplicates': [[1, 2, 3], [1, 2, 3], [-1, 1, 1]],
  'opposed': [[1, 2, 3], [-1, -2, -3], [1, 0, 0]],
  'one is zero': [[1, 2, 3], [0, 0, 0], [1, 0, 0]],
  'cancelling': [[1, 0, 0], [0, 1, 0], [-1, -1, 0]],
  'all zero': [[0, 0, 0], [0, 0, 0], [0, 0, 0]],
}


@pytest.mark.parametrize('size', [2, 3])
def test_solutions_are_finite_and_on_the_simplex(size):
  problems = [np.array(J[:size], np.float64) for J in DEGENERATE.values()]
  averse_found = _averse([(J, 0.5) for J in problems])
  found = zip(
    DEGENERATE, problems, _min_norm(problems), averse_found, strict=True
  )
  for name, J, plain, (averse_solution, multiplier) in found:
    for solution in (plain, averse_solution):
      assert np.isfinite(solution.residual), name
      assert np.min(solution.weights) >= 0, name
      # A gradient of zero may be left out: its weight changes no direction.
      total = np.sum(solution.weights)
      nothing = not J.any() and total == 0
      assert nothing or np.isclose(total, 1, rtol=1e-5), name
    assert np.isfinite(multiplier), name


def test_batch_of_problems_has_the_solutions_of_each():
  problems = [_rows('plain', 3, seed=s) for s in range(4)]
  min_norm = jax.jit(simplex.min_norm)
  conflict_averse = jax.jit(averse.conflict_averse)
  of_averse = _averse([(J, 0.5) for J in problems])
  for J, plain, (other, multiplier) in zip(
    problems, _min_norm(problems), of_averse, strict=True
  ):
    gram, active = jnp.asarray(J @ J.T, jnp.float32), _there(J)
    alone = min_norm(gram, active)
    np.testing.assert_allclose(plain.weights, alone.weights, atol=1e-5)
    alone, alone_multiplier = conflict_averse(gram, active, 0.5)
    np.testing.assert_allclose(other.weights, alone.weights, atol=1e-5)
    np.testing.assert_allclose(multiplier, alone_multiplier, rtol=1e-5)


@pytest.mark.parametrize('solver', ['min_norm', 'conflict_averse'])
def test_residual_of_weights_that_are_not_optimal(solver, monkeypatch):
  # Equal weights instead of the best.
  J = _rows('plain', 4)
  lengths = np.linalg.norm(J, axis=1)
  v = jnp.asarray(lengths / lengths.min() / 4, jnp.float32)
  gram, active, c = jnp.asarray(J @ J.T, jnp.float32), _there(J), 0.4
  if solver == 'min_norm':
    monkeypatch.setattr(simplex, 'interior_point', lambda *args: v)
    found = jax.jit(lambda gram: simplex.min_norm(gram, active))(gram)
    mean = J.mean(axis=0)
    shortfall = (mean @ mean - J @ mean) / lengths / lengths.mean()
  else:
    monkeypatch.setattr(averse, '_minimiser', lambda *args: v)
    solve = lambda gram: averse.conflict_averse(gram, active, c)
    found, _ = jax.jit(solve)(gram)
    # g_w is the mean here.
    mean = J.mean(axis=0)
    slopes = (1 + c) * (J @ mean) / np.linalg.norm(mean)
    shortfall = (slopes.mean() - slopes) / lengths / (1 + c)
  np.testing.assert_allclose(found.weights, 0.25, rtol=1e-5)
  assert shortfall.max() > 0.01
  np.testing.assert_allclose(found.residual, shortfall.max(), rtol=1e-4)
