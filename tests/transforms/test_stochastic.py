"""Facts of stochastic and stateful methods that no shared matrix holds."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import method_row
import methods
import numpy as np
import pytest
import references
import references_stochastic
import rows_stochastic

import mtl_jax

ROWS = methods.params(rows_stochastic.METHODS)
NEED_BATCHES = methods.params(
  m for m in rows_stochastic.METHODS if m.extra_batches
)


def history(method, size=3, updates=2):
  """The state of a method after updates in which all tasks took part."""
  state = None
  for i in range(updates):
    J = methods.matrix(size, 5, seed=10 + i)
    losses = methods.LOSSES[:size] * 0.9**i
    _, state = methods.run(method, J, losses=losses, state=state)
  return state


def rows(memory, size):
  """The leaves of a memory that hold something of each task."""
  leaves = jax.tree_util.tree_leaves_with_path(memory)
  return {
    jax.tree_util.keystr(path): np.asarray(leaf)
    for path, leaf in leaves
    if leaf.shape[:1] == (size,) and '.inner' not in jax.tree_util.keystr(path)
  }


@pytest.mark.parametrize('method', ROWS)
def test_memory_of_an_absent_task_stays_exactly(method):
  state = history(method)
  J = np.where([[True], [False], [True]], methods.CONFLICTING, np.nan)
  losses = np.array([1.0, np.nan, 2.0])
  _, new = methods.run(
    method, J, losses=losses, active=[True, False, True], state=state
  )
  before, after = rows(state.memory, 3), rows(new.memory, 3)
  assert before
  for name in before:
    np.testing.assert_array_equal(after[name][1], before[name][1])
    assert np.all(np.isfinite(after[name]))


# Of what the methods remember: the weights on the simplex.
SIMPLEX = {
  'sdmgrad': lambda memory: memory,
  'sdmgrad_single': lambda memory: memory,
  'modo': lambda memory: memory,
  'moco': lambda memory: memory.weights,
  'cr_mogm': lambda memory: memory.weights,
  'gradnorm': lambda memory: memory.shares,
  'excess_mtl': lambda memory: jnp.exp(memory.log_weights),
}


@pytest.mark.parametrize(
  'method',
  methods.params(m for m in rows_stochastic.METHODS if m.name in SIMPLEX),
)
def test_remembered_weights_keep_their_sum_whoever_is_absent(method):
  weights = SIMPLEX[method.name]
  state = history(method)
  for active in ([1, 0, 1], [0, 1, 0], [1, 1, 1], [1, 1, 0]):
    _, state = methods.run(
      method, methods.CONFLICTING, active=np.array(active, bool), state=state
    )
    np.testing.assert_allclose(np.sum(weights(state.memory)), 1, rtol=1e-6)


# What of a reference's memory belongs to the first and the third task, when
# weights of those two are to have the sum 1.
def _part(w):
  return w[[0, 2]] / w[[0, 2]].sum()


PARTS = {
  'sdmgrad': _part,
  'sdmgrad_single': _part,
  'modo': _part,
  'moco': lambda m: (m[0], _part(m[1]), m[2][[0, 2]]),
  'cr_mogm': _part,
  'db_mtl': lambda m: (m[0], m[1][[0, 2]]),
  'gradnorm': lambda m: (2 * _part(m[0]), m[1][[0, 2]]),
  'excess_mtl': lambda m: (
    [f[[0, 2]] for f in m[0]],
    m[1][[0, 2]],
    _part(m[2]),
  ),
}


@pytest.mark.parametrize(
  'method',
  methods.params(m for m in rows_stochastic.METHODS if m.name in PARTS),
)
def test_tasks_that_are_left_go_on_as_if_they_had_been_alone(method):
  memory = None
  for i in range(2):
    J = methods.matrix(3, 5, seed=10 + i)
    losses = methods.LOSSES[:3] * 0.9**i
    _, memory = method.right_step(J, losses, range(3), memory)
  update, _ = methods.run(
    method,
    methods.CONFLICTING,
    active=[True, False, True],
    state=history(method),
  )
  (right,), _ = method.right_step(
    methods.CONFLICTING[[0, 2]],
    methods.LOSSES[[0, 2]],
    range(2),
    PARTS[method.name](memory),
  )
  methods.close(update, right, methods.CONFLICTING, 2e-5)


@pytest.mark.parametrize('method', NEED_BATCHES)
def test_another_number_of_independent_batches_raises(method):
  tx = method.make(range(2))
  J = jnp.asarray(method_row.GOLDEN_MATRIX, jnp.float32)
  needed = method.extra_batches
  for stacks in (None, (), (J,) * (needed - 1), (J,) * (needed + 1)):
    with pytest.raises(ValueError, match=f'extra_grads must hold {needed} '):
      tx.update(J, tx.init(J[0]), extra_grads=stacks)


@pytest.mark.parametrize(
  ('factory', 'arguments', 'reference'),
  [
    (
      mtl_jax.sdmgrad,
      {'sampling': 'single', 'learning_rate': 0.02},
      references_stochastic.sdmgrad(
        batch='single', learning_rate=0.02, relative=False
      ),
    ),
    (
      mtl_jax.modo,
      {'gamma': 0.01, 'rho': 0.3},
      references_stochastic.modo(gamma=0.01, rho=0.3, relative=False),
    ),
    (
      mtl_jax.moco,
      {'gamma': 0.01, 'rho': 0.3},
      references_stochastic.moco(gamma=0.01, rho=0.3, relative=False),
    ),
    (
      mtl_jax.gradnorm,
      {'learning_rate': 0.01},
      references_stochastic.gradnorm(learning_rate=0.01, relative=False),
    ),
  ],
  ids=['sdmgrad', 'modo', 'moco', 'gradnorm'],
)
def test_scale_of_the_paper_steps_on_what_is_not_normalised(
  factory, arguments, reference
):
  tx = factory(scale='paper', num_tasks=3, **arguments)
  update = jax.jit(tx.update)
  memory, state = None, tx.init(jnp.zeros(8))
  for i in range(3):
    J = methods.matrix(3, 8, seed=i)
    losses = methods.LOSSES[:3] * 0.8**i
    extra = (J + 0.3 * np.abs(J), J + 0.6 * np.abs(J))
    actual, state = update(
      J, state, losses=jnp.asarray(losses, jnp.float32), extra_grads=extra
    )
    (right,), memory = reference(
      J.astype(np.float64),
      losses,
      memory=memory,
      draw=None,
      extra=tuple(e.astype(np.float64) for e in extra),
    )
    methods.close(actual, right, J, 2e-5)


# TorchJD's tests of SDMGrad, whose numbers are by hand: one step of size 10 on
# diag(1, 1/4, 0), and a second one on the identity. The inner products of two
# stacks are what is wanted where the second is the identity.
@pytest.mark.parametrize(
  ('preference', 'expected'),
  [
    (None, ([1 / 13, 1 / 13, 11 / 13], [6 / 13, 6 / 13, 1 / 13])),
    ((0.0, 0.0, 1.0), ([0, 0, 1], None)),
  ],
)
def test_sdmgrad_has_the_weights_of_a_step_by_hand(preference, expected):
  tx = mtl_jax.sdmgrad(
    preference=preference,
    inner_steps=1,
    learning_rate=10.0,
    rescale='1+lambda',
    num_tasks=3,
  )
  update, state = jax.jit(tx.update), tx.init(jnp.zeros(3))
  inner = [jnp.diag(jnp.array([1, 0.25, 0])), jnp.eye(3)]
  for matrix, weights in zip(inner, expected, strict=True):
    if weights is not None:
      _, state = update(jnp.eye(3), state, extra_grads=(matrix, jnp.eye(3)))
      np.testing.assert_allclose(state.task_weights, weights, atol=1e-6)


def test_sdmgrad_on_one_batch_comes_to_the_least_norm_point():
  # The same gradients again and again: the weights that are kept converge,
  # though 20 steps alone do not get there.
  J = methods.matrix(5, 12, seed=3)
  tx = mtl_jax.sdmgrad(0.0, sampling='single', inner_steps=5, num_tasks=5)
  step = jax.jit(tx.update)
  state = tx.init(J[0])
  right = references.least_norm_weights(J)
  errors = []
  for _ in range(200):
    _, state = step(J, state)
    errors.append(np.abs(state.task_weights - right).max())
  assert errors[0] > 1e-2
  assert errors[-1] < 1e-4


def test_batches_that_agree_on_nothing_leave_the_weights():
  J = jnp.asarray(method_row.GOLDEN_MATRIX, jnp.float32)
  for tx in (mtl_jax.sdmgrad(0.0, num_tasks=2), mtl_jax.modo(num_tasks=2)):
    _, state = jax.jit(tx.update)(J, tx.init(J[0]), extra_grads=(J, -J))
    np.testing.assert_array_equal(state.task_weights, [0.5, 0.5])


def test_modo_of_two_batches_moves_by_the_mean_of_both():
  tx = mtl_jax.modo(batches='two', num_tasks=3)
  reference = references_stochastic.modo(batches='two')
  step = jax.jit(tx.update)
  memory, state = None, tx.init(jnp.zeros(8))
  for i in range(3):
    J, other = (methods.matrix(3, 8, seed=2 * i + k) for k in range(2))
    update, state = step(J, state, extra_grads=(other,))
    (right,), memory = reference(
      J.astype(np.float64),
      None,
      memory=memory,
      draw=None,
      extra=(other.astype(np.float64),),
    )
    methods.close(update, right, np.stack([J, other]).reshape(6, 8))


def test_moco_tracks_the_mean_of_noisy_gradients():
  rng = np.random.default_rng(0)
  J = methods.matrix(2, 30)
  tx = mtl_jax.moco(beta=1.0, beta_decay=1.0, num_tasks=2)
  step = jax.jit(tx.update)
  state = tx.init(J[0])
  drawn = []
  for _ in range(50):
    drawn.append(J + rng.standard_normal(J.shape).astype(np.float32))
    _, state = step(drawn[-1], state)
  # With beta_k = 1 / k it is the mean of all of them.
  np.testing.assert_allclose(
    state.memory.tracked, np.mean(drawn, axis=0), atol=1e-5
  )


@pytest.mark.parametrize('factory', [mtl_jax.moco, mtl_jax.db_mtl])
def test_what_is_tracked_does_not_lose_small_steps_to_bfloat16(factory):
  tx = factory(beta=0.5, beta_decay=0.0, num_tasks=1)
  step, state = jax.jit(tx.update), tx.init(jnp.zeros(1, jnp.bfloat16))
  for value in (256.0, 258.0):
    J = jnp.full((1, 1), value, jnp.bfloat16)
    update, state = step(J, state, losses=jnp.ones(1))
  assert update.dtype == jnp.bfloat16
  # No bfloat16 lies between 256 and 258.
  np.testing.assert_array_equal(state.memory.tracked, [[257.0]])


@pytest.mark.parametrize(
  'factory', [mtl_jax.moco, mtl_jax.db_mtl, mtl_jax.excess_mtl]
)
def test_gradients_unlike_the_parameters_of_the_state_raise(factory):
  tx = factory(num_tasks=2)
  state = tx.init({'w': jnp.zeros(3)})
  losses = jnp.ones(2)
  # A shape that would be broadcast, without parameters to compare it with.
  with pytest.raises(ValueError, match=r"\['w'\].*\(2, 1\), expected \(2, 3\)"):
    tx.update({'w': jnp.ones((2, 1))}, state, losses=losses)
  with pytest.raises(ValueError, match='structure'):
    tx.update({'v': jnp.ones((2, 3))}, state, losses=losses)


def test_task_that_joins_late_begins_its_own_average():
  tx = mtl_jax.moco(beta=0.5, beta_decay=0.0, gamma=1e-6, num_tasks=2)
  step, state = jax.jit(tx.update), tx.init(jnp.zeros(2))
  J = np.array([[1.0, 0.0], [0.0, 4.0]], np.float32)
  _, state = step(J, state, active=np.array([True, False]))
  update, state = step(3 * J, state, active=np.array([True, True]))
  np.testing.assert_allclose(update, [0.5 * 2, 0.5 * 12], rtol=1e-5)


def test_db_mtl_does_not_see_the_scale_of_a_task():
  J, losses = methods.matrix(3, 6), np.array([0.5, 1.0, 2.0], np.float32)
  factors = np.array([1e-3, 1.0, 1e3], np.float32)
  tx = mtl_jax.db_mtl(num_tasks=3)
  step, state = jax.jit(tx.update), tx.init(J[0])
  update, _ = step(J, state, losses=losses)
  scaled, _ = step(factors[:, None] * J, state, losses=factors * losses)
  np.testing.assert_allclose(scaled, update, rtol=1e-5)


def test_db_mtl_gives_every_task_the_length_of_the_longest():
  J = methods.matrix(4, 9)
  tx = mtl_jax.db_mtl(num_tasks=4)
  _, state = jax.jit(tx.update)(J, tx.init(J[0]), losses=jnp.ones(4))
  lengths = np.linalg.norm(state.memory.tracked, axis=1)
  np.testing.assert_allclose(
    state.task_weights * lengths, np.full(4, lengths.max()), rtol=1e-5
  )


def test_gradnorm_pulls_the_task_that_learns_slowly_up():
  J = np.eye(3, dtype=np.float32)
  tx = mtl_jax.gradnorm(learning_rate=0.01, num_tasks=3)
  step = jax.jit(tx.update)
  state = tx.init(J[0])
  for losses in ([1, 2, 4], [0.5, 2, 1], [0.5, 2, 1]):
    _, state = step(J, state, losses=jnp.array(losses, jnp.float32))
  weights = np.asarray(state.task_weights)
  # Rates of 1/2, 1 and 1/4.
  assert weights[1] > 1 > weights[0]
  np.testing.assert_allclose(weights.sum(), 3, rtol=1e-6)


# The lengths are 1.6 and 0.4, their mean is 1 and the rates are 1.44 and 0.56.
# The first target is 1.728 with alpha = 3 / 2, and 1.44 with alpha = 1; the
# second, 0.419 or 0.56, is above 0.4 in both cases.
@pytest.mark.parametrize(
  ('alpha', 'expected'),
  [(1.5, (1.16, 1.04)), (1.0, (0.84, 1.04)), (0.0, (0.84, 1.04))],
)
def test_gradnorm_moves_weights_towards_rates_to_the_power_alpha(
  alpha, expected
):
  tx = mtl_jax.gradnorm(alpha, learning_rate=0.1, num_tasks=2)
  step, state = jax.jit(tx.update), tx.init(jnp.zeros(2))
  # Equal lengths and rates: only the first losses are learnt.
  _, state = step(jnp.eye(2), state, losses=jnp.ones(2))
  J = jnp.diag(jnp.array([1.6, 0.4]))
  for losses in ([1.44, 0.56], [1.0, 1.0]):
    update, state = step(J, state, losses=jnp.array(losses))
  expected = 2 * np.array(expected) / np.sum(expected)
  np.testing.assert_allclose(state.task_weights, expected, rtol=1e-5)
  np.testing.assert_allclose(update, expected * [1.6, 0.4], rtol=1e-5)


@pytest.mark.parametrize('size', [2, 3, 7])
def test_gradnorm_leaves_weights_that_are_balanced(size):
  # Equal up to rounding: an L1 slope would throw them by a whole step.
  rng = np.random.default_rng(size)
  J = np.linalg.qr(rng.standard_normal((9, 9)))[0][:size].astype(np.float32)
  tx = mtl_jax.gradnorm(learning_rate=0.1, num_tasks=size)
  step, state = jax.jit(tx.update), tx.init(J[0])
  for factor in (1.0, 0.7, 0.3):
    losses = np.float32(factor * methods.LOSSES[:size])
    _, state = step(J, state, losses=losses)
  np.testing.assert_allclose(state.memory.shares, 1 / size, rtol=1e-6)


def test_gradnorm_survives_losses_that_are_not_positive():
  J = jnp.asarray(method_row.GOLDEN_MATRIX, jnp.float32)
  tx = mtl_jax.gradnorm(num_tasks=2)
  step = jax.jit(tx.update)
  for losses in ([0.0, 1.0], [-2.0, 1.0], [1.0, -3.0]):
    state = tx.init(J[0])
    for first in (losses, losses[::-1], losses):
      update, state = step(J, state, losses=jnp.array(first))
    assert np.all(np.isfinite(update)), losses
    assert np.all(np.asarray(state.task_weights) >= 0), losses
    np.testing.assert_allclose(np.sum(state.task_weights), 2, rtol=1e-6)


def test_excess_mtl_forgives_a_task_whose_weight_was_nothing():
  # After a long time far ahead of the other the first weight is below what
  # float32 holds; it must come back when the risks change sides.
  tx = mtl_jax.excess_mtl(step_size=50.0, num_tasks=2)
  step = jax.jit(tx.update)
  state = tx.init(jnp.zeros(2))
  _, state = step(jnp.eye(2), state)
  for _ in range(4):
    _, state = step(jnp.diag(jnp.array([0.0, 1.0])), state)
  assert state.task_weights[0] == 0
  for _ in range(4):
    _, state = step(jnp.diag(jnp.array([100.0, 0.0])), state)
  assert state.task_weights[0] > 0.99


def test_excess_mtl_has_the_weights_of_a_warm_up_by_hand():
  # TorchJD's test. The squares grow to (5, 5) in two updates with the risks
  # (2, 1) and (1, 4) / sqrt(5), and to (9, 6) in the third.
  tx = mtl_jax.excess_mtl(step_size=1.0, warmup=2, num_tasks=2)
  step, state = jax.jit(tx.update), tx.init(jnp.zeros(1))
  first, second = jnp.array([[2.0], [1.0]]), jnp.array([[1.0], [2.0]])
  for J in (first, second):
    _, state = step(J, state)
    np.testing.assert_allclose(state.task_weights, [0.5, 0.5], rtol=1e-6)
  _, state = step(first, state)
  baseline = (np.array([2, 1]) + np.array([1, 4]) / np.sqrt(5)) / 2
  weights = np.exp(np.array([4 / 3, 1 / np.sqrt(6)]) / baseline)
  np.testing.assert_allclose(
    state.task_weights, weights / weights.sum(), rtol=1e-5
  )


def test_cr_mogm_follows_a_schedule_of_its_decay():
  # 1 - 1 / (k + 1): the mean of all weights so far.
  tx = mtl_jax.cr_mogm(decay=lambda k: 1 - 1 / (k + 1), num_tasks=3)
  step, state = jax.jit(tx.update), tx.init(jnp.zeros(8))
  found = []
  for i in range(4):
    J = methods.matrix(3, 8, seed=i)
    found.append(references.least_norm_weights(J))
    _, state = step(J, state)
    np.testing.assert_allclose(
      state.task_weights, np.mean(found, axis=0), atol=1e-5
    )


def test_cr_mogm_without_decay_is_the_aggregator():
  inner = mtl_jax.cagrad(num_tasks=3)
  tx = mtl_jax.cr_mogm(mtl_jax.cagrad(), decay=0.0, num_tasks=3)
  state, inner_state = tx.init(jnp.zeros(8)), inner.init(jnp.zeros(8))
  step, inner_step = jax.jit(tx.update), jax.jit(inner.update)
  for i in range(3):
    J = methods.matrix(3, 8, seed=i)
    update, state = step(J, state)
    expected, inner_state = inner_step(J, inner_state)
    methods.close(update, expected, J, 1e-6)
    np.testing.assert_array_equal(state.residual, inner_state.residual)


@pytest.mark.parametrize(
  'aggregator',
  [
    mtl_jax.linear(),
    mtl_jax.pcgrad(reduction='sum'),
    mtl_jax.linear((1.0, 1.0, 1.0)),
  ],
  ids=['mean', 'pcgrad', 'sum'],
)
def test_cr_mogm_has_the_size_of_the_new_weights_when_tasks_are_absent(
  aggregator,
):
  # Orthogonal gradients of equal length: the sum and PCGrad give each task the
  # weight 1 however many there are, and the mean gives a task alone all of it.
  tx = mtl_jax.cr_mogm(aggregator, num_tasks=3)
  step, state = jax.jit(tx.update), tx.init(jnp.zeros(3))
  _, state = step(jnp.eye(3), state, active=jnp.ones(3, bool))
  before = state.memory.weights
  active = jnp.array([False, True, False])
  update, state = step(jnp.eye(3), state, active=active)
  np.testing.assert_allclose(update, [0, 1, 0], atol=1e-6)
  np.testing.assert_allclose(state.memory.weights, before, rtol=1e-6)


def test_cr_mogm_moves_the_state_of_what_it_averages():
  # Random, stateful, and in need of further batches.
  J = methods.matrix(3, 6)
  tx = mtl_jax.cr_mogm(mtl_jax.pcgrad(seed=1), num_tasks=3)
  old = tx.init(J[0])
  _, new = jax.jit(tx.update)(J, old)
  keys = [jax.random.key_data(s.memory.inner.key) for s in (old, new)]
  assert np.any(np.asarray(keys[0]) != np.asarray(keys[1]))
  tx = mtl_jax.cr_mogm(mtl_jax.modo(), num_tasks=3)
  assert tx.extra_batches == 2
  old = tx.init(J[0])
  _, new = jax.jit(tx.update)(J, old, extra_grads=(J, J))
  assert np.any(old.memory.inner.memory != new.memory.inner.memory)
  with pytest.raises(ValueError, match='extra_grads'):
    tx.update(J, old)


def test_cr_mogm_refuses_what_it_cannot_average():
  for aggregator in (mtl_jax.moco(), mtl_jax.modo(batches='two')):
    with pytest.raises(ValueError, match="weights='tracked'"):
      mtl_jax.cr_mogm(aggregator)
  with pytest.raises(ValueError, match=r"axes of its own.*'i'"):
    mtl_jax.cr_mogm(mtl_jax.mgda(), axis_name='i')


# A row a method: all share what is summed over shards.
SHARDED = methods.params(
  {
    m.factory: m
    for m in rows_stochastic.METHODS
    if 'aggregator' not in m.arguments
  }.values()
)


# Tasks whose parameters lie on eight devices; what is remembered of the
# gradients lies there with them, and every sum over coordinates crosses them.
@pytest.mark.parametrize('method', SHARDED)
def test_shards_of_parameters_give_the_update_of_whole_ones(method):
  mesh = jax.make_mesh(
    (8,), ('shards',), axis_types=(jax.sharding.AxisType.Explicit,)
  )
  size, losses = 3, jnp.asarray(methods.LOSSES[:3], jnp.float32)
  whole = method.make(range(size))
  parts = method.make(range(size), shard_axis='shards')

  def run(tx, stacks):
    state = tx.init(jax.tree.map(lambda x: jnp.zeros_like(x[0]), stacks[0]))
    for J in stacks:
      update, state = tx.update(J, state, losses=losses, **method.extras(J))
    return update, state.task_weights

  stacks = [methods.matrix(size, 16, seed=i) for i in range(2)]
  spec = P(None, 'shards')
  sharded = jax.shard_map(
    functools.partial(run, parts),
    mesh=mesh,
    in_specs=([spec, spec],),
    out_specs=(P('shards'), P()),
    check_vma=False,
  )
  place = jax.sharding.NamedSharding(mesh, spec)
  update, weights = jax.jit(sharded)([jax.device_put(J, place) for J in stacks])
  expected, expected_weights = jax.jit(functools.partial(run, whole))(stacks)
  methods.close(update, expected, stacks[-1])
  np.testing.assert_allclose(weights, expected_weights, rtol=1e-4, atol=1e-5)


def test_cr_mogm_makes_its_state_where_the_axes_are_not_bound():
  inner = mtl_jax.mgda(shard_axis='shards')
  for tx in (mtl_jax.cr_mogm(shard_axis='shards'), mtl_jax.cr_mogm(inner)):
    state = tx.for_tasks(2).init(jnp.zeros(3))
    plain = mtl_jax.cr_mogm(num_tasks=2).init(jnp.zeros(3))
    assert methods.structure(state) == methods.structure(plain)
