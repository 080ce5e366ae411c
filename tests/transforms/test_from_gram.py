"""A user's own map from the Gram matrix to weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtl_jax

GRADS = {
  'w': jnp.array([[1.0, 2.0], [3.0, -1.0], [0.0, 5.0]]),
  'b': jnp.array([1.0, 0.0, -2.0]),
}
PARAMS = {'w': jnp.zeros(2), 'b': jnp.zeros(())}


def _run(tx, **extra):
  return tx.update(GRADS, tx.init(PARAMS), PARAMS, **extra)


def test_map_is_given_gram_matrix_losses_and_active():
  seen = {}

  def weights(gram, *, losses, active):
    seen.update(gram=gram, losses=losses, active=active)
    return jnp.ones(3)

  losses = jnp.array([1.0, jnp.nan, 3.0])
  _run(
    mtl_jax.from_gram(weights),
    losses=losses,
    active=jnp.array([True, False, True]),
  )
  J = np.array([[1, 2, 1], [0, 0, 0], [0, 5, -2]], float)
  np.testing.assert_allclose(seen['gram'], J @ J.T)
  np.testing.assert_allclose(seen['losses'][jnp.array([0, 2])], [1, 3])
  assert np.isfinite(seen['losses']).all()
  assert seen['active'].tolist() == [True, False, True]


def test_update_is_the_weighted_sum_without_absent_tasks():
  tx = mtl_jax.from_gram(
    lambda gram, *, losses, active: jnp.array([2.0, jnp.nan, -1.0]),
    num_tasks=3,
  )
  updates, state = _run(tx, active=jnp.array([True, False, True]))
  np.testing.assert_allclose(updates['w'], [2.0, -1.0])
  np.testing.assert_allclose(updates['b'], 4.0)
  np.testing.assert_allclose(state.task_weights, [2, 0, -1])


def test_residual_of_a_solution_is_kept():
  def weights(gram, *, losses, active):
    return mtl_jax.Solution(jnp.ones(3), jnp.float32(0.25))

  tx = mtl_jax.from_gram(weights, num_tasks=3)
  assert tx.init(PARAMS).residual.shape == ()
  _, state = _run(tx)
  assert float(state.residual) == 0.25


def test_seed_gives_a_new_key_at_every_update():
  def weights(gram, *, losses, active, key):
    return jax.random.uniform(key, (3,))

  tx = mtl_jax.from_gram(weights, num_tasks=3, seed=3)
  _, first = _run(tx)
  _, second = tx.update(GRADS, first, PARAMS)
  assert np.abs(first.task_weights - second.task_weights).max() > 1e-3


def test_weights_of_another_shape_are_refused():
  tx = mtl_jax.from_gram(lambda gram, *, losses, active: jnp.ones(2))
  with pytest.raises(ValueError, match=r'weights \[3\], got shape \(2,\)'):
    _run(tx)


@pytest.mark.parametrize('num_tasks', [0, -2])
def test_number_of_tasks_must_be_positive(num_tasks):
  with pytest.raises(ValueError, match=f'num_tasks.*{num_tasks}'):
    mtl_jax.from_gram(lambda gram, **_: gram[0], num_tasks=num_tasks)


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
def test_inner_products_and_sums_of_short_floats_are_made_in_float32(dtype):
  # Adding ones in bfloat16 ends at 256 and in float16 at 2048; a small square
  # vanishes in float16.
  ones = jnp.stack([jnp.ones(4096), jnp.full(4096, 1e-4)]).astype(dtype)
  tx = mtl_jax.from_gram(
    lambda gram, *, losses, active: jnp.array([1.0, 1e4]), num_tasks=2
  )
  update, state = tx.update(ones, tx.init(ones[0]))
  small = float(ones[1, 0])
  np.testing.assert_allclose(
    state.gram,
    4096 * np.array([[1, small], [small, small**2]]),
    rtol=1e-4,
  )
  assert (update.dtype, state.gram.dtype) == (dtype, jnp.float32)
  np.testing.assert_allclose(
    update.astype(jnp.float32), 1 + 1e4 * small, rtol=2**-8
  )
