"""Nash bargaining and alpha-fairness: their conditions and their limits."""

import functools
import itertools

import batches
import jax
import jax.numpy as jnp
import method_row
import numpy as np
import pytest
import references
import references_solvers

import mtl_jax
from mtl_jax.transforms.solvers import fair

_SOLVE = {
  scale: batches.batched(functools.partial(fair.alpha_fair, scale=scale))
  for scale in ('norm', 'paper')
}


def _all_solved(problems, scale='norm'):
  """Weights and residual of every pair (J, alpha)."""
  found = _SOLVE[scale](
    [(J @ J.T, np.ones(len(J), bool), float(alpha)) for J, alpha in problems]
  )
  return [(solution.weights, solution.residual) for solution in found]


def _solve(J, alpha, scale='norm'):
  return _all_solved([(J, alpha)], scale)[0]


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


@pytest.mark.parametrize('size', [1, 2, 3, 10, 40])
def test_nash_weights_are_a_fixed_point(size):
  names = list(itertools.product(_KINDS, range(3)))
  problems = [(_rows(kind, size, seed), 1.0) for kind, seed in names]
  for name, (J, _), (a, residual) in zip(
    names, problems, _all_solved(problems), strict=True
  ):
    G = J @ J.T
    assert a.min() > 0, name
    gains = a * (G @ a) / np.linalg.norm(G)
    np.testing.assert_allclose(gains, 1, rtol=1e-4, err_msg=str(name))
    assert residual <= 1e-4, name


@pytest.mark.parametrize('size', [2, 3, 10, 40])
def test_fair_weights_satisfy_their_conditions(size):
  names = list(itertools.product(_KINDS, (0.1, 0.5, 2.0, 5.0, 10.0, 100.0)))
  problems = [(_rows(kind, size), alpha) for kind, alpha in names]
  for name, (J, alpha), (a, residual) in zip(
    names, problems, _all_solved(problems), strict=True
  ):
    assert residual <= 1e-4, name
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
    assert np.minimum(off, other).max() <= 1e-4, name


def test_solution_is_found_where_full_steps_would_not_lead():
  problems = [(_rows('scaled', 40, 3), 0.1), (_rows('low_rank', 40, 1), 100.0)]
  for _, residual in _all_solved(problems):
    assert residual <= 1e-4


@pytest.mark.parametrize('scale', ['norm', 'paper'])
def test_fair_update_is_that_of_the_reference(scale):
  for size in (3, 10):
    names = list(
      itertools.product(('plain', 'scaled', 'conflicting'), (0.3, 2))
    )
    problems = [(_rows(kind, size), alpha) for kind, alpha in names]
    for name, (J, alpha), (a, _) in zip(
      names, problems, _all_solved(problems, scale), strict=True
    ):
      right = references_solvers.fair_weights(J, alpha, scale) @ J
      atol = 1e-4 * np.linalg.norm(right)
      np.testing.assert_allclose(a @ J, right, atol=atol, err_msg=str(name))


def test_nash_of_two_tasks_in_closed_form():
  # By symmetry both unit gradients have the same part b, and b^2 (1 + k) = 1.
  cosines = [1, 0.9, 0.3, 0, -0.5, -0.9, -0.999]
  names = list(itertools.product(cosines, [(1, 1), (1e-2, 1e2), (1e-8, 1e8)]))
  problems = []
  for cosine, lengths in names:
    J = np.array([[1.0, 0], [cosine, np.sqrt(1 - cosine**2)]])
    problems.append((J * np.array(lengths)[:, None], 1.0))
  for name, (a, residual) in zip(
    names, _all_solved(problems, 'paper'), strict=True
  ):
    cosine, lengths = name
    part = 1 / np.sqrt(1 + cosine)
    np.testing.assert_allclose(
      a * lengths, [part, part], rtol=1e-4, err_msg=str(name)
    )
    assert residual <= 1e-4, name


def test_nash_at_the_papers_scale_has_one_length_whatever_the_gradients():
  # TorchJD's test_values have this update after their clip at the norm 1.
  golden = [0.076584, 0.998533, 0.998533]
  tx = mtl_jax.nash_mtl('paper')
  step = jax.jit(lambda J: tx.update(J, tx.init(jnp.zeros(3)))[0])
  for factor in (1e-2, 1, 1e2):
    J = factor * method_row.GOLDEN_MATRIX
    a = references_solvers.fair_weights(J, 1.0, 'paper')
    np.testing.assert_allclose(a * (J @ J.T @ a), 1, rtol=1e-9)
    np.testing.assert_allclose(a @ J, golden, atol=1e-6)
    update = step(jnp.asarray(J, jnp.float32))
    np.testing.assert_allclose(update, golden, atol=1e-5, err_msg=str(factor))


