"""What every method promises: one matrix of methods and properties."""

import jax
import jax.numpy as jnp
import methods
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import mtl_jax

ALL = [pytest.param(m, id=m.name) for m in methods.METHODS]
DETERMINISTIC = [
  pytest.param(m, id=m.name) for m in methods.METHODS if not m.random
]
RANDOM = [pytest.param(m, id=m.name) for m in methods.METHODS if m.random]
NEEDS_LOSSES = [
  pytest.param(m, id=m.name) for m in methods.METHODS if m.needs_losses
]

# Three tasks of which each conflicts with the others, so that nothing a method
# does is left out.
CONFLICTING = np.array(
  [
    [2.0, -0.5, -0.4, 0.3, 0.1],
    [-0.6, 1.0, -0.5, 0.2, -0.3],
    [-0.5, -0.3, 0.7, -0.4, 0.2],
  ],
  np.float32,
)
NAN, INF = float('nan'), float('inf')


def close(actual, expected, J, tolerance=1e-5):
  """Equal up to rounding that is relative to the longest gradient."""
  size = np.linalg.norm(np.asarray(J, np.float64), axis=1).max()
  np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * size)


def structure(state):
  """What must not change from one update to the next."""
  shapes = jax.tree.map(jax.typeof, state)
  return jax.tree.structure(shapes), [
    (x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(shapes)
  ]


@pytest.mark.parametrize('method', ALL)
def test_update_has_shape_and_dtype_of_one_task_in_every_leaf(method):
  # A tree of several dtypes, one leaf of scalars and one with nothing in it.
  J = jnp.asarray(CONFLICTING[:2])
  task_grads = {
    'a': {'w': J[:, :2].reshape(2, 2, 1).astype(jnp.bfloat16)},
    'b': J[:, 2].astype(jnp.float16),
    'c': (J[:, 3:], J[:, :0]),
  }
  params = jax.tree.map(lambda g: g[0], task_grads)
  tx = method.make(range(2), num_tasks=2)
  losses = jnp.asarray(methods.LOSSES[:2], jnp.float32)
  updates, _ = tx.update(task_grads, tx.init(params), params, losses=losses)
  assert jax.tree.structure(updates) == jax.tree.structure(params)
  for update, param in zip(
    jax.tree.leaves(updates), jax.tree.leaves(params), strict=True
  ):
    assert (update.shape, update.dtype) == (param.shape, param.dtype)
  # The same numbers as the matrix of what the leaves hold.
  expected, _ = methods.run(method, _columns(task_grads, 2))
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


@pytest.mark.parametrize('method', ALL)
@pytest.mark.parametrize('dtype', ['bfloat16', 'float16', 'float32', 'float64'])
def test_state_keeps_structure_shape_and_dtype(method, dtype):
  with jax.enable_x64(dtype == 'float64'):
    J = jnp.asarray(CONFLICTING, dtype)
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
        )
        assert (updates.shape, updates.dtype) == ((5,), J.dtype)
        assert structure(new_state) == structure(state)


@pytest.mark.parametrize('method', ALL)
def test_state_shows_nothing_for_ever_without_num_tasks(method):
  tx = method.make(range(2))
  state = tx.init(jnp.zeros(3))
  losses = jnp.asarray(methods.LOSSES[:2], jnp.float32)
  for _ in range(2):
    assert state.task_weights is None
    assert mtl_jax.diagnostics(state) == {}
    assert len(jax.tree.leaves(state)) == (1 if method.random else 0)
    _, state = tx.update(
      jnp.asarray(methods.GOLDEN_MATRIX, jnp.float32), state, losses=losses
    )


@pytest.mark.parametrize('method', ALL)
def test_state_has_key_only_in_random_methods(method):
  tx = method.make(range(2), num_tasks=2)
  state = tx.init(jnp.zeros(3))
  keys = [
    leaf
    for leaf in jax.tree.leaves(state)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
  ]
  assert len(keys) == (1 if method.random else 0)


@pytest.mark.parametrize('method', ALL)
def test_single_task_is_its_gradient_at_the_scale_of_the_method(method):
  g = CONFLICTING[:1]
  update, state = methods.run(method, g)
  close(update, method.scale(1) * g[0], g, 1e-6)
  np.testing.assert_allclose(state.task_weights, [method.scale(1)], rtol=1e-6)


