"""What every method promises: shapes, dtypes, states and composition."""

import jax
import jax.numpy as jnp
import methods
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import quick_compile

import mtl_jax


@pytest.mark.parametrize('method', methods.ALL)
def test_update_has_shape_and_dtype_of_one_task_in_every_leaf(method):
  # A tree of several dtypes, one leaf of scalars and one with nothing in it.
  J = jnp.asarray(methods.CONFLICTING[:2])
  task_grads = {
    'a': {'w': J[:, :2].reshape(2, 2, 1).astype(jnp.bfloat16)},
    'b': J[:, 2].astype(jnp.float16),
    'c': (J[:, 3:], J[:, :0]),
  }
  params = jax.tree.map(lambda g: g[0], task_grads)
  tx = method.make(range(2), num_tasks=2)
  losses = jnp.asarray(methods.LOSSES[:2], jnp.float32)
  updates, _ = tx.update(
    task_grads,
    tx.init(params),
    params,
    losses=losses,
    **method.extras(task_grads),
  )
  assert jax.tree.structure(updates) == jax.tree.structure(params)
  for update, param in zip(
    jax.tree.leaves(updates), jax.tree.leaves(params), strict=True
  ):
    assert (update.shape, update.dtype) == (param.shape, param.dtype)
  if method.weights == 'none' and method.random:
    return  # Each leaf has draws of its own.
  # The same numbers as the matrix of what the leaves hold.
  extras = [
    _columns(s, 2) for s in method.extras(task_grads).get('extra_grads', ())
  ]
  J = _columns(task_grads, 2)
  expected, _ = tx.update(
    jnp.asarray(J), tx.init(J[0]), losses=losses, extra_grads=tuple(extras)
  )
  # The update is rounded once, to 8 bits in bfloat16.
  np.testing.assert_allclose(
    _columns(updates, 1)[0], expected, rtol=2**-8, atol=1e-5
  )


def _columns(tree, rows):
  return np.concatenate(
    [
      np.asarray(leaf, np.float32).reshape(rows, -1)
      for leaf in jax.tree.leaves(tree)
      if leaf.size
    ],
    axis=1,
  )


@pytest.mark.parametrize('method', methods.ALL)
@pytest.mark.parametrize('dtype', ['bfloat16', 'float16', 'float32', 'float64'])
def test_state_keeps_structure_shape_and_dtype(method, dtype):
  with jax.enable_x64(dtype == 'float64'):
    J = jnp.asarray(methods.CONFLICTING, dtype)
    losses = jnp.asarray(methods.LOSSES[:3], dtype)
    for num_tasks in (3, None):
      tx = method.make(range(3), num_tasks=num_tasks)
      state = tx.init(J[0])
      for active in (None, jnp.array([True, False, True])):
        updates, new_state = jax.eval_shape(
          lambda *args, tx=tx, **kwargs: tx.update(*args, **kwargs),
          J,
          state,
          losses=losses,
          active=active,
          **method.extras(J),
        )
        assert (updates.shape, updates.dtype) == ((5,), J.dtype)
        assert methods.structure(new_state) == methods.structure(state)


@pytest.mark.parametrize(
  'method', methods.params(m for m in methods.METHODS if not m.needs_tasks)
)
def test_state_shows_nothing_for_ever_without_num_tasks(method):
  tx = method.make(range(2))
  state = tx.init(jnp.zeros(3))
  losses = jnp.asarray(methods.LOSSES[:2], jnp.float32)
  J = jnp.asarray(methods.GOLDEN_MATRIX, jnp.float32)
  for _ in range(2):
    assert state.task_weights is None
    assert mtl_jax.diagnostics(state) == {}
    assert len(jax.tree.leaves(state)) == (1 if method.random else 0)
    _, state = tx.update(J, state, losses=losses, **method.extras(J))


@pytest.mark.parametrize('method', methods.NEEDS_TASKS)
def test_state_that_holds_something_of_each_task_needs_num_tasks(method):
  tx = method.factory(**method.arguments, **method.golden_per_task or {})
  with pytest.raises(ValueError, match='num_tasks'):
    tx.init(jnp.zeros(3))
  # What wraps it knows the tasks.
  assert tx.for_tasks(2).init(jnp.zeros(3)) is not None


@pytest.mark.parametrize('method', methods.ALL)
def test_state_has_key_only_in_random_methods(method):
  tx = method.make(range(2), num_tasks=2)
  state = tx.init(jnp.zeros(3))
  keys = [
    leaf
    for leaf in jax.tree.leaves(state)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
  ]
  assert len(keys) == (1 if method.random else 0)


