"""The solvers where the gradients are dependent, cancel, or differ wildly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import references

from mtl_jax.transforms.solvers import averse
from mtl_jax.transforms.solvers import simplex

_PROBLEMS = 12


def _problems(size, dimensions, decades):
  """Gradients [N, T, D] with more tasks than dimensions; zero is often inside.

  With lengths from 10^-decades to 10^decades.
  """
  rng = np.random.default_rng(size)
  J = rng.standard_normal((_PROBLEMS, size, dimensions))
  J /= np.linalg.norm(J, axis=2, keepdims=True)
  J *= 10.0 ** rng.uniform(-decades, decades, (_PROBLEMS, size, 1))
  J = J.astype(np.float32).astype(np.float64)
  gram = np.einsum('nid,njd->nij', J, J)
  return J, jnp.asarray(gram, jnp.float32), jnp.ones(size, bool)


def _shortfall(slopes, w, lengths):
  """How far a slope lies below the mean slope, over the task's length."""
  return max(0, np.max((w @ slopes - slopes) / lengths))


_min_norm = jax.jit(jax.vmap(simplex.min_norm, in_axes=(0, None)))
_conflict_averse = jax.jit(
  jax.vmap(averse.conflict_averse, in_axes=(0, None, None))
)


@pytest.mark.parametrize('decades', [0, 2, 8])
@pytest.mark.parametrize(
  ('size', 'dimensions'), [(2, 3), (3, 5), (3, 2), (40, 10), (40, 60)]
)
def test_min_norm_is_optimal_for_lengths_of_many_decades(
  size, dimensions, decades
):
  J, gram, active = _problems(size, dimensions, decades)
  found = _min_norm(gram, active)
  for rows, w, reported in zip(
    J, np.asarray(found.weights, np.float64), found.residual, strict=True
  ):
    lengths = np.linalg.norm(rows, axis=1)
    d = w @ rows
    residual = _shortfall(rows @ d, w, lengths) / (w @ lengths)
    assert residual <= 1e-4
    np.testing.assert_allclose(reported, residual, atol=1e-5)


@pytest.mark.parametrize('c', [0.1, 0.5, 0.9])
@pytest.mark.parametrize('decades', [0, 2])
@pytest.mark.parametrize(
  ('size', 'dimensions'), [(2, 3), (3, 2), (10, 5), (40, 10)]
)
def test_conflict_averse_is_optimal_with_more_tasks_than_dimensions(
  size, dimensions, decades, c
):
  J, gram, active = _problems(size, dimensions, decades)
  found, _ = _conflict_averse(gram, active, c)
  for rows, w, reported in zip(
    J, np.asarray(found.weights, np.float64), found.residual, strict=True
  ):
    assert w.min() >= 0
    np.testing.assert_allclose(w.sum(), 1, rtol=1e-5)
    lengths = np.linalg.norm(rows, axis=1)
    mean, d = rows.mean(axis=0), w @ rows
    slopes = rows @ mean / np.linalg.norm(mean)
    slopes += c * (rows @ d) / np.linalg.norm(d)
    residual = _shortfall(slopes, w, lengths) / (1 + c)
    assert residual <= 1e-4
    np.testing.assert_allclose(reported, residual, atol=1e-4)


@pytest.mark.parametrize('c', [0.5, 0.9])
def test_cagrad_is_the_best_of_its_ball_with_more_tasks_than_dimensions(c):
  J, gram, active = _problems(3, 2, 1)
  found, multipliers = _conflict_averse(gram, active, c)
  for rows, w, multiplier in zip(
    J, np.asarray(found.weights, np.float64), multipliers, strict=True
  ):
    mean = rows.mean(axis=0)
    radius = c * np.linalg.norm(mean)
    direction = mean + float(multiplier) * w @ rows
    best = references.conflict_averse_direction(rows, c)
    np.testing.assert_allclose(
      (rows @ direction).min(),
      (rows @ best).min(),
      atol=1e-4 * np.linalg.norm(mean) * np.linalg.norm(rows, axis=1).max(),
    )
    np.testing.assert_allclose(direction, best, atol=2e-3 * radius / c)


DEGENERATE = {
  'duplicates': [[1, 2, 3], [1, 2, 3], [-1, 1, 1]],
  'opposed': [[1, 2, 3], [-1, -2, -3], [1, 0, 0]],
  'one is zero': [[1, 2, 3], [0, 0, 0], [1, 0, 0]],
  'cancelling': [[1, 0, 0], [0, 1, 0], [-1, -1, 0]],
  'all zero': [[0, 0, 0], [0, 0, 0], [0, 0, 0]],
}


@pytest.mark.parametrize('size', [2, 3])
@pytest.mark.parametrize('kind', DEGENERATE)
def test_solutions_are_finite_and_on_the_simplex(kind, size):
  J = jnp.asarray(DEGENERATE[kind], jnp.float32)[:size]
  gram, active = (J @ J.T)[None], jnp.ones(size, bool)
  found_averse, multiplier = _conflict_averse(gram, active, 0.5)
  for found in (_min_norm(gram, active), found_averse):
    assert np.all(np.isfinite(found.residual))
    assert np.min(found.weights) >= 0
    # A gradient of zero may be left out: its weight changes no direction.
    total = np.sum(found.weights)
    assert np.isclose(total, 1, rtol=1e-5) or (not J.any() and total == 0)
  assert np.all(np.isfinite(multiplier))