@pytest.mark.parametrize('method', ALL)
@pytest.mark.parametrize('size', [2, 3, 40])
def test_identical_tasks_are_one_gradient_at_the_scale_of_the_method(
  method, size
):
  g = methods.matrix(1, 48 if size == 40 else 5)
  # The mean loss of equal tasks too: normalised gradients stay identical.
  update, _ = methods.run(
    method, np.repeat(g, size, axis=0), losses=np.full(size, 2.0)
  )
  close(update, method.scale(size) * g[0], method.scale(size) * g)


@pytest.mark.parametrize('method', ALL)
def test_jit_equals_eager(method):
  tx = methods.compiled(method, range(3)).tx
  jitted, jitted_state = methods.run(method, CONFLICTING)
  eager, eager_state = tx.update(
    jnp.asarray(CONFLICTING),
    tx.init(jnp.zeros(5)),
    losses=jnp.asarray(methods.LOSSES[:3], jnp.float32),
  )
  close(eager, jitted, CONFLICTING, 1e-6)
  np.testing.assert_allclose(
    eager_state.task_weights, jitted_state.task_weights, atol=1e-5
  )


@pytest.mark.parametrize('method', ALL)
def test_second_call_does_not_compile_again(method):
  _, state = methods.run(method, CONFLICTING)
  traces = methods.compiled(method, range(3)).traces
  before = len(traces)
  for factor in (1, 2):
    _, state = methods.run(method, factor * CONFLICTING, state=state)
  assert len(traces) == before


@pytest.mark.parametrize('method', ALL)
@pytest.mark.parametrize('size', [1, 2, 3, 40])
def test_task_weights_reproduce_update(method, size):
  J = methods.matrix(size, 48 if size == 40 else 5, seed=1)
  update, state = methods.run(method, J)
  assert state.task_weights.shape == (size,)
  close(update, np.asarray(state.task_weights) @ J, J, 1e-5)


@pytest.mark.parametrize('method', ALL)
def test_state_can_be_donated_again_and_again(method):
  tx, _, _ = methods.compiled(method, range(2))
  step = jax.jit(
    lambda g, state, losses: tx.update(g, state, losses=losses),
    donate_argnums=1,
    # Nothing reads the weights of the last update; donate them all the same.
    keep_unused=True,
  )
  J = jnp.asarray(methods.GOLDEN_MATRIX, jnp.float32)
  losses = jnp.asarray(methods.GOLDEN_LOSSES, jnp.float32)
  state = tx.init(jnp.zeros(3))
  for _ in range(2):
    old = state
    update, state = step(J, state, losses)
    # Donated for real: a state that was copied would not be gone.
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
  close(update, method.golden, J)


