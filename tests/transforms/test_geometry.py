"""Facts of methods on the geometry of task gradients."""

import functools
import itertools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest
from references import imtl_g
import references_geometry as references

import mtl_jax
from mtl_jax.transforms.solvers import simplex

CONFLICTING = np.array([[3.0, -1, 0, 1], [-1, 1, 2, 0], [0, -2, 1, 1]])


def update_of(tx, J, state=None, **extra):
  J = jnp.asarray(J, jnp.float32)
  state = tx.init(jnp.zeros(J.shape[1])) if state is None else state
  update, state = jax.jit(tx.update)(J, state, **extra)
  return np.asarray(update, np.float64), state


def cosine(a, b):
  return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def rows(size, dimensions, decades, seed=0):
  rng = np.random.default_rng(seed)
  lengths = 10.0 ** rng.uniform(-decades / 2, decades / 2, (size, 1))
  return (lengths * rng.standard_normal((size, dimensions))).astype(np.float32)


def test_aligned_gradients_have_the_condition_number_one():
  # What one task alone is wanted for is its aligned gradient.
  alone = [mtl_jax.aligned_mtl(preference=one) for one in np.eye(3)]
  updates = jax.jit(lambda J: [tx.update(J, tx.init(J[0]))[0] for tx in alone])
  for decades in (0, 8):
    J = rows(3, 9, decades)
    aligned = np.linalg.svd(np.asarray(updates(J), np.float64))[1]
    common = np.linalg.svd(J.astype(np.float64))[1].min()
    np.testing.assert_allclose(aligned, common, rtol=1e-5)


def test_aligned_gradients_of_dependent_tasks_by_hand():
  # Singular values sqrt(2), with the axis (1, 1, 0), and 2. The aligned
  # gradients are (1, 0), (1, 0) and (0, sqrt(2)).
  J = [[1.0, 0.0], [1.0, 0.0], [0.0, 2.0]]
  update, _ = update_of(mtl_jax.aligned_mtl(), J)
  np.testing.assert_allclose(update, [2 / 3, 2**0.5 / 3], rtol=1e-5)


@pytest.mark.parametrize('preference', [None, (1.0, 3.0, 0.0)])
def test_con_fig_has_cosines_in_the_proportion_of_the_preference(preference):
  update, _ = update_of(mtl_jax.con_fig(preference=preference), CONFLICTING)
  cosines = np.array([cosine(g, update) for g in CONFLICTING])
  wanted = np.ones(3) if preference is None else np.asarray(preference)
  np.testing.assert_allclose(
    cosines * wanted.sum(), cosines.sum() * wanted, atol=1e-5
  )
  assert cosines.sum() > 0
  # As long as all projections together.
  length = np.linalg.norm(update)
  projections = CONFLICTING @ update / length
  np.testing.assert_allclose(length, projections.sum(), rtol=1e-5)


@pytest.mark.parametrize(
  ('degrees', 'lengths'), [((0, 180), (1, 3)), ((10, 130, 250), (1, 2, 5))]
)
def test_con_fig_of_directions_that_cancel_is_zero(degrees, lengths):
  angles = np.deg2rad(degrees)
  J = np.stack([np.cos(angles), np.sin(angles)], axis=1)
  J *= np.asarray(lengths)[:, None]
  tx = mtl_jax.con_fig(num_tasks=len(degrees))
  update, state = update_of(tx, J)
  np.testing.assert_array_equal(update, 0)
  np.testing.assert_array_equal(state.task_weights, 0)