def test_degree_of_the_papers_scale():
  J = _rows('plain', 3)
  for alpha, factor in itertools.product((0.5, 1.0, 2.0), (1e-3, 1e3)):
    (a, _), (b, _) = _all_solved([(J, alpha), (factor * J, alpha)], 'paper')
    expected = factor ** ((1 - alpha) / (1 + alpha)) * a @ J
    np.testing.assert_allclose(
      factor * b @ J,
      expected,
      rtol=1e-4,
      atol=1e-5,
      err_msg=f'{alpha} {factor}',
    )


def test_large_alpha_is_the_direction_in_which_the_worst_task_gains_most():
  J = _rows('plain', 10)
  d = _solve(J, 1000.0)[0] @ J
  worst = references.least_norm_weights(J) @ J
  cosine = d @ worst / np.linalg.norm(d) / np.linalg.norm(worst)
  assert cosine >= 0.9999


def test_small_alpha_is_the_sum():
  J = _rows('near', 10)
  a, _ = _solve(J, 1e-3, 'paper')
  np.testing.assert_allclose(a, 1, atol=1e-2)


AGAINST = {
  'opposed': [[1, 2, 3], [-1, -2, -3], [0, 0, 0]],
  'opposed, scaled': [[0.1, 0, 0], [-10, 0, 0], [0, 1, 0]],
  'cancelling': [[1, 0, 0], [0, 1, 0], [-1, -1, 0]],
  'zero inside': [[1, 0, 0], [-1, 1, 0], [-1, -3, 0]],
}


def test_residual_tells_that_there_is_no_agreement():
  names = list(itertools.product(AGAINST, (0.2, 1.0, 2.0, 10.0)))
  problems = [(np.array(AGAINST[kind], float), alpha) for kind, alpha in names]
  for name, (J, alpha), (a, residual) in zip(
    names, problems, _all_solved(problems), strict=True
  ):
    assert np.all(np.isfinite(a)) and np.isfinite(residual), name
    # Small alpha hardly minds a gain of almost nothing.
    assert residual >= (1e-2 if alpha >= 1 else 1.2e-4), name
    # The tasks cancel, and no task's part runs away.
    longest = np.linalg.norm(J, axis=1).max()
    assert np.linalg.norm(a @ J) <= 10 * longest, name


@pytest.mark.parametrize('scale', ['norm', 'paper'])
def test_weights_are_finite_for_lengths_of_25_decades(scale):
  J = _rows('plain', 3) * np.array([[1e-10], [1], [1e15]])
  for a, residual in _all_solved([(J, x) for x in (1.0, 2.0, 50.0)], scale):
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
  solve = lambda gram: fair.alpha_fair(gram, jnp.ones(5, bool), 1.0)
  found = jax.jit(solve)(jnp.asarray(J @ J.T, jnp.float32))
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


def test_absent_tasks_have_no_weight_and_no_influence():
  for size, among in ((1, 3), (2, 3), (3, 10)):
    J = _rows('plain', size)
    alone, _ = _solve(J, 2.0)
    places = [range(size), range(1, size + 1), range(among - size, among)]
    actives = [np.isin(np.arange(among), place) for place in places]
    problems = []
    for active in actives:
      gram = np.zeros((among, among))
      gram[np.ix_(active, active)] = J @ J.T
      problems.append((gram, active, 2.0))
    for active, found in zip(actives, _SOLVE['norm'](problems), strict=True):
      np.testing.assert_allclose(found.weights[active], alone, rtol=1e-5)
      np.testing.assert_array_equal(found.weights[~active], 0)


def test_batch_of_problems_has_the_solutions_of_each():
  problems = [(_rows('conflicting', 3, seed), 2.0) for seed in range(4)]
  solve = jax.jit(lambda gram: fair.alpha_fair(gram, jnp.ones(3, bool), 2.0))
  for (J, _), (weights, _) in zip(problems, _all_solved(problems), strict=True):
    alone = solve(jnp.asarray(J @ J.T, jnp.float32)).weights
    np.testing.assert_allclose(weights, alone, rtol=1e-4)


def test_nash_is_fairgrad_of_one():
  J = jnp.asarray(_rows('conflicting', 3), jnp.float32)
  both = (mtl_jax.nash_mtl('paper'), mtl_jax.fairgrad(1, scale='paper'))
  updates = jax.jit(lambda J: [tx.update(J, tx.init(J[0]))[0] for tx in both])
  np.testing.assert_array_equal(*updates(J))
