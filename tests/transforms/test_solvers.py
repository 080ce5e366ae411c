"""The solvers against independent float64 ones and their own conditions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references
from scipy import optimize

from mtl_jax.transforms.solvers import averse
from mtl_jax.transforms.solvers import simplex

_MIN_NORM = jax.jit(simplex.min_norm)


_SOLVE = jax.jit(averse.conflict_averse)


def _conflict_averse(gram, active, c):
  return _SOLVE(gram, active, c)[0]


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


def _gram(J):
  return jnp.asarray(J @ J.T, jnp.float32)


_KINDS = ('plain', 'scaled', 'near', 'aligned_scaled', 'low_rank', 'duplicated')


@pytest.mark.parametrize('kind', _KINDS)
@pytest.mark.parametrize('size', [2, 3, 10, 40])
def test_min_norm_finds_the_least_norm(size, kind):
  for seed in range(5):
    J = _rows(kind, size, seed=seed)
    found = _MIN_NORM(_gram(J), jnp.ones(size, bool))
    weights = np.asarray(found.weights, np.float64)
    assert weights.min() >= 0
    np.testing.assert_allclose(weights.sum(), 1, rtol=1e-5)
    least = np.linalg.norm(references.least_norm_weights(J) @ J)
    assert np.linalg.norm(weights @ J) <= least * (1 + 1e-4)
    assert found.residual <= 1e-4


@pytest.mark.parametrize('size', [2, 3, 10, 40])
def test_min_norm_satisfies_its_optimality_conditions(size):
  # At the least-norm point d every <g_i, d> >= |d|^2.
  J = _rows('scaled', size)
  weights = np.asarray(
    _MIN_NORM(_gram(J), jnp.ones(size, bool)).weights, np.float64
  )
  d = weights @ J
  lengths = np.linalg.norm(J, axis=1)
  shortfall = (d @ d - J @ d) / (lengths * (weights @ lengths))
  assert shortfall.max() <= 1e-4


@pytest.mark.parametrize(('size', 'dimensions'), [(3, 1), (5, 2), (40, 10)])
@pytest.mark.parametrize('kind', ['plain', 'scaled'])
def test_min_norm_of_cancelling_rows_is_zero(size, dimensions, kind):
  J = _rows(kind, size, dimensions)
  J[-1] = -J[:-1].sum(axis=0)  # Zero lies in the hull.
  weights = np.asarray(
    _MIN_NORM(_gram(J), jnp.ones(size, bool)).weights, np.float64
  )
  scale = weights @ np.linalg.norm(J, axis=1)
  # A squared norm is known up to rounding, so the norm up to its root.
  assert np.linalg.norm(weights @ J) <= 2e-3 * scale


@pytest.mark.parametrize('size', [2, 3, 40])
def test_min_norm_residual_is_what_its_docstring_says(size):
  # One row is slightly off the Gram matrix's rank: any weights have a residual.
  J = _rows('scaled', size)
  found = _MIN_NORM(_gram(J), jnp.ones(size, bool))
  weights = np.asarray(found.weights, np.float64)
  d, lengths = weights @ J, np.linalg.norm(J, axis=1)
  shortfall = (d @ d - J @ d) / (lengths * (weights @ lengths))
  np.testing.assert_allclose(found.residual, max(shortfall.max(), 0), atol=1e-6)


def test_min_norm_puts_all_weight_on_zero_gradients():
  J = np.array([[1.0, 0], [0, 0], [0, 3.0], [0, 0]])
  found = _MIN_NORM(_gram(J), jnp.ones(4, bool))
  np.testing.assert_allclose(found.weights, [0, 0.5, 0, 0.5])


@pytest.mark.parametrize('size', [2, 3, 5])
def test_absent_tasks_have_no_weight_and_no_influence(size):
  J = _rows('plain', size)
  alone = _MIN_NORM(_gram(J), jnp.ones(size, bool)).weights
  padded = np.zeros((size + 2, J.shape[1]))
  padded[1:-1] = J
  active = jnp.array([False, *[True] * size, False])
  found = _MIN_NORM(_gram(padded), active).weights
  np.testing.assert_allclose(found[1:-1], alone, atol=1e-5)
  np.testing.assert_allclose(found[jnp.array([0, -1])], 0)


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


@pytest.mark.parametrize('c', [0.1, 0.5, 0.9])
@pytest.mark.parametrize('kind', _KINDS)
@pytest.mark.parametrize('size', [2, 3, 10])
def test_conflict_averse_finds_the_least_dual_value(size, kind, c):
  J = _rows(kind, size)
  found = _conflict_averse(_gram(J), jnp.ones(size, bool), c)
  weights = np.asarray(found.weights, np.float64)
  assert weights.min() >= 0
  np.testing.assert_allclose(weights.sum(), 1, rtol=1e-5)
  value, best = _dual(J, c)
  assert value(weights) <= best + 1e-4 * max(abs(best), 1e-3)
  assert found.residual <= 1e-4


@pytest.mark.parametrize('c', [0.4, 0.9])
@pytest.mark.parametrize('kind', ['plain', 'scaled'])
@pytest.mark.parametrize(('size', 'dimensions'), [(3, 2), (10, 3), (40, 2)])
def test_conflict_averse_direction_is_best_among_many_conflicting_tasks(
  size, dimensions, kind, c
):
  # So few dimensions put the optimum close to the kink of the dual, where
  # Newton steps alone do not find it.
  for seed in range(8):
    J = _rows(kind, size, dimensions, seed)
    found, multiplier = _SOLVE(_gram(J), jnp.ones(size, bool), c)
    assert found.residual <= 1e-4
    direction = (
      J.mean(axis=0)
      + float(multiplier) * np.asarray(found.weights, np.float64) @ J
    )
    best = references.conflict_averse_direction(J, c)
    scale = np.linalg.norm(J.mean(axis=0)) * np.linalg.norm(J, axis=1).min()
    gain = (J @ best).min()
    assert (J @ direction).min() >= gain - 1e-4 * abs(gain) - 2e-3 * scale


@pytest.mark.parametrize('kind', ['plain', 'scaled', 'aligned_scaled'])
def test_conflict_averse_conditions_hold_for_forty_tasks(kind):
  c, size = 0.4, 40
  J = _rows(kind, size)
  found = _conflict_averse(_gram(J), jnp.ones(size, bool), c)
  w = np.asarray(found.weights, np.float64)
  mean, d = J.mean(axis=0), w @ J
  slope = J @ mean + c * np.linalg.norm(mean) / np.linalg.norm(d) * (J @ d)
  lengths = np.linalg.norm(J, axis=1)
  shortfall = (w @ slope - slope) / (np.linalg.norm(mean) * lengths * (1 + c))
  assert shortfall.max() <= 1e-4


@pytest.mark.parametrize('size', [2, 3])
@pytest.mark.parametrize('solver', ['min_norm', 'conflict_averse'])
def test_batch_of_problems_has_the_solutions_of_each(solver, size):
  active = jnp.ones(size, bool)
  solve, batched = {
    'min_norm': (
      lambda gram: _MIN_NORM(gram, active),
      jax.vmap(lambda gram: simplex.min_norm(gram, active)),
    ),
    'conflict_averse': (
      lambda gram: _conflict_averse(gram, active, 0.5),
      jax.vmap(lambda gram: averse.conflict_averse(gram, active, 0.5)[0]),
    ),
  }[solver]
  grams = jnp.stack([_gram(_rows('plain', size, seed=s)) for s in range(4)])
  found = jax.jit(batched)(grams).weights
  for gram, weights in zip(grams, found, strict=True):
    np.testing.assert_allclose(weights, solve(gram).weights, atol=1e-5)


@pytest.mark.parametrize('solver', ['min_norm', 'conflict_averse'])
def test_residual_of_weights_that_are_not_optimal(solver, monkeypatch):
  # Equal weights instead of the best.
  J = _rows('plain', 4)
  lengths = np.linalg.norm(J, axis=1)
  v = jnp.asarray(lengths / lengths.min() / 4, jnp.float32)
  gram, active, c = _gram(J), jnp.ones(4, bool), 0.4
  if solver == 'min_norm':
    monkeypatch.setattr(simplex, 'interior_point', lambda *args: v)
    found, mean = simplex.min_norm(gram, active), J.mean(axis=0)
    shortfall = (mean @ mean - J @ mean) / lengths / lengths.mean()
  else:
    monkeypatch.setattr(averse, '_minimiser', lambda *args: v)
    found, _ = averse.conflict_averse(gram, active, c)
    # g_w is the mean here.
    mean = J.mean(axis=0)
    slopes = (1 + c) * (J @ mean) / np.linalg.norm(mean)
    shortfall = (slopes.mean() - slopes) / lengths / (1 + c)
  np.testing.assert_allclose(found.weights, 0.25, rtol=1e-5)
  assert shortfall.max() > 0.01
  np.testing.assert_allclose(found.residual, shortfall.max(), rtol=1e-4)