@pytest.mark.parametrize(('size', 'rank'), [(5, 5), (12, 8), (20, 5)])
def test_con_fig_loses_the_condition_number_of_the_rows_and_not_its_square(
  size, rank
):
  # Rows of 50 dimensions, of which those past the rank are zero, or of as many
  # as there are for independent ones. The smallest singular value is a fiftieth
  # of the largest at most; lengths differ by four decades.
  rng = np.random.default_rng(size)
  problems = np.zeros((30, size, 50))
  for J in problems:
    left = np.linalg.qr(rng.standard_normal((size, rank)))[0]
    width = 50 if size == rank else rank
    right = np.linalg.qr(rng.standard_normal((width, rank)))[0].T
    J[:, :width] = left * np.append(rng.uniform(0.3, 1, rank - 1), 6e-3) @ right
    J *= 10.0 ** rng.uniform(-2, 2, (size, 1))
  problems = problems.astype(np.float32)
  orders = np.stack([rng.permutation(size) for _ in problems])
  tx = mtl_jax.con_fig(num_tasks=size)
  update = jax.jit(jax.vmap(lambda J: tx.update(J, tx.init(jnp.zeros(50)))))
  found, states = update(problems)
  turned, _ = update(np.take_along_axis(problems, orders[:, :, None], axis=1))
  assert np.max(states.residual) <= 1e-4
  for i, J in enumerate(problems.astype(np.float64)):
    dimensions = slice(0, rank if size > rank else 50)
    (right,) = references.con_fig(J[:, dimensions], None)
    atol = 1e-4 * np.linalg.norm(J, axis=1).max()
    np.testing.assert_allclose(found[i, dimensions], right, atol=atol)
    np.testing.assert_allclose(turned[i], found[i], atol=atol)


def test_con_fig_reports_how_far_cosines_are_apart(monkeypatch):
  # With wrong cosines to start from one correction does not get there.
  split = simplex.cosines

  def wrong(gram, active):
    lengths, cos, usable = split(gram, active)
    return lengths, jnp.where(cos == 1, 1, 0.5 * cos), usable

  monkeypatch.setattr(simplex, 'cosines', wrong)
  tx = mtl_jax.con_fig(num_tasks=3)
  update, state = tx.update(
    jnp.asarray(CONFLICTING, jnp.float32), tx.init(jnp.zeros(4))
  )
  cosines = [cosine(g, np.asarray(update, np.float64)) for g in CONFLICTING]
  apart = np.linalg.norm(cosines - np.mean(cosines))
  assert apart > 1e-2
  assert apart / 3 <= state.residual <= 3 * apart


def test_con_fig_has_the_derivative_of_the_pseudo_inverse():
  rng = np.random.default_rng(0)
  for J in (CONFLICTING, rng.standard_normal((5, 3))):
    step = rng.standard_normal(J.shape)
    right = references.con_fig(J + 1e-5 * step, None)
    right = (right - references.con_fig(J - 1e-5 * step, None)) / 2e-5
    with jax.enable_x64(True):
      tx = mtl_jax.con_fig()
      update = lambda J, tx=tx: tx.update(J, tx.init(J[0]))[0]
      _, found = jax.jvp(jax.jit(update), (jnp.asarray(J),), (step,))
    np.testing.assert_allclose(found, right[0], rtol=1e-5, atol=1e-5)


CANCELLING = {
  'three at 120 degrees': ((0, 120, 240), (1, 3, 0.5)),
  'two against two': ((0, 0, 180, 180), (1, 2, 3, 0.5)),
  'two pairs that are close': ((0, 180, 5, 185), (2, 1, 0.5, 1)),
}


@pytest.mark.parametrize('dtype', ['float32', 'float64'])
@pytest.mark.parametrize('kind', CANCELLING)
def test_imtl_g_of_unit_gradients_that_cancel_is_zero_in_any_order(kind, dtype):
  degrees, lengths = CANCELLING[kind]
  angles = np.deg2rad(degrees)
  J = np.zeros((len(angles), 5))
  J[:, 0], J[:, 1] = np.cos(angles), np.sin(angles)
  J *= np.array(lengths)[:, None]
  rng = np.random.default_rng(0)
  turned = np.stack(
    [
      rng.permutation(J) @ np.linalg.qr(rng.standard_normal((5, 5)))[0]
      for _ in range(200)
    ]
  )
  if len(J) == 3:
    # So says the paper's closed form; more are on too few dimensions for it.
    right = [imtl_g(rows, None) for rows in turned]
    np.testing.assert_allclose(right, 0, atol=1e-12)
  with jax.enable_x64(dtype == 'float64'):
    tx = mtl_jax.imtl_g(num_tasks=len(J))
    update = lambda rows: tx.update(rows, tx.init(rows[0]))[0]
    found = jax.jit(jax.vmap(update))(jnp.asarray(turned, dtype))
    np.testing.assert_array_equal(found, 0)


