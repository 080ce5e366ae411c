"""A raw key as seed keeps the state plain, and draws what a typed one does."""

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtl_jax

METHODS = {
  'pcgrad': mtl_jax.pcgrad,
  'gradvac': mtl_jax.gradvac,
  'graddrop': mtl_jax.graddrop,
  'random_weights': mtl_jax.random_weights,
  'rlw': lambda seed, num_tasks: mtl_jax.weighted(
    mtl_jax.rlw('random_normal', seed=seed), num_tasks=num_tasks
  ),
  'per_group': lambda seed, num_tasks: mtl_jax.per_group(
    mtl_jax.random_weights(seed=seed, num_tasks=num_tasks), 'leaf'
  ),
  'flat_minima': lambda seed, num_tasks: mtl_jax.flat_minima(
    mtl_jax.random_weights(seed=seed), ('a', 'b', 'c')[:num_tasks]
  ),
  'from_gram': lambda seed, num_tasks: mtl_jax.from_gram(
    lambda gram, *, losses, active, key: jax.random.normal(key, (3,)),
    seed=seed,
    num_tasks=num_tasks,
  ),
}
PARAMS = {'v': jnp.zeros(2), 'w': jnp.zeros(3)}
ROWS = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
GRADS = {'v': jnp.asarray(ROWS[:, :2]), 'w': jnp.asarray(ROWS[:, 2:])}


def _update(tx, state):
  return tx.update(
    GRADS,
    state,
    PARAMS,
    losses=jnp.arange(1.0, 4.0),
    grad_fn=lambda own: jax.tree.map(lambda g, p: 2 * g + p, GRADS, own),
  )


@pytest.mark.parametrize('make', METHODS.values(), ids=METHODS)
def test_a_raw_key_draws_what_a_typed_one_does_and_can_be_saved(make):
  raw = make(seed=jax.random.PRNGKey(7), num_tasks=3)
  typed = make(seed=jax.random.key(7), num_tasks=3)
  expected, typed_state = _update(typed, typed.init(PARAMS))
  expected_next, _ = _update(typed, typed_state)

  found, state = _update(raw, raw.init(PARAMS))
  jax.tree.map(np.testing.assert_array_equal, found, expected)
  arrays = jax.tree.map(np.asarray, state)
  restored = flax.serialization.from_bytes(
    raw.init(PARAMS), flax.serialization.to_bytes(arrays)
  )
  found_next, _ = _update(raw, restored)
  jax.tree.map(np.testing.assert_array_equal, found_next, expected_next)
  # The seed stays the caller's, whoever donates the state.
  jax.tree.map(lambda x: x.delete(), raw.init(PARAMS))
  _update(raw, raw.init(PARAMS))


@pytest.mark.parametrize(
  'seed',
  [0.5, 'seed', np.zeros(2, np.int32), np.zeros(3, np.uint32)],
)
def test_a_seed_that_is_no_key_is_refused_by_name(seed):
  with pytest.raises(TypeError, match='seed must be an int, a typed key'):
    mtl_jax.pcgrad(seed=seed)
