"""Nash bargaining and alpha-fairness: their conditions and their limits."""

import jax
import jax.numpy as jnp
import method_row
import numpy as np
import pytest
import references
import references_solvers

import mtl_jax
from mtl_jax.transforms.solvers import fair

_SOLVE = jax.jit(fair.alpha_fair, static_argnums=3)


def _solve(J, alpha, scale='norm'):
  """Weights in float64, and the residual."""
  gram = jnp.asarray(J @ J.T, jnp.float32)
  found = _SOLVE(gram, jnp.ones(len(J), bool), alpha, scale)
  return np.asarray(found.weights, np.float64), float(found.residual)


def _rows(kind, size, seed=0):
  rng = np.random.default_rng(seed + 100 * size)
  J = rng.standard_normal((size, 60))
  if kind == 'scaled':
    J *= 10.0 ** rng.uniform(-2, 2, (size, 1))
  elif kind == 'near':
    J = J[:1] + 0.1 * J
  elif kind == 'duplicated':
    J[size // 2 :] = J[: size - size // 2]
  elif kind == 'conflicting':
    # Hardly a direction that all like.
    J /= np.linalg.norm(J, axis=1, keepdims=True)
    J += 0.05 * rng.standard_normal(60) / 60**0.5 - J.mean(axis=0)
  elif kind == 'low_rank':
    J = J[:, :2].copy()
    J[:, 0] = 0.02 + np.abs(J[:, 0])
  return J.astype(np.float32).astype(np.float64)


_KINDS = ('plain', 'scaled', 'near', 'duplicated', 'conflicting', 'low_rank')


@pytest.mark.parametrize('kind', _KINDS)
@pytest.mark.parametrize('size', [1, 2, 3, 10, 40])
def test_nash_weights_are_a_fixed_point(size, kind):
  for seed in range(3):
    J = _rows(kind, size, seed)
    a, residual = _solve(J, 1.0)
    G = J @ J.T
    assert a.min() > 0
    gains = a * (G @ a) / np.linalg.norm(G)
    np.testing.assert_allclose(gains, 1, rtol=1e-4)
    assert residual <= 1e-4


@pytest.mark.parametrize('alpha', [0.1, 0.5, 2.0, 5.0, 10.0, 100.0])
@pytest.mark.parametrize('kind', _KINDS)
@pytest.mark.parametrize('size', [2, 3, 10, 40])
def test_fair_weights_satisfy_their_conditions(size, kind, alpha):
  J = _rows(kind, size)
  a, residual = _solve(J, alpha)
  assert residual <= 1e-4
  lengths = np.linalg.norm(J, axis=1)
  root = np.sqrt(np.linalg.norm(J @ J.T))
  d = a @ J
  # The gain of a unit gradient, and the part of it in the update: each as it
  # is, and as the condition makes it of the other.
  with np.errstate(all='ignore'):
    gain, part = J @ d / lengths / root, a * lengths / root
    size_of = np.linalg.norm(d) / root
    target = (part * root / lengths) ** (-1 / alpha) * root / lengths
    right = np.where(gain > 0, gain * lengths / root, np.nan) ** -alpha
    right = right * lengths / root
  off = np.abs(gain - target) / np.maximum(target, 1e-2 * size_of)
  other = np.where(np.isnan(right), np.inf, np.abs(part - right) / size_of)
  assert np.minimum(off, other).max() <= 1e-4


@pytest.mark.parametrize(
  ('kind', 'alpha', 'seed'), [('scaled', 0.1, 3), ('low_rank', 100.0, 1)]
)
def test_solution_is_found_where_full_steps_would_not_lead(kind, alpha, seed):
  assert _solve(_rows(kind, 40, seed), alpha)[1] <= 1e-4


@pytest.mark.parametrize('alpha', [0.3, 2.0])
@pytest.mark.parametrize('kind', ['plain', 'scaled', 'conflicting'])
@pytest.mark.parametrize('size', [3, 10])
@pytest.mark.parametrize('scale', ['norm', 'paper'])
def test_fair_update_is_that_of_the_reference(size, kind, alpha, scale):
  J = _rows(kind, size)
  d = _solve(J, alpha, scale)[0] @ J
  right = references_solvers.fair_weights(J, alpha, scale) @ J
  np.testing.assert_allclose(d, right, atol=1e-4 * np.linalg.norm(right))


@pytest.mark.parametrize('cosine', [1, 0.9, 0.3, 0, -0.5, -0.9, -0.999])
@pytest.mark.parametrize('lengths', [(1, 1), (1e-2, 1e2), (1e-8, 1e8)])
def test_nash_of_two_tasks_in_closed_form(cosine, lengths):
  # By symmetry both unit gradients have the same part b, and b^2 (1 + k) = 1.
  J = np.array([[1.0, 0], [cosine, np.sqrt(1 - cosine**2)]])
  J *= np.array(lengths)[:, None]
  a, residual = _solve(J, 1.0, 'paper')
  part = 1 / np.sqrt(1 + cosine)
  np.testing.assert_allclose(a * lengths, [part, part], rtol=1e-4)
  assert residual <= 1e-4


@pytest.mark.parametrize('factor', [1e-2, 1, 1e2])
def test_nash_at_the_papers_scale_has_one_length_whatever_the_gradients(factor):
  # TorchJD's test_values have this update after their clip at the norm 1.
  J = factor * method_row.GOLDEN_MATRIX
  a = references_solvers.fair_weights(J, 1.0, 'paper')
  np.testing.assert_allclose(a * (J @ J.T @ a), 1, rtol=1e-9)
  golden = [0.076584, 0.998533, 0.998533]
  np.testing.assert_allclose(a @ J, golden, atol=1e-6)
  tx = mtl_jax.nash_mtl('paper')
  update, _ = tx.update(jnp.asarray(J, jnp.float32), tx.init(jnp.zeros(3)))
  np.testing.assert_allclose(update, golden, atol=1e-5)


@pytest.mark.parametrize('alpha', [0.5, 1.0, 2.0])
@pytest.mark.parametrize('factor', [1e-3, 1e3])
def test_degree_of_the_papers_scale(alpha, factor):
  J = _rows('plain', 3)
  d, scaled = _solve(J, alpha, 'paper')[0] @ J, factor * J
  scaled = _solve(scaled, alpha, 'paper')[0] @ scaled
  degree = (1 - alpha) / (1 + alpha)
  np.testing.assert_allclose(scaled, factor**degree * d, rtol=1e-4, atol=1e-5)


def test_large_alpha_is_the_direction_in_which_the_worst_task_gains_most():
  J = _rows('plain', 5)
  d = _solve(J, 1000.0)[0] @ J
  worst = references.least_norm_weights(J) @ J
  cosine = d @ worst / np.linalg.norm(d) / np.linalg.norm(worst)
  assert cosine >= 0.9999


def test_small_alpha_is_the_sum():
  J = _rows('near', 5)
  a, _ = _solve(J, 1e-3, 'paper')
  np.testing.assert_allclose(a, 1, atol=1e-2)


@pytest.mark.parametrize('alpha', [0.2, 1.0, 2.0, 10.0])
@pytest.mark.parametrize(
  'J',
  [
    [[1, 2, 3], [-1, -2, -3]],
    [[0.1, 0, 0], [-10, 0, 0], [0, 1, 0]],
    [[1, 0, 0], [0, 1, 0], [-1, -1, 0]],
    [[1, 0, 0], [-1, 1, 0], [-1, -3, 0]],
  ],
  ids=['opposed', 'opposed, scaled', 'cancelling', 'zero inside'],
)
def test_residual_tells_that_there_is_no_agreement(J, alpha):
  J = np.array(J, np.float64)
  a, residual = _solve(J, alpha)
  assert np.all(np.isfinite(a)) and np.isfinite(residual)
  # Small alpha hardly minds a gain of almost nothing.
  assert residual >= (1e-2 if alpha >= 1 else 1.2e-4)
  # The tasks cancel, and no task's part runs away.
  assert np.linalg.norm(a @ J) <= 10 * np.linalg.norm(J, axis=1).max()


@pytest.mark.parametrize('alpha', [1.0, 2.0, 50.0])
@pytest.mark.parametrize('scale', ['norm', 'paper'])
def test_weights_are_finite_for_lengths_of_25_decades(alpha, scale):
  J = _rows('plain', 3) * np.array([[1e-10], [1], [1e15]])
  a, residual = _solve(J, alpha, scale)
  assert np.all(np.isfinite(a)) and np.isfinite(residual)
  assert np.linalg.norm(a @ J) < 1e19


@pytest.mark.parametrize('alpha', [1.0, 2.0])
def test_task_without_gradient_has_no_say(alpha):
  J = _rows('plain', 3)
  J[1] = 0
  a, residual = _solve(J, alpha)
  alone, _ = _solve(J[[0, 2]], alpha)
  np.testing.assert_allclose(a, [alone[0], 0, alone[1]], rtol=1e-5)
  assert residual <= 1e-4
  a, residual = _solve(np.zeros((3, 5)), alpha)
  np.testing.assert_array_equal(a, 0)
  assert residual == 0


def test_unfinished_solution_has_the_residual_of_its_docstring(monkeypatch):
  monkeypatch.setattr(fair, '_ITERATIONS', 1)
  J = _rows('conflicting', 5)
  gram = jnp.asarray(J @ J.T, jnp.float32)
  found = fair.alpha_fair(gram, jnp.ones(5, bool), 1.0)
  a = np.asarray(found.weights, np.float64)
  # For alpha 1, and gains that are positive: 1/b against the gain of a unit
  # gradient, and b against its inverse.
  lengths = np.linalg.norm(J, axis=1)
  root = np.sqrt(np.linalg.norm(J @ J.T))
  gain, part = J @ (a @ J) / lengths / root, a * lengths / root
  assert gain.min() > 0
  size = np.sqrt(5)
  off = np.abs(gain - 1 / part) / np.maximum(1 / part, 1e-2 * size)
  right = np.minimum(off, np.abs(part - 1 / gain) / size).max()
  assert right > 1e-4
  np.testing.assert_allclose(found.residual, right, rtol=1e-3)


@pytest.mark.parametrize('size', [1, 2, 4])
def test_absent_tasks_have_no_weight_and_no_influence(size):
  J = _rows('plain', size)
  alone, _ = _solve(J, 2.0)
  padded = np.zeros((size + 2, 60))
  padded[1:-1] = J
  active = jnp.array([False, *[True] * size, False])
  gram = jnp.asarray(padded @ padded.T, jnp.float32)
  found = _SOLVE(gram, active, 2.0, 'norm').weights
  np.testing.assert_allclose(found[1:-1], alone, rtol=1e-5)
  np.testing.assert_array_equal(found[jnp.array([0, -1])], 0)


def test_batch_of_problems_has_the_solutions_of_each():
  problems = [_rows('conflicting', 4, seed) for seed in range(4)]
  grams = jnp.stack([jnp.asarray(J @ J.T, jnp.float32) for J in problems])
  solve = lambda gram: fair.alpha_fair(gram, jnp.ones(4, bool), 2.0)
  found = jax.jit(jax.vmap(solve))(grams).weights
  for J, weights in zip(problems, found, strict=True):
    np.testing.assert_allclose(weights, _solve(J, 2.0)[0], rtol=1e-4)


def test_nash_is_fairgrad_of_one():
  J = jnp.asarray(_rows('conflicting', 3), jnp.float32)
  updates = []
  for tx in (mtl_jax.nash_mtl('paper'), mtl_jax.fairgrad(1, scale='paper')):
    updates.append(tx.update(J, tx.init(J[0]))[0])
  np.testing.assert_array_equal(*updates)