@functools.cache
def conicgrad(angle, size):
  return mtl_jax.conicgrad(angle, num_tasks=size)


@pytest.mark.parametrize(
  ('size', 'dimensions', 'angle'),
  [
    *((3, 9, angle) for angle in (1.0, 45.0, 89.0)),
    *((size, width, 45.0) for size, width in ((2, 9), (8, 5), (40, 60))),
  ],
)
def test_conicgrad_stays_in_the_cone_with_the_length_of_the_mean(
  size, dimensions, angle
):
  for seed in range(10):
    J = rows(size, dimensions, 2, seed)
    update, _ = update_of(conicgrad(angle, size), J)
    mean = J.astype(np.float64).mean(axis=0)
    # Gradients that depend on each other cancel in the update.
    np.testing.assert_allclose(
      np.linalg.norm(update),
      np.linalg.norm(mean),
      rtol=1e-5 if size < dimensions else 1e-2,
    )
    turned = np.rad2deg(np.arccos(min(cosine(update, mean), 1)))
    assert turned <= angle + (0.05 if size < dimensions else 0.5)


def test_conicgrad_is_solved_where_tasks_outnumber_dimensions():
  # For some of these Newton's steps alone are off by a hundredth.
  for seed in range(40):
    _, state = update_of(conicgrad(45.0, 8), rows(8, 5, 2, seed))
    assert state.residual <= 1e-4, seed


@pytest.mark.parametrize('angle', [20.0, 80.0])
def test_no_direction_in_the_cone_is_better_for_the_worst_task(angle):
  mean = CONFLICTING.mean(axis=0)
  update, _ = update_of(mtl_jax.conicgrad(angle), CONFLICTING)
  # Where tasks can all gain what counts is the gain of a direction.
  assert (CONFLICTING @ update).min() > 0
  rng = np.random.default_rng(0)
  others = update + rng.standard_normal((4000, 4)) * 10.0 ** rng.uniform(
    -3, 1, (4000, 1)
  )
  others *= np.linalg.norm(update) / np.linalg.norm(others, axis=1)[:, None]
  inside = others @ mean >= np.cos(np.deg2rad(angle)) * (mean @ mean)
  assert inside.sum() > 100
  worst = (CONFLICTING @ others[inside].T).min(axis=0)
  assert worst.max() <= (CONFLICTING @ update).min() * (1 + 1e-5)


def test_conicgrad_is_mgda_direction_where_that_is_in_the_cone():
  least, _ = update_of(mtl_jax.mgda(), CONFLICTING)
  mean = CONFLICTING.mean(axis=0)
  between = np.rad2deg(np.arccos(cosine(least, mean)))
  assert 5 < between < 80
  update, _ = update_of(mtl_jax.conicgrad(between + 2), CONFLICTING)
  np.testing.assert_allclose(cosine(update, least), 1, atol=1e-6)
  update, _ = update_of(mtl_jax.conicgrad(between - 2), CONFLICTING)
  turned = np.rad2deg(np.arccos(cosine(update, mean)))
  np.testing.assert_allclose(turned, between - 2, atol=1e-2)


def test_conicgrad_turns_to_a_task_it_cannot_help_by_hand():
  # The short one is at 135 degrees to the mean, which is (1, 0) nearly; the
  # cone ends 45 degrees before it stops to lose.
  J = np.array([[2.0 + 1e-4, -1e-4], [-1e-4, 1e-4]])
  update, _ = update_of(mtl_jax.conicgrad(30.0), J)
  expected = [np.cos(np.deg2rad(30)), np.sin(np.deg2rad(30))]
  np.testing.assert_allclose(update, expected, atol=1e-4)


