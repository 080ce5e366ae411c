"""What every method promises: shapes, dtypes, states and composition."""

import functools

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
  extras = method.extras(task_grads)
  columns = [_columns(s, 2) for s in extras.get('extra_grads', ())]
  J = _columns(task_grads, 2)

  @quick_compile.jit
  def both(task_grads, extras, state, J, columns, state_of_columns):
    return (
      tx.update(task_grads, state, params, losses=losses, **extras)[0],
      # The same numbers as the matrix of what the leaves hold.
      tx.update(J, state_of_columns, losses=losses, extra_grads=columns)[0],
    )

  states = tx.init(params), tx.init(J[0])
  updates, expected = both(
    task_grads, extras, states[0], J, tuple(columns), states[1]
  )
  assert jax.tree.structure(updates) == jax.tree.structure(params)
  for update, param in zip(
    jax.tree.leaves(updates), jax.tree.leaves(params), strict=True
  ):
    assert (update.shape, update.dtype) == (param.shape, param.dtype)
  if method.weights == 'none' and method.random:
    return  # Each leaf has draws of its own.
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


def _assert_keeps_structure(method, dtype, num_tasks, active):
  J = jnp.asarray(methods.CONFLICTING, dtype)
  tx = method.make(range(3), num_tasks=num_tasks)
  state = tx.init(J[0])
  updates, new_state = jax.eval_shape(
    lambda *args, **kwargs: tx.update(*args, **kwargs),
    J,
    state,
    losses=jnp.asarray(methods.LOSSES[:3], dtype),
    active=active,
    **method.extras(J),
  )
  assert (updates.shape, updates.dtype) == ((5,), J.dtype)
  assert methods.structure(new_state) == methods.structure(state), dtype


SOME = jnp.array([True, False, True])


@pytest.mark.parametrize('method', methods.ALL)
def test_state_keeps_structure_shape_and_dtype(method):
  for dtype in ('bfloat16', 'float16', 'float32'):
    _assert_keeps_structure(method, dtype, 3, None)
  with jax.enable_x64(True):
    _assert_keeps_structure(method, 'float64', 3, None)
  _assert_keeps_structure(method, 'float32', 3, SOME)
  _assert_keeps_structure(method, 'float32', None, SOME)


# What masks absent tasks, and what holds nothing, is the same for all.
@pytest.mark.parametrize('name', ['linear', 'trimmed_mean', 'moco'])
def test_masks_keep_structure_shape_and_dtype_in_any_dtype(name):
  (method,) = (m for m in methods.METHODS if m.name == name)
  for dtype in ('bfloat16', 'float16', 'float32', 'float64'):
    with jax.enable_x64(dtype == 'float64'):
      for num_tasks in (3, None):
        for active in (None, SOME):
          _assert_keeps_structure(method, dtype, num_tasks, active)


def test_state_shows_nothing_without_num_tasks():
  # And for ever, for the structure is kept.
  for method in methods.METHODS:
    if not method.needs_tasks:
      state = method.make(range(2)).init(jnp.zeros(3))
      assert state.task_weights is None, method.name
      assert mtl_jax.diagnostics(state) == {}, method.name
      leaves = jax.tree.leaves(state)
      assert len(leaves) == (1 if method.random else 0), method.name


@pytest.mark.parametrize('method', methods.NEEDS_TASKS)
def test_state_that_holds_something_of_each_task_needs_num_tasks(method):
  tx = method.factory(**method.arguments, **method.golden_per_task or {})
  with pytest.raises(ValueError, match='num_tasks'):
    tx.init(jnp.zeros(3))
  # What wraps it knows the tasks.
  assert tx.for_tasks(2).init(jnp.zeros(3)) is not None


def test_state_has_key_only_in_random_methods():
  for method in methods.METHODS:
    state = method.make(range(2), num_tasks=2).init(jnp.zeros(3))
    keys = [
      leaf
      for leaf in jax.tree.leaves(state)
      if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    ]
    assert len(keys) == (1 if method.random else 0), method.name


GOLDEN = (
  np.asarray(methods.GOLDEN_MATRIX, np.float32),
  np.asarray(methods.GOLDEN_LOSSES, np.float32),
)
REST = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(0.1))


@functools.cache
def _donating(method):
  """Two jitted updates in a chain, each with its state donated.

  Returns:
    of each step the update, what the new state shows, and whether each leaf of
    the old state is gone.
  """
  aggregator = method.make_golden()
  tx = optax.chain(aggregator, REST)
  J, losses = GOLDEN
  params = jnp.ones(3)

  # Nothing reads the weights of the last update; donate them all the same.
  @functools.partial(quick_compile.jit, donate_argnums=1, keep_unused=True)
  def step(g, state, losses):
    updates, state = tx.update(
      g, state, params, losses=losses, **method.extras(g)
    )
    return updates, state, mtl_jax.diagnostics(state)

  state, found = tx.init(params), []
  for factor in (1.0, -0.5):
    old = state
    updates, state, shown = step(np.float32(factor) * J, state, losses)
    gone = [leaf.is_deleted() for leaf in jax.tree.leaves(old)]
    found.append((np.asarray(updates), shown, gone))
  return found