@pytest.mark.parametrize('method', RANDOM)
def test_one_typed_key_can_seed_two_states_that_are_both_donated(method):
  key = jax.random.key(7)
  pair = [method.make(range(2), num_tasks=2, seed=key) for _ in range(2)]
  states = [tx.init(jnp.zeros(3)) for tx in pair]
  J = jnp.asarray(methods.GOLDEN_MATRIX, jnp.float32)
  step = jax.jit(
    lambda states: [
      tx.update(J, s) for tx, s in zip(pair, states, strict=True)
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


@pytest.mark.parametrize('method', RANDOM)
def test_random_method_is_a_function_of_its_seed(method):
  J = methods.matrix(3, 5, seed=2)

  def first_keys(seed):
    state = method.make(range(3), num_tasks=3, seed=seed).init(J[0])
    draws = []
    for _ in range(12):
      update, state = methods.run(method, CONFLICTING, state=state)
      draws.append(update)
    return np.stack(draws)

  np.testing.assert_array_equal(first_keys(3), first_keys(jax.random.key(3)))
  assert np.abs(first_keys(3) - first_keys(4)).max() > 1e-3


@pytest.mark.parametrize('method', ALL)
def test_chain_applies_the_rest_to_the_aggregated_update(method):
  rest = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(0.1))
  tx = optax.chain(method.make(range(2), num_tasks=2), rest)
  J = jnp.asarray(methods.GOLDEN_MATRIX, jnp.float32)
  losses = jnp.asarray(methods.GOLDEN_LOSSES, jnp.float32)
  params = jnp.ones(3)
  state = tx.init(params)
  expected_state = rest.init(params)
  for factor in (1.0, -0.5):
    updates, state = tx.update(factor * J, state, params, losses=losses)
    aggregated, _ = methods.run(
      method, factor * J, losses=methods.GOLDEN_LOSSES
    )
    expected, expected_state = rest.update(
      jnp.asarray(aggregated), expected_state, params
    )
    np.testing.assert_allclose(updates, expected, rtol=1e-3, atol=1e-5)


HARD = {
  'one row zero': [[1, 2, 0, 0, 1], [0, 0, 0, 0, 0], [-2, 1, 1, 0, 0]],
  'two rows zero': [[0, 0, 0, 0, 0], [3, 0, 0, 1, 0], [0, 0, 0, 0, 0]],
  'opposed': [[1, 2, 3, 4, 5], [-1, -2, -3, -4, -5], [1, 0, 0, 0, 0]],
  'opposed, unlike lengths': [
    [1e-3, 0, 0, 0, 0],
    [-1e3, 0, 0, 0, 0],
    [0, 1, 0, 0, 0],
  ],
  'duplicates': [[1, -2, 3, 0, 1], [1, -2, 3, 0, 1], [-1, 1, 1, 1, 1]],
  'one line': [[1, 2, 3, 4, 5], [2, 4, 6, 8, 10], [-3, -6, -9, -12, -15]],
  'one plane': [[1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [1, 1, 0, 0, 0]],
  'cancelling': [[1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [-1, -1, 0, 0, 0]],
  'zero within': [[1, 0, 0, 0, 0], [-1, 1, 0, 0, 0], [-1, -3, 0, 0, 0]],
  'lengths 1e-10 to 1e15': [
    [1e-10, -1e-10, 0, 0, 0],
    [-1, 1, 1, 0, 0],
    [1e15, 0, -1e15, 1e15, 0],
  ],
  'opposed, 1e15': [
    [1e15, 1e15, 0, 0, 0],
    [-1e15, -1e15, 1e8, 0, 0],
    [1e15, -1e15, 0, 0, 0],
  ],
}


@pytest.mark.parametrize('method', ALL)
@pytest.mark.parametrize('hard', HARD)
@pytest.mark.parametrize('size', [2, 3])
def test_update_is_never_nan_nor_far_out(method, hard, size):
  J = np.asarray(HARD[hard], np.float32)[:size]
  update, state = methods.run(method, J)
  assert all(np.all(np.isfinite(x)) for x in state[:2])
  # Three tasks, none of them more than a few times over. IMTL-G's weights may
  # be larger where tasks cancel; even they do not pass this.
  assert np.linalg.norm(update) <= 100 * np.linalg.norm(J, axis=1).max()


@pytest.mark.parametrize('method', ALL)
@pytest.mark.parametrize('size', [1, 2, 3, 40])
def test_zero_gradients_give_a_zero_update(method, size):
  zeros = np.zeros((size, 48 if size == 40 else 5), np.float32)
  update, state = methods.run(method, zeros)
  np.testing.assert_array_equal(update, 0)
  assert np.all(np.isfinite(state.task_weights))


@pytest.mark.parametrize('method', ALL)
@pytest.mark.parametrize('factor', [1e-10, 1e-3, 7, 1e4, 1e15])
@pytest.mark.parametrize('size', [2, 3])
def test_update_is_homogeneous_of_degree_one(method, factor, size):
  # The same state, so that a random method draws the same.
  J = CONFLICTING[:size]
  update, _ = methods.run(method, J)
  scaled, _ = methods.run(method, np.float32(factor) * J)
  close(scaled / np.float64(factor), update, J)


@pytest.mark.parametrize('method', DETERMINISTIC)
@pytest.mark.parametrize('order', [(1, 0, 2), (1, 2, 0), (2, 1, 0)])
def test_order_of_tasks_does_not_matter(method, order):
  J = CONFLICTING[list(order)]
  update, state = methods.run(method, J, tasks=order)
  expected, expected_state = methods.run(method, CONFLICTING)
  close(update, expected, J)
  np.testing.assert_allclose(
    state.task_weights, expected_state.task_weights[np.array(order)], atol=1e-4
  )


ABSENT = [(1,), (0,), (0, 1), (1, 2)]


@pytest.mark.parametrize('method', ALL)
@pytest.mark.parametrize('absent', ABSENT, ids=str)
def test_absent_task_is_as_if_it_were_not_there(method, absent):
  present = [i for i in range(3) if i not in absent]
  active = np.isin(np.arange(3), present)
  losses = np.asarray(methods.LOSSES[:3], np.float32)
  expected, expected_state = methods.run(
    method, CONFLICTING[present], losses=losses[present], tasks=present
  )
  for row, loss in [(0, 1), (1e30, 0), (NAN, NAN), (INF, -1), (-INF, INF)]:
    J = np.where(active[:, None], CONFLICTING, np.float32(row))
    update, state = methods.run(
      method, J, losses=np.where(active, losses, loss), active=active
    )
    close(update, expected, CONFLICTING)
    weights = np.asarray(state.task_weights)
    np.testing.assert_array_equal(weights[list(absent)], 0)
    np.testing.assert_allclose(
      weights[present], expected_state.task_weights, atol=1e-5
    )
    assert all(
      np.all(np.isfinite(x)) for x in mtl_jax.diagnostics(state).values()
    )


@pytest.mark.parametrize('method', ALL)
def test_all_active_is_the_default(method):
  update, _ = methods.run(method, CONFLICTING, active=[True, True, True])
  expected, _ = methods.run(method, CONFLICTING)
  close(update, expected, CONFLICTING, 1e-6)


@pytest.mark.parametrize('method', ALL)
@pytest.mark.parametrize('size', [1, 3])
def test_no_active_task_means_zero_update(method, size):
  update, state = methods.run(
    method,
    np.full((size, 5), NAN, np.float32),
    losses=np.full(size, NAN),
    active=np.zeros(size, bool),
  )
  np.testing.assert_array_equal(update, 0)
  np.testing.assert_array_equal(state.task_weights, 0)
  assert all(
    np.all(np.isfinite(x)) for x in mtl_jax.diagnostics(state).values()
  )


@pytest.mark.parametrize('method', RANDOM)
@pytest.mark.parametrize('active', [None, (True, True, False, True)], ids=str)
def test_outcomes_of_random_method_come_as_often_as_they_should(method, active):
  J = CONFLICTING
  if active is not None:
    J = np.insert(CONFLICTING, 2, NAN, axis=0)
    active = jnp.array(active)
  tx = method.make(range(len(J)))

  @jax.jit
  def outcomes(state, J):
    # One state all along: every update has to draw anew.
    step = lambda state, _: tx.update(J, state, active=active)[::-1]
    return jax.lax.scan(step, state, None, length=2000)[1]

  drawn = np.asarray(outcomes(tx.init(J[0]), J))
  right = method.right(CONFLICTING, methods.LOSSES[:3], range(3))
  distances = np.abs(drawn[:, None] - right[None]).max(axis=2)
  assert distances.min(axis=1).max() < 1e-5
  # Equal outcomes of different draws count together.
  same = np.abs(right[:, None] - right[None]).max(axis=2) < 1e-4
  expected = same.mean(axis=1)
  assert len(np.unique(np.argmax(same, axis=1))) > 4
  seen = (distances < 1e-4).mean(axis=0)
  # Five standard deviations of a share near 1/8 among 2000.
  np.testing.assert_allclose(seen, expected, atol=0.04)


def _update(method, task_grads, params=None, num_tasks=None, **extra_args):
  """Traces an update: shapes are checked before anything is computed."""
  tx = method.make(range(2), num_tasks=num_tasks)
  like = jnp.zeros(3) if params is None else params
  extra_args.setdefault('losses', jnp.ones(2))
  return jax.eval_shape(
    lambda g: tx.update(g, tx.init(like), params, **extra_args), task_grads
  )


@pytest.mark.parametrize('method', ALL)
@pytest.mark.parametrize(
  ('task_grads', 'params', 'num_tasks', 'message'),
  [
    (jnp.zeros(()), None, None, 'the root is a scalar'),
    ({'w': jnp.zeros((2, 3)), 'b': jnp.zeros(())}, None, None, r"\['b'\]"),
    (jnp.zeros(3), jnp.zeros(3), None, r'\(3,\), expected \(3, 3\)'),
    (jnp.zeros((2, 3)), jnp.zeros((2, 3)), None, r'expected \(2, 2, 3\)'),
    (jnp.zeros((2, 1)), jnp.zeros(3), None, r'\(2, 1\), expected \(2, 3\)'),
    ([jnp.zeros((2, 3)), jnp.zeros((3, 3))], None, None, r'\[1\].*\(3, 3\)'),
    (jnp.zeros((3, 3)), None, 2, 'with 2 tasks'),
    ({'w': jnp.zeros((2, 3))}, {'v': jnp.zeros(3)}, None, 'structure'),
    ({'w': jnp.zeros((2, 3))}, jnp.zeros(3), None, 'structure'),
    ({}, None, None, 'no leaf'),
  ],
  ids=[
    'scalar',
    'one scalar',
    'no task axis',
    'no task axis, matrix',
    'broadcastable',
    'two numbers of tasks',
    'another number of tasks',
    'other names',
    'other structure',
    'empty',
  ],
)
def test_wrong_shapes_raise(method, task_grads, params, num_tasks, message):
  with pytest.raises(ValueError, match=message):
    _update(method, task_grads, params, num_tasks)


@pytest.mark.parametrize('method', ALL)
@pytest.mark.parametrize('argument', ['losses', 'active'])
def test_losses_and_active_must_have_one_entry_a_task(method, argument):
  for value in (jnp.ones(()), jnp.ones(1), jnp.ones(3), jnp.ones((2, 1))):
    with pytest.raises(ValueError, match=rf'{argument} must have shape \(2,\)'):
      _update(method, jnp.zeros((2, 3)), **{argument: value})


@pytest.mark.parametrize('method', ALL)
def test_unknown_extra_arguments_are_swallowed(method):
  update, _ = _update(
    method, jnp.zeros((2, 3)), value=1.0, grad_fn=lambda x: x, extra_grads=()
  )
  assert update.shape == (3,)


@pytest.mark.parametrize('method', ALL)
def test_losses_are_optional_unless_needed(method):
  if not method.needs_losses:
    assert _update(method, jnp.zeros((2, 3)), losses=None)[0].shape == (3,)
    return
  with pytest.raises(ValueError, match='losses'):
    _update(method, jnp.zeros((2, 3)), losses=None)


@pytest.mark.parametrize('method', NEEDS_LOSSES)
@pytest.mark.parametrize('size', [2, 3])
def test_any_loss_of_a_present_task_leaves_the_update_finite(method, size):
  for loss in (0.0, 1e-20, 1e-38, 1e20, -3.0):
    losses = np.array([1.0, loss, 2.0])[:size]
    update, state = methods.run(method, CONFLICTING[:size], losses=losses)
    assert np.all(np.isfinite(update)), loss
    assert np.all(np.isfinite(state.task_weights)), loss


WRONG = [
  pytest.param(m, argument, value, id=f'{m.name}-{argument}={value}')
  for m in methods.METHODS
  for argument, value in (
    ('num_tasks', 0),
    ('num_tasks', -1),
    ('reduce', 'max'),
    *m.wrong,
  )
]


@pytest.mark.parametrize(('method', 'argument', 'value'), WRONG)
def test_factory_names_argument_and_value_it_refuses(method, argument, value):
  with pytest.raises((ValueError, TypeError)) as error:
    method.factory(**{**method.arguments, argument: value})
  message = str(error.value)
  assert argument in message
  assert repr(value) in message or str(value) in message


@pytest.mark.parametrize('method', ALL)
def test_replicas_and_shards_must_be_different_axes(method):
  with pytest.raises(ValueError, match=r"axis_name and shard_axis.*'i'"):
    method.factory(axis_name='i', shard_axis='i')


def test_states_survive_a_checkpoint(tmp_path):
  # Random methods go on where they stopped, which takes the same key.
  states = {}
  for method in methods.METHODS:
    _, states[method.name] = methods.run(method, CONFLICTING)
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
    assert structure(after) == structure(before)
    expected, expected_state = methods.run(method, CONFLICTING, state=before)
    update, state = methods.run(method, CONFLICTING, state=after)
    np.testing.assert_array_equal(update, expected)
    for a, b in zip(
      jax.tree.leaves(state), jax.tree.leaves(expected_state), strict=True
    ):
      assert jnp.array_equal(a, b)