@pytest.mark.parametrize(('size', 'dimensions'), [(2, 9), (3, 9), (40, 60)])
def test_conicgrad_helps_no_task_less_than_those_that_have_a_weight(
  size, dimensions
):
  for seed in range(4):
    J = rows(size, dimensions, 2, seed).astype(np.float64)
    update, state = update_of(conicgrad(45.0, size), J)
    assert state.residual <= 1e-5
    # Tasks with a weight of their own gain the least and the same. The weight
    # that all have of the mean is the smallest.
    gains = J @ update / np.linalg.norm(update)
    own = np.asarray(state.task_weights)
    own = own - own.min() > 1e-3 * own.max()
    lengths = np.linalg.norm(J, axis=1)
    assert 0 < own.sum() <= size
    if own.sum() < size:
      common = np.mean(gains[own])
      np.testing.assert_allclose(
        (gains - common)[own] / lengths[own], 0, atol=1e-4
      )
      assert np.all(gains >= common - 1e-4 * lengths)


@functools.cache
def gradvac(beta, size):
  return mtl_jax.gradvac(beta, num_tasks=size)


def gradvac_with(targets, J, beta=0.5):
  tx = gradvac(beta, len(J))
  state = tx.init(jnp.zeros(len(J[0])))
  state = state._replace(memory=jnp.asarray(targets, jnp.float32))
  return update_of(tx, J, state)


def test_gradvac_brings_the_cosine_to_its_target():
  J = np.array([[2.0, 0.0, 1.0], [-2.0, 1.0, 0.0]])
  for target in (-0.3, 0.2, 0.9):
    # The second task is content with any cosine, and stays as it is.
    update, _ = gradvac_with([[0, target], [-1, 0]], J)
    vaccinated = update - J[1]
    np.testing.assert_allclose(cosine(vaccinated, J[1]), target, atol=1e-5)
    # Only along the other gradient.
    across = np.cross(vaccinated - J[0], J[1])
    np.testing.assert_allclose(across, 0, atol=1e-5)


def test_gradvac_leaves_gradients_above_their_target_alone():
  J = np.array([[2.0, 0.0, 1.0], [-2.0, 1.0, 0.0]])
  update, _ = gradvac_with(np.full((2, 2), cosine(*J) - 1e-3), J)
  np.testing.assert_allclose(update, J.sum(axis=0), atol=1e-6)


def test_gradvac_targets_are_averages_of_the_cosines_met():
  J = np.array([[2.0, 0.0, 1.0], [-2.0, 1.0, 0.0]])
  before = np.array([[0.0, 0.4], [-0.8, 0.0]])
  _, state = gradvac_with(before, J, beta=0.25)
  after = 0.75 * before + 0.25 * cosine(*J)
  np.fill_diagonal(after, 0)
  np.testing.assert_allclose(state.memory, after, atol=1e-6)


@pytest.mark.parametrize('out', ['absent', 'zero'])
def test_gradvac_targets_of_a_task_that_is_out_stay_exactly(out):
  before = jnp.array(
    [[0.0, 0.1, 0.2], [0.3, 0.0, 0.4], [0.5, 0.6, 0.0]], jnp.float32
  )
  J = CONFLICTING.copy()
  J[1] = np.nan if out == 'absent' else 0
  tx = gradvac(0.5, 3)
  state = tx.init(jnp.zeros(4))._replace(memory=before)
  active = jnp.array([True, out == 'zero', True])
  update, state = update_of(tx, J, state, active=active)
  assert np.all(np.isfinite(update))
  changed = np.asarray(state.memory != before)
  np.testing.assert_array_equal(changed, [[0, 0, 1], [0, 0, 0], [1, 0, 0]])


def test_gradvac_update_is_bounded_for_a_target_of_one():
  J = np.array([[2.0, 0.0], [0.0, 1.0]])
  update, _ = gradvac_with(np.ones((2, 2)), J)
  assert np.linalg.norm(update) < 200 * 2