@pytest.mark.parametrize('method', methods.ALL)
def test_jit_equals_eager(method):
  _, state = methods.eager_golden(method)
  # The updates are compared with the rest applied to them, below.
  (_, jitted, _), _ = _donating(method)
  eager = mtl_jax.diagnostics(state)
  assert eager.keys() == jitted.keys()
  for name in eager:
    np.testing.assert_allclose(eager[name], jitted[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('method', methods.ALL)
def test_chain_applies_the_rest_to_the_update_and_donates_its_state(method):
  update, _ = methods.eager_golden(method)
  params = jnp.ones(3)
  expected, _ = REST.update(update, REST.init(params), params)
  (found, _, gone), (_, _, gone_again) = _donating(method)
  np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)
  # Donated for real: a state that was copied would not be gone.
  assert all(gone + gone_again)


@pytest.mark.parametrize('name', ['mgda', 'pcgrad', 'moco', 'linear'])
def test_chain_hands_each_its_own_state(name):
  (method,) = (m for m in methods.METHODS if m.name == name)
  aggregator = method.make_golden()
  J, losses = GOLDEN
  params = jnp.ones(3)
  state, rest_state = aggregator.init(params), REST.init(params)
  update = quick_compile.jit(aggregator.update)
  for factor, (found, _, _) in zip((1.0, -0.5), _donating(method), strict=True):
    aggregated, state = update(np.float32(factor) * J, state, losses=losses)
    expected, rest_state = REST.update(aggregated, rest_state, params)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize('method', methods.ALL)
def test_second_call_does_not_compile_again(method):
  stacks = methods.CONFLICTING[None]
  _, _, states = methods.run_all(method, stacks)
  traces = methods.compiled_batch(method, range(3)).traces
  before = len(traces)
  for factor in (1, 2):
    _, _, states = methods.run_all(method, factor * stacks, states=states)
  assert len(traces) == before


@pytest.mark.parametrize('method', methods.WEIGHTED)
def test_task_weights_reproduce_update(method):
  for size in (1, 2, 3, 40):
    J = methods.matrix(size, methods.dimensions(size), seed=1)
    found = methods.run_all(method, J[None])
    (weights,) = found.shown['task_weights']
    assert weights.shape == (size,)
    methods.close(found.updates[0], weights @ J, J, what=size)


@pytest.mark.parametrize('method', methods.ALL)
def test_mean_cosine_is_that_of_the_update_with_the_mean_gradient(method):
  for size in (1, 3):
    J = methods.matrix(size, 5, seed=1)
    found = methods.run_all(method, J[None])
    (update,) = found.updates
    mean = J.mean(axis=0)
    cosine = update @ mean / np.linalg.norm(update) / np.linalg.norm(mean)
    np.testing.assert_allclose(
      found.shown['mean_cosine'], [cosine], atol=1e-5, err_msg=f'{size} tasks'
    )


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
  seeds = (3, jax.random.key(3), 4)
  states = [
    method.make(range(3), num_tasks=3, seed=seed).init(jnp.zeros(5))
    for seed in seeds
  ]
  states = methods.stack(states)
  draws = []
  for _ in range(12):
    updates, _, states = methods.run_all(
      method, [methods.CONFLICTING] * len(seeds), states=states
    )
    draws.append(updates)
  number, key, other = np.swapaxes(draws, 0, 1)
  np.testing.assert_array_equal(number, key)
  assert np.abs(number - other).max() > 1e-3


def test_states_survive_a_checkpoint(tmp_path):
  # Random methods go on where they stopped, which takes the same key.
  J = methods.CONFLICTING[None]
  # A checkpoint sees the structure of a state alone: one method of each.
  structures = {
    str(methods.structure(methods.initial(m, 3))): m for m in methods.METHODS
  }
  some = structures.values()
  assert any(m.random for m in some)
  states = {m.name: methods.run_all(m, J).states for m in some}
  templates = {m.name: methods.stack([methods.initial(m, 3)]) for m in some}
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / 'states', states)
    checkpointer.wait_until_finished()
    restored = checkpointer.restore(tmp_path / 'states', templates)
  for method in some:
    before, after = states[method.name], restored[method.name]
    assert methods.structure(after) == methods.structure(before)
    expected, found = (
      methods.run_all(method, J, states=state) for state in (before, after)
    )
    np.testing.assert_array_equal(found.updates, expected.updates)
    jax.tree.map(
      lambda a, b: np.testing.assert_array_equal(_raw(a), _raw(b)),
      found.states,
      expected.states,
    )


def _raw(x):
  is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
  return jax.random.key_data(x) if is_key else x
