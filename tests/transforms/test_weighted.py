"""Loss weightings as aggregators."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest
import weighting_rows as rows

import mtl_jax

J = np.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]], np.float32)
LOSSES = np.array([1.0, 2.0], np.float32)


@functools.cache
def compiled(name):
  """The weighting of a row for two tasks, and its aggregator's update."""
  (row,) = (r for r in rows.ROWS if r.name == name)
  weighting = row.make(range(2))
  tx = mtl_jax.weighted(weighting, num_tasks=2)

  def both(J, losses, active, state, memory):
    return (
      tx.update(J, state, losses=losses, active=active),
      weighting.update(losses, memory, active=active),
    )

  return weighting, tx, jax.jit(both)


BOTH = np.ones(2, bool)


@pytest.mark.parametrize('row', rows.ALL)
def test_update_is_the_sum_weighted_by_the_weighting(row):
  weighting, tx, both = compiled(row.name)
  state, expected_state = tx.init(jnp.zeros(3)), weighting.init(2)
  for losses in (LOSSES, LOSSES / 3):
    (update, state), (weights, expected_state) = both(
      J, losses, BOTH, state, expected_state
    )
    np.testing.assert_allclose(update, weights @ J, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(state.task_weights, weights)
  for ours, theirs in zip(
    jax.tree.leaves(state.memory), jax.tree.leaves(expected_state), strict=True
  ):
    assert jnp.array_equal(ours, theirs)


@pytest.mark.parametrize('row', rows.POSITIVE)
def test_update_is_not_finite_where_the_weights_are_not(row):
  weighting, tx, both = compiled(row.name)
  losses = np.array([1.0, -1.0], np.float32)
  state, memory = tx.init(jnp.zeros(3)), weighting.init(2)
  (update, _), _ = both(J, losses, BOTH, state, memory)
  assert not np.all(np.isfinite(update))
  (update, _), _ = both(J, losses, np.array([True, False]), state, memory)
  assert np.all(np.isfinite(update))


def test_step_with_a_loss_without_logarithm_can_be_skipped():
  # One of those whose weights are NaN then, with a memory of its own.
  tx = mtl_jax.skip_nonfinite(
    optax.chain(mtl_jax.weighted(mtl_jax.famo(), num_tasks=2), optax.adam(0.1))
  )
  step, before = jax.jit(tx.update), tx.init(jnp.zeros(3))
  _, before = step(J, before, losses=LOSSES)
  update, after = step(J, before, losses=np.array([1.0, -1.0], np.float32))
  np.testing.assert_array_equal(update, 0)
  assert mtl_jax.diagnostics(after)['skipped'] == 1
  for new, old in zip(
    jax.tree.leaves(after.inner), jax.tree.leaves(before.inner), strict=True
  ):
    assert jnp.array_equal(new, old)


def test_heads_are_weighted_as_their_losses_are():
  params = {
    'shared': jnp.ones(3),
    'heads': {'a': jnp.ones(2), 'b': jnp.ones(1)},
  }
  xs = {'a': jnp.array([0.5, 1.0, 2.0]), 'b': jnp.array([1.0, -1.0, 0.5])}

  def losses_of(params):
    return jnp.stack(
      [
        (params['shared'] @ xs[t]) ** 2 + jnp.sum(params['heads'][t] ** 2)
        for t in ('a', 'b')
      ]
    )

  jacobian = jax.jit(jax.jacrev(losses_of))(params)
  task_grads = {
    'shared': jacobian['shared'],
    'heads': {t: jacobian['heads'][t][i] for i, t in enumerate(('a', 'b'))},
  }
  tx = mtl_jax.shared_only(mtl_jax.weighted(mtl_jax.gls()), ('a', 'b'))
  update, _ = jax.jit(tx.update)(
    task_grads, tx.init(params), params, losses=losses_of(params)
  )
  # The gradient of the geometric mean, heads included.
  mean = lambda p: jnp.sqrt(jnp.prod(losses_of(p)))
  expected = jax.jit(jax.grad(mean))(params)
  for ours, theirs in zip(
    jax.tree.leaves(update), jax.tree.leaves(expected), strict=True
  ):
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_after_step_reaches_every_state_of_a_weighting():
  famo = mtl_jax.famo()
  tx = optax.chain(
    mtl_jax.flat_minima(mtl_jax.weighted(famo), ('a', 'b'), rho=0.1),
    optax.adam(0.1),
  )
  params = jnp.ones(3)

  @jax.jit
  def step(J, state):
    grad_fn = lambda task_params: 2 * task_params
    return tx.update(J, state, params, losses=LOSSES, grad_fn=grad_fn)

  _, state = step(J, tx.init(params))
  new_losses = jnp.array([0.5, 2.0])
  after = jax.jit(
    lambda new_losses, state: mtl_jax.after_step(famo, new_losses, state)
  )(new_losses, state)
  _, alone = famo.update(LOSSES, famo.init(2))
  expected = famo.after_step(new_losses, alone)
  found = [after[0].loss.memory.weighting, after[0].flat.memory.weighting]
  for weighting in found:
    np.testing.assert_allclose(weighting.logits, expected.logits, rtol=1e-6)
  # Nothing else moves.
  assert jax.tree.structure(after) == jax.tree.structure(state)
  for new, old in zip(
    jax.tree.leaves(after[1]), jax.tree.leaves(state[1]), strict=True
  ):
    np.testing.assert_array_equal(new, old)


def test_after_step_knows_absent_tasks():
  famo = mtl_jax.famo()
  tx = mtl_jax.weighted(famo, num_tasks=3)
  g = jnp.ones((3, 2))
  _, state = jax.jit(tx.update)(g, tx.init(g[0]), losses=jnp.ones(3))
  after = jax.jit(functools.partial(mtl_jax.after_step, famo))(
    jnp.array([0.5, float('nan'), 2.0]),
    state,
    active=jnp.array([True, False, True]),
  )
  logits = after.memory.weighting.logits
  assert logits[0] < 0 == logits[1] < logits[2]


def test_after_step_of_a_weighting_that_does_not_look_changes_nothing():
  gls = mtl_jax.gls()
  state = mtl_jax.weighted(gls, num_tasks=2).init(jnp.zeros(3))
  assert mtl_jax.after_step(gls, LOSSES, state) is state


def test_after_step_says_that_there_is_no_weighting():
  state = optax.adam(0.1).init(jnp.zeros(3))
  with pytest.raises(ValueError, match='no weighted'):
    mtl_jax.after_step(mtl_jax.famo(), LOSSES, state)


def test_further_arguments_reach_a_weighting_that_takes_them():
  tx = mtl_jax.weighted(mtl_jax.dtp(), num_tasks=2)
  update, _ = tx.update(
    jnp.asarray(J),
    tx.init(jnp.zeros(3)),
    losses=LOSSES,
    kpis=jnp.array([1.0, 0.5]),
    value=3.0,
  )
  np.testing.assert_allclose(update, 0.5 * np.log(2) * J[1], rtol=1e-6)


def test_users_own_weighting_needs_the_contract_alone():
  weighting = mtl_jax.LossWeighting(
    init=lambda num_tasks: jnp.zeros(num_tasks),
    update=lambda losses, state, *, active: (
      jnp.where(active, state, 0),
      state + losses,
    ),
  )
  tx = mtl_jax.weighted(weighting, num_tasks=2)
  state = tx.init(jnp.zeros(3))
  for expected in (0 * J[0], J[0] + 2 * J[1]):
    update, state = tx.update(
      jnp.asarray(J), state, losses=LOSSES, value=1.0, grad_fn=None
    )
    np.testing.assert_allclose(update, expected)


def test_losses_of_replicas_are_averaged_before_they_weigh():
  tx = mtl_jax.weighted(mtl_jax.si(), num_tasks=2, axis_name='i')
  mesh = jax.make_mesh((2,), ('i',), axis_types=(jax.sharding.AxisType.Auto,))
  losses = jnp.array([[1.0, 1.0], [3.0, 7.0]])
  sharded = jax.shard_map(
    lambda g, losses: tx.update(g[0], tx.init(g[0, 0]), losses=losses[0])[0],
    mesh=mesh,
    in_specs=(P('i'), P('i')),
    out_specs=P(),
  )
  update = jax.jit(sharded)(jnp.stack([J, 3 * J]), losses)
  # Mean losses 2 and 4, mean gradients twice J.
  np.testing.assert_allclose(update, J[0] + J[1] / 2, rtol=1e-6)


def test_number_of_tasks_and_losses_are_needed():
  tx = mtl_jax.weighted(mtl_jax.gls())
  with pytest.raises(ValueError, match='num_tasks'):
    tx.init(jnp.zeros(3))
  tx = mtl_jax.weighted(mtl_jax.gls(), num_tasks=2)
  with pytest.raises(ValueError, match='losses'):
    tx.update(jnp.asarray(J), tx.init(jnp.zeros(3)))
  with pytest.raises(ValueError, match='num_tasks is 2, but there are 3'):
    mtl_jax.shared_only(tx, ('a', 'b', 'c'))
  with pytest.raises(TypeError, match='weighting must be a LossWeighting'):
    mtl_jax.weighted(mtl_jax.gls)