def test_graddrop_draws_signs_with_the_probability_of_their_share():
  # Each column repeated: every coordinate draws for itself.
  J = np.repeat([[1.0, -4, 2, 0], [3, 1, 1, 0], [-1, -1, 5, 0]], 4000, axis=1)
  update, _ = update_of(mtl_jax.graddrop(), J)
  outcomes = update.reshape(4, 4000)
  for drawn, positive, negative in zip(
    outcomes, (4, 1, 8, 0), (-1, -5, 0, 0), strict=True
  ):
    assert set(np.unique(drawn)) <= {positive, negative}
    if positive and negative:
      share = positive / (positive - negative)
      # Five standard deviations.
      np.testing.assert_allclose(
        np.mean(drawn == positive), share, atol=5 * 0.5 / 4000**0.5
      )
    else:
      np.testing.assert_array_equal(drawn, positive)


def test_graddrop_with_a_leak_of_one_is_the_sum():
  update, _ = update_of(mtl_jax.graddrop(leak=1.0), CONFLICTING)
  np.testing.assert_allclose(update, CONFLICTING.sum(axis=0), atol=1e-6)


def test_graddrop_draws_anew_for_every_leaf_and_update():
  leaf = jnp.tile(jnp.array([[1.0], [-1.0]]), (1, 200))
  tx = mtl_jax.graddrop()
  state = tx.init((leaf[0], leaf[0]))
  drawn = []
  step = jax.jit(tx.update)
  for _ in range(2):
    update, state = step((leaf, leaf), state)
    drawn += update
  for first, second in itertools.combinations(drawn, 2):
    assert 0.3 < np.mean(np.asarray(first == second)) < 0.7


@pytest.mark.parametrize('check_vma', [False, True])
def test_graddrop_draws_for_every_shard_and_alike_on_replicas(check_vma):
  leaf = jnp.tile(jnp.array([[1.0], [-1.0]]), (1, 800))
  tx = mtl_jax.graddrop(axis_name='data', shard_axis='model')
  state = tx.init(leaf[0])
  mesh = jax.make_mesh(
    (2, 4), ('data', 'model'), axis_types=(jax.sharding.AxisType.Auto,) * 2
  )

  def step(leaf):
    if check_vma:
      leaf = jax.lax.pcast(leaf, 'data', to='varying')
    return tx.update(leaf, state)[0][None]

  sharded = jax.shard_map(
    step,
    mesh=mesh,
    in_specs=P(None, 'model'),
    out_specs=P('data', 'model'),
    check_vma=check_vma,
  )
  update = jax.jit(sharded)(leaf)
  np.testing.assert_array_equal(update[0], update[1])
  shards = np.asarray(update[0]).reshape(4, 200)
  for first, second in itertools.combinations(shards, 2):
    assert 0.3 < np.mean(first == second) < 0.7


KRUM_MATRIX = [
  [1.0, 1.0, 1.0],
  [1.0, 0.0, 1.0],
  [75.0, -666.0, 23.0],
  [1.0, 2.0, 3.0],
  [2.0, 0.0, 1.0],
]


def test_krum_selects_rows_of_torchjds_matrix():
  tx = mtl_jax.krum(num_byzantine=1, num_selected=4, num_tasks=5)
  update, state = update_of(tx, KRUM_MATRIX)
  # TorchJD's test_values.
  np.testing.assert_allclose(update, [1.25, 0.75, 1.5], rtol=1e-5)
  np.testing.assert_allclose(state.task_weights, [0.25, 0.25, 0, 0.25, 0.25])


def test_krum_adds_squared_distances_by_hand():
  # Two neighbours each: squares 8 + 16 of the fourth are less than 2 + 25 of
  # the second, though its distances are 6.8 and not 6.4.
  J = [[0.0, 1.0], [6.0, 0.0], [7.0, 1.0], [2.0, 3.0], [2.0, 7.0]]
  update, _ = update_of(mtl_jax.krum(num_byzantine=1), J)
  np.testing.assert_array_equal(update, J[3])


