"""The projection on the simplex."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax.transforms.solvers import simplex

_PROJECT = jax.jit(simplex.simplex_projection)
NAN = float('nan')


def _nearest(x):
  """By bisection over the threshold, in float64."""
  low, high = x.max() - 1, x.max()
  for _ in range(200):
    middle = (low + high) / 2
    if np.maximum(x - middle, 0).sum() > 1:
      low = middle
    else:
      high = middle
  return np.maximum(x - low, 0)


@pytest.mark.parametrize('size', [1, 2, 3, 40])
def test_projection_is_the_nearest_point(size):
  for spread in (1e-3, 0.1, 1, 30):
    rng = np.random.default_rng(size)
    for offset in (0, -7, 500):
      x = np.float32(offset + spread * rng.standard_normal(size))
      found = _PROJECT(x, np.ones(size, bool))
      right = _nearest(x.astype(np.float64))
      np.testing.assert_allclose(
        found.weights, right, atol=1e-6, err_msg=f'{spread}, {offset}'
      )
      assert found.residual <= 1e-6, (spread, offset)


def test_projection_by_hand():
  for x, right in (
    # Inside already; outside by the same amount; far beyond a corner.
    ([0.2, 0.3, 0.5], [0.2, 0.3, 0.5]),
    ([0.5, 0.6, 0.8], [0.5 - 0.3, 0.3, 0.5]),
    ([3.0, 1.0, -2.0], [1.0, 0.0, 0.0]),
    # Equal ones share; so do those of the largest that float32 has.
    ([5.0, 5.0, 1.0], [0.5, 0.5, 0.0]),
    ([1e30, 1e30, -1e30], [0.5, 0.5, 0.0]),
  ):
    found = _PROJECT(np.float32(x), np.ones(3, bool))
    np.testing.assert_allclose(found.weights, right, atol=1e-6, err_msg=str(x))


def test_absent_tasks_have_no_weight_and_no_influence():
  active = np.array([False, True, True, False])
  for absent in (NAN, float('inf'), 1e30, -1e30, 0):
    found = _PROJECT(np.float32([absent, 0.2, 0.4, absent]), active)
    np.testing.assert_allclose(
      found.weights, [0, 0.4, 0.6, 0], atol=1e-6, err_msg=str(absent)
    )
    x = np.float32([absent, NAN, NAN, 1.0])
    found = _PROJECT(x, np.zeros(4, bool))
    np.testing.assert_array_equal(found.weights, 0, err_msg=str(absent))
    assert found.residual == 0, absent


def test_derivative_is_the_projection_on_the_face():
  # Two of three have weight: each gains what the other loses.
  x = jnp.array([0.7, 0.5, -2.0])
  found = jax.jit(jax.jacrev(simplex.project_simplex))(x, jnp.ones(3, bool))
  right = [[0.5, -0.5, 0], [-0.5, 0.5, 0], [0, 0, 0]]
  np.testing.assert_allclose(found, right, atol=1e-6)


def test_batch_of_points_is_projected_one_by_one():
  x = jnp.asarray(np.random.default_rng(0).standard_normal((5, 4)))
  active = jnp.ones(4, bool)
  project = jax.vmap(simplex.project_simplex, in_axes=(0, None))
  found = jax.jit(project)(x, active)
  for point, weights in zip(x, found, strict=True):
    np.testing.assert_allclose(
      weights, _nearest(np.asarray(point, np.float64)), atol=1e-6
    )