@pytest.mark.parametrize('method', methods.ALL)
def test_jit_equals_eager(method):
  tx = methods.compiled(method, range(3)).tx
  jitted, jitted_state = methods.run(method, methods.CONFLICTING)
  eager, eager_state = tx.update(
    jnp.asarray(methods.CONFLICTING),
    tx.init(jnp.zeros(5)),
    losses=jnp.asarray(methods.LOSSES[:3], jnp.float32),
    **method.extras(jnp.asarray(methods.CONFLICTING)),
  )
  # Relative to the update too, which may be some times as long.
  size = np.stack([*methods.CONFLICTING, jitted])
  methods.close(eager, jitted, size, 2e-6)
  eager, jitted = map(mtl_jax.diagnostics, (eager_state, jitted_state))
  assert eager.keys() == jitted.keys()
  for name in eager:
    np.testing.assert_allclose(eager[name], jitted[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('method', methods.ALL)
def test_second_call_does_not_compile_again(method):
  _, state = methods.run(method, methods.CONFLICTING)
  traces = methods.compiled(method, range(3)).traces
  before = len(traces)
  for factor in (1, 2):
    _, state = methods.run(method, factor * methods.CONFLICTING, state=state)
  assert len(traces) == before


@pytest.mark.parametrize('method', methods.WEIGHTED)
@pytest.mark.parametrize('size', [1, 2, 3, 40])
def test_task_weights_reproduce_update(method, size):
  J = methods.matrix(size, 48 if size == 40 else 5, seed=1)
  update, state = methods.run(method, J)
  assert state.task_weights.shape == (size,)
  methods.close(update, np.asarray(state.task_weights) @ J, J, 1e-5)


@pytest.mark.parametrize('method', methods.ALL)
@pytest.mark.parametrize('size', [1, 3])
def test_mean_cosine_is_that_of_the_update_with_the_mean_gradient(method, size):
  J = methods.matrix(size, 5, seed=1)
  update, state = methods.run(method, J)
  mean = J.mean(axis=0)
  cosine = update @ mean / np.linalg.norm(update) / np.linalg.norm(mean)
  np.testing.assert_allclose(
    mtl_jax.diagnostics(state)['mean_cosine'], cosine, atol=1e-5
  )


@pytest.mark.parametrize('method', methods.ALL)
def test_state_can_be_donated_again_and_again(method):
  tx = method.make_golden()
  step = quick_compile.jit(
    lambda g, state, losses: tx.update(
      g, state, losses=losses, **method.extras(g)
    ),
    donate_argnums=1,
    # Nothing reads the weights of the last update; donate them all the same.
    keep_unused=True,
  )
  J = jnp.asarray(methods.GOLDEN_MATRIX, jnp.float32)
  losses = jnp.asarray(methods.GOLDEN_LOSSES, jnp.float32)
  state = tx.init(jnp.zeros(3))
  for i in range(2):
    old = state
    update, state = step(J, state, losses)
    if i == 0:
      methods.close(update, method.golden, J)
    # Donated for real: a state that was copied would not be gone.
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))


@pytest.mark.parametrize('method', methods.RANDOM)
def test_one_typed_key_can_seed_two_states_that_are_both_donated(method):
  key = jax.random.key(7)
  pair = [method.make(range(2), num_tasks=2, seed=key) for _ in range(2)]
  states = [tx.init(jnp.zeros(3)) for tx in pair]
  J = jnp.asarray(methods.GOLDEN_MATRIX, jnp.float32)
  step = quick_compile.jit(
    lambda states: [
      tx.update(J, s, losses=jnp.ones(2), **method.extras(J))
      for tx, s in zip(pair, states, strict=True)
    ],
    donate_argnums=0,
  )
  (_, first), (_, second) = step(states)
  np.testing.assert_array_equal(
    jax.random.key_data(first.key), jax.random.key_data(second.key)
  )
  # The user's key is still the user's.
  assert not key.is_deleted()
  pair[0].init(jnp.zeros(3))


@pytest.mark.parametrize('method', methods.RANDOM)
def test_random_method_is_a_function_of_its_seed(method):
  J = methods.matrix(3, 5, seed=2)

  def first_keys(seed):
    state = method.make(range(3), num_tasks=3, seed=seed).init(J[0])
    draws = []
    for _ in range(12):
      update, state = methods.run(method, methods.CONFLICTING, state=state)
      draws.append(update)
    return np.stack(draws)

  np.testing.assert_array_equal(first_keys(3), first_keys(jax.random.key(3)))
  assert np.abs(first_keys(3) - first_keys(4)).max() > 1e-3


@pytest.mark.parametrize('method', methods.ALL)
def test_chain_applies_the_rest_to_the_aggregated_update(method):
  rest = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(0.1))
  aggregator = method.make(range(2), num_tasks=2)
  tx = optax.chain(aggregator, rest)
  J = jnp.asarray(methods.GOLDEN_MATRIX, jnp.float32)
  losses = jnp.asarray(methods.GOLDEN_LOSSES, jnp.float32)
  params = jnp.ones(3)

  @quick_compile.jit
  def both(J, state, inner_state, rest_state):
    known = {'losses': losses, **method.extras(J)}
    aggregated, inner_state = aggregator.update(J, inner_state, params, **known)
    return (
      tx.update(J, state, params, **known),
      inner_state,
      rest.update(aggregated, rest_state, params),
    )

  state, inner_state, rest_state = (
    part.init(params) for part in (tx, aggregator, rest)
  )
  for factor in (1.0, -0.5):
    (updates, state), inner_state, (expected, rest_state) = both(
      factor * J, state, inner_state, rest_state
    )
    np.testing.assert_allclose(updates, expected, rtol=1e-3, atol=1e-5)


def test_states_survive_a_checkpoint(tmp_path):
  # Random methods go on where they stopped, which takes the same key.
  states = {}
  for method in methods.METHODS:
    _, states[method.name] = methods.run(method, methods.CONFLICTING)
  templates = {
    method.name: methods.compiled(method, range(3)).tx.init(jnp.zeros(5))
    for method in methods.METHODS
  }
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / 'states', states)
    checkpointer.wait_until_finished()
    restored = checkpointer.restore(tmp_path / 'states', templates)
  for method in methods.METHODS:
    before, after = states[method.name], restored[method.name]
    assert methods.structure(after) == methods.structure(before)
    expected, expected_state = methods.run(
      method, methods.CONFLICTING, state=before
    )
    update, state = methods.run(method, methods.CONFLICTING, state=after)
    np.testing.assert_array_equal(update, expected)
    for a, b in zip(
      jax.tree.leaves(state), jax.tree.leaves(expected_state), strict=True
    ):
      assert jnp.array_equal(a, b)