@pytest.mark.parametrize('wrong', [1e3, -1e8])
def test_krum_and_trimmed_mean_ignore_a_row_far_out(wrong):
  J = rows(7, 9, 0)
  others = np.delete(J, 2, axis=0)
  J[2] = wrong
  update, _ = update_of(mtl_jax.krum(num_byzantine=2), J)
  assert np.any(np.all(np.isclose(update, others), axis=1))
  update, _ = update_of(mtl_jax.trimmed_mean(trim=1), J)
  assert np.all(others.min(axis=0) <= update)
  assert np.all(update <= others.max(axis=0))


def test_trimmed_mean_of_torchjds_matrix():
  J = [[1e11, 3.0], [1.0, -1e11], [-1e10, 1e10], [2.0, 2.0]]
  update, _ = update_of(mtl_jax.trimmed_mean(trim=1), J)
  # TorchJD's test_values.
  np.testing.assert_allclose(update, [1.5, 2.5])


@pytest.mark.parametrize(
  'tx',
  [
    mtl_jax.trimmed_mean(trim=1),
    mtl_jax.krum(num_byzantine=0),
    mtl_jax.graddrop(),
  ],
  ids=['trimmed_mean', 'krum', 'graddrop'],
)
def test_gradient_that_is_not_finite_is_not_hidden(tx):
  for value in (np.nan, np.inf, -np.inf):
    J = CONFLICTING.copy()
    J[1, 2] = value
    update, _ = update_of(tx, J)
    assert not np.isfinite(update[2]), value


@pytest.mark.parametrize(
  ('factory', 'arguments', 'fewest'),
  [
    (mtl_jax.krum, {'num_byzantine': 1}, 5),
    (mtl_jax.krum, {'num_byzantine': 2}, 7),
    (mtl_jax.krum, {'num_byzantine': 0, 'num_selected': 5}, 5),
    (mtl_jax.trimmed_mean, {'trim': 2}, 5),
  ],
)
def test_too_few_tasks_are_refused_and_too_few_active_ones_averaged(
  factory, arguments, fewest
):
  with pytest.raises(ValueError, match=f'num_tasks.*{fewest - 1}'):
    factory(**arguments, num_tasks=fewest - 1)
  J = rows(fewest, 6, 1)
  tx = factory(**arguments, num_tasks=fewest)
  active = np.arange(fewest) > 0
  update, _ = update_of(tx, J, active=jnp.asarray(active))
  np.testing.assert_allclose(update, J[active].mean(axis=0), rtol=1e-5)
  update, _ = update_of(tx, J)
  if factory is mtl_jax.trimmed_mean:
    right = references.trimmed_mean(**arguments)
  else:
    right = references.krum(**{'num_selected': 1, **arguments})
  np.testing.assert_allclose(update, right(J, None)[0], rtol=1e-5)


def test_krum_of_two_tasks_without_a_wrong_one_is_their_mean():
  tx = mtl_jax.krum(num_byzantine=0, num_tasks=2)
  update, _ = update_of(tx, CONFLICTING[:2])
  np.testing.assert_allclose(update, CONFLICTING[:2].mean(axis=0))


def test_random_weights_are_the_softmax_of_standard_normal_draws():
  tx = mtl_jax.random_weights(num_tasks=3)
  J = jnp.eye(3)
  step = lambda state, _: tx.update(J, state)[::-1]
  _, weights = jax.lax.scan(step, tx.init(J[0]), None, length=4000)
  np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-5)
  np.testing.assert_allclose(weights.mean(axis=0), 1 / 3, atol=0.02)
  differences = np.diff(np.log(weights), axis=1)
  # Of two independent draws; five standard deviations.
  np.testing.assert_allclose(differences.mean(axis=0), 0, atol=0.12)
  np.testing.assert_allclose(differences.var(axis=0), 2, atol=0.25)
