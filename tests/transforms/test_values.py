"""Updates against golden values and float64 references."""

import jax.numpy as jnp
import methods
import numpy as np
import pytest

import mtl_jax


@pytest.mark.parametrize('method', methods.ALL)
def test_golden_update(method):
  update, _ = methods.eager_golden(method)
  np.testing.assert_allclose(update, method.golden, atol=2e-5)


@pytest.mark.parametrize('method', methods.ALL)
def test_update_is_one_that_the_reference_allows(method):
  # With four tasks an order is more than a first and a second.
  for size in (2, 3, 4) if method.random else (2, 3):
    stacks = np.stack([methods.matrix(size, 5, seed) for seed in range(8)])
    found = methods.run_all(method, stacks)
    for seed, (J, update) in enumerate(zip(stacks, found.updates, strict=True)):
      right = method.right(J, methods.LOSSES[:size], range(size))
      assert_is_one_of(update, right, J, 1e-5, f'seed {seed}, {size} tasks')


def assert_is_one_of(update, right, J, tolerance, name):
  length = np.linalg.norm(J, axis=1).max()
  distances = np.linalg.norm(right - update, axis=1)
  assert distances.min() <= tolerance * length, (name, update, right)


# Rows whose lengths lie between 1e-2 and 1e2; PCGrad has too many orders here
# for its reference, and many equal weights say nothing new.
@pytest.mark.parametrize(
  'method',
  methods.params(
    m
    for m in methods.METHODS
    if m.wide_tolerance and not (m.random and m.draws is None)
  ),
)
def test_update_is_right_for_rows_of_very_different_lengths(method):
  size = 40
  rng = np.random.default_rng(size)
  lengths = 10.0 ** rng.uniform(-2, 2, (size, 1))
  J = (lengths * rng.standard_normal((size, 60))).astype(np.float32)
  (update,) = methods.run_all(method, J[None]).updates
  (right,) = method.right(J, methods.LOSSES[:size], range(size))
  tolerance = method.wide_tolerance
  np.testing.assert_allclose(
    update, right, atol=tolerance * np.linalg.norm(right), rtol=tolerance
  )


@pytest.mark.parametrize('method', methods.STEPWISE)
def test_four_updates_in_a_row_are_those_of_the_reference(method):
  size = 3
  memory, states = None, None
  key = methods.initial(method, size).key
  for i in range(4):
    # Gradients that turn and losses that fall, as in training.
    J = methods.matrix(size, 5, seed=i)
    losses = methods.LOSSES[:size] * (0.8**i)
    (update,), _, states = methods.run_all(
      method, J[None], losses=losses, states=states
    )
    right, memory = method.right_step(J, losses, range(size), memory, key=key)
    key = None if states.key is None else states.key[0]
    assert_is_one_of(update, right, J, 2e-5, f'step {i}')


@pytest.mark.parametrize('method', methods.ENUMERATED)
def test_forty_tasks_that_meet_in_pairs_have_one_update(method):
  # Each pair conflicts in two dimensions of its own, so the order is no matter.
  rng = np.random.default_rng(0)
  J = np.zeros((40, 60), np.float32)
  for first in range(0, 40, 2):
    J[first, first : first + 2] = rng.uniform(0.5, 2, 2)
    J[first + 1, first : first + 2] = -J[first, first : first + 2]
    J[first + 1, first] += 1
  (right,) = method.right(J, methods.LOSSES, range(40))
  # Tasks of a pair that do not conflict would simply be added.
  assert np.abs(right * method.scale(1) - J.sum(axis=0)).max() > 0.1
  (update,) = methods.run_all(method, J[None]).updates
  methods.close(update, right, J)


@pytest.mark.parametrize('method', methods.ENUMERATED)
def test_gradient_is_not_projected_on_its_own_task(method):
  # At 0, 150 and 210 degrees. Two projections of the first turn it by 120
  # degrees, so that it conflicts with what it was.
  angles = np.deg2rad([0, 150, 210])
  J = np.zeros((3, 5), np.float32)
  J[:, :2] = np.stack([np.cos(angles), np.sin(angles)], axis=1)
  right = method.right(J, methods.LOSSES[:3], range(3))
  states = None
  for _ in range(30):
    (update,), _, states = methods.run_all(method, J[None], states=states)
    assert np.abs(right - update).max(axis=1).min() <= 1e-5


def test_imtl_g_of_dependent_gradients_shares_the_weight_by_hand():
  # The first and the third point the same way with lengths 1 and 4: their unit
  # vectors share the weight of the one, and 1/2 : 1/2 : 1/8 is w before its
  # sum of 9/8 is divided out.
  J = jnp.array([[0.6, 0.8], [1.6, -1.2], [2.4, 3.2]])
  tx = mtl_jax.imtl_g(num_tasks=3)
  update, state = tx.update(J, tx.init(J[0]))
  np.testing.assert_allclose(state.task_weights, [4 / 9, 4 / 9, 1 / 9], 1e-5)
  gains = J @ update / jnp.linalg.norm(J, axis=1)
  np.testing.assert_allclose(gains, jnp.full(3, gains[0]), rtol=1e-5)
