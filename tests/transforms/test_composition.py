"""Aggregators around aggregators, and independent batches."""

import jax
import jax.numpy as jnp
import methods
import numpy as np
import optax
import pytest
import quadratics

import mtl_jax

J = jnp.asarray(methods.CONFLICTING)
OTHER = jnp.asarray(methods.matrix(3, 5, seed=4))


def _updates(tx, stacks, actives=None):
  """The updates of a row of stacks, and the last state."""
  state, found = tx.init(stacks[0][0]), []
  for i, stack in enumerate(stacks):
    active = None if actives is None else jnp.asarray(actives[i])
    updates, state = jax.jit(tx.update)(stack, state, active=active)
    found.append(np.asarray(updates))
  return found, state


def test_every_keeps_the_weights_of_the_last_time_they_were_computed():
  weights = [
    np.asarray(
      mtl_jax.mgda(num_tasks=3)
      .update(stack, mtl_jax.mgda(num_tasks=3).init(J[0]))[1]
      .task_weights
    )
    for stack in (J, OTHER)
  ]
  tx = mtl_jax.every(2, mtl_jax.mgda(), num_tasks=3)
  found, state = _updates(tx, [J, OTHER, OTHER, J])
  expected = [
    weights[0] @ J,
    weights[0] @ OTHER,
    weights[1] @ OTHER,
    weights[1] @ J,
  ]
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(
    mtl_jax.diagnostics(state)['task_weights'], weights[1], rtol=1e-4
  )


def test_every_one_is_the_aggregator():
  for method in (mtl_jax.cagrad(), mtl_jax.pcgrad(seed=3), mtl_jax.gradvac()):
    found, _ = _updates(mtl_jax.every(1, method, num_tasks=3), [J, OTHER])
    expected, _ = _updates(method.for_tasks(3), [J, OTHER])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_every_computes_weights_at_once_when_other_tasks_are_present():
  tx = mtl_jax.every(10, mtl_jax.mgda(), num_tasks=3)
  active = [True, False, True]
  broken = J.at[1].set(jnp.nan)
  found, _ = _updates(tx, [J, broken], [[True] * 3, active])
  expected, _ = _updates(mtl_jax.mgda(num_tasks=2), [J[jnp.array([0, 2])]])
  np.testing.assert_allclose(found[1], expected[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
  'method', [mtl_jax.graddrop(), mtl_jax.moco(), optax.identity()]
)
def test_every_refuses_what_is_no_weighted_sum_of_task_gradients(method):
  with pytest.raises(ValueError, match=r'every .*weights='):
    mtl_jax.every(2, method)


def test_every_refuses_a_period_below_one():
  with pytest.raises(ValueError, match='k must be at least 1, got 0'):
    mtl_jax.every(0, mtl_jax.mgda())


TREE = {'a': {'w': J[:, :2]}, 'b': (J[:, 2:4], J[:, 4])}
PARAMS = jax.tree.map(lambda x: x[0], TREE)


def test_each_group_is_aggregated_by_itself():
  labels = {'a': 'bottom', 'b': ('top', 'bottom')}
  tx = mtl_jax.per_group(mtl_jax.mgda(num_tasks=3), labels)
  updates, state = tx.update(TREE, tx.init(PARAMS), PARAMS)
  alone = mtl_jax.mgda(num_tasks=3)
  bottom = jnp.concatenate([J[:, :2], J[:, 4:]], axis=1)
  expected, _ = alone.update(bottom, alone.init(bottom[0]))
  found = np.append(updates['a']['w'], updates['b'][1])
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
  expected, _ = alone.update(J[:, 2:4], alone.init(J[0, 2:4]))
  np.testing.assert_allclose(updates['b'][0], expected, rtol=1e-5, atol=1e-6)
  shown = mtl_jax.diagnostics(state)
  assert {'bottom/gram', 'top/gram', 'top/task_weights'} <= set(shown)


def by_name(tree):
  """Kernels are one group, everything else another."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: 'kernel' if 'kernel' in str(path) else 'rest', tree
  )


@pytest.mark.parametrize('labels', ['leaf', by_name], ids=['leaf', 'by name'])
def test_groups_compose_with_heads_and_flat_minima(labels):
  problem = quadratics.Quadratics.random()
  for aggregator in (mtl_jax.cagrad(), mtl_jax.gradvac(), mtl_jax.graddrop()):
    grouped = mtl_jax.per_group(aggregator, labels)
    plain = mtl_jax.shared_only(grouped, problem.names)
    flat = mtl_jax.flat_minima(grouped, problem.names, rho=0.0)
    args = problem.task_grads, problem.params
    expected, _ = plain.update(args[0], plain.init(args[1]), args[1])
    found, _ = flat.update(
      args[0], flat.init(args[1]), args[1], grad_fn=problem.grad_fn
    )
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
      found,
      expected,
    )


def test_groups_of_a_random_method_draw_each_for_themselves():
  tree = {'a': J, 'b': J}
  tx = mtl_jax.per_group(mtl_jax.random_weights(num_tasks=3), 'leaf')
  updates, _ = tx.update(tree, tx.init({'a': J[0], 'b': J[0]}))
  assert np.abs(updates['a'] - updates['b']).max() > 1e-3


def test_a_group_without_a_name_is_refused():
  tx = mtl_jax.per_group(mtl_jax.mgda(), lambda tree: None)
  with pytest.raises(ValueError, match=r'group_labels|structure|prefix'):
    tx.init({'a': jnp.zeros(2)})
  tx = mtl_jax.per_group(mtl_jax.mgda(), {'a': 3})
  with pytest.raises(ValueError, match='group_labels'):
    tx.init({'a': jnp.zeros(2)})


@pytest.mark.parametrize('method', methods.ALL)
@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_a_non_finite_gradient_makes_a_step_that_is_skipped_and_counted(
  method, bad
):
  aggregator = method.make_alone(range(3), num_tasks=3)
  tx = mtl_jax.skip_nonfinite(optax.chain(aggregator, optax.trace(0.9)))
  losses = jnp.asarray(methods.LOSSES[:3], jnp.float32)
  state = tx.init(J[0])
  for i, stack in enumerate((J, J.at[1, 2].set(bad), OTHER)):
    before = state
    updates, state = tx.update(stack, state, losses=losses)
    if i == 1:
      np.testing.assert_array_equal(updates, 0)
      same = jax.tree.map(
        lambda a, b: bool(jnp.array_equal(a, b)), state.inner, before.inner
      )
      assert all(jax.tree.leaves(same))
      assert int(state.skipped) == int(state.consecutive) == 1
    else:
      assert np.all(np.isfinite(updates))
      assert int(state.skipped) == (0 if i == 0 else 1)
      assert int(state.consecutive) == 0
  assert int(mtl_jax.diagnostics(state)['skipped']) == 1


def test_after_too_many_in_a_row_the_failure_is_let_through():
  tx = mtl_jax.skip_nonfinite(mtl_jax.linear(), 2)
  state, seen = tx.init(J[0]), []
  for _ in range(3):
    updates, state = tx.update(J * jnp.nan, state)
    seen.append(bool(jnp.all(jnp.isfinite(updates))))
  assert seen == [True, True, False]
  with pytest.raises(ValueError, match='max_consecutive'):
    mtl_jax.skip_nonfinite(mtl_jax.linear(), 0)


def test_all_shards_skip_a_step_that_one_of_them_must_skip():
  spec = jax.sharding.PartitionSpec
  auto = jax.sharding.AxisType.Auto
  mesh = jax.make_mesh((4,), ('model',), axis_types=(auto,))
  tx = mtl_jax.skip_nonfinite(
    mtl_jax.linear(shard_axis='model'), shard_axis='model'
  )
  step = jax.shard_map(
    lambda g: tx.update(g, tx.init(g[0]))[0],
    mesh=mesh,
    in_specs=spec(None, 'model'),
    out_specs=spec('model'),
    check_vma=False,
  )
  stack = jnp.ones((2, 8)).at[0, 5].set(jnp.nan)
  np.testing.assert_array_equal(jax.jit(step)(stack), np.zeros(8))


def _three_stacks(problem):
  """Stacks of three batches: the same curvature, centres moved."""

  def at(shift):
    other = quadratics.Quadratics(
      problem.names, problem.A, problem.c + shift, problem.shared, problem.heads
    )
    return other

  return [at(0.0), at(0.3), at(-0.2)]


@pytest.mark.parametrize('name', ['sdmgrad', 'modo'])
def test_flat_minima_takes_flat_gradients_of_all_batches(name):
  (method,) = (m for m in methods.METHODS if m.name == name)
  batches = _three_stacks(quadratics.Quadratics.random())
  batches = batches[: 1 + method.extra_batches]
  main = batches[0]
  tx = mtl_jax.flat_minima(
    method.make(range(3)), main.names, rho=0.3, rho_heads=0.3
  )
  updates, _ = tx.update(
    main.task_grads,
    tx.init(main.params),
    main.params,
    grad_fn=main.grad_fn,
    extra_grads=tuple(b.task_grads for b in batches[1:]),
    extra_grad_fn=lambda own: tuple(b.grad_fn(own) for b in batches[1:]),
    losses=quadratics.losses(),
  )
  x = np.concatenate([np.tile(main.shared, (3, 1)), main.heads], axis=1)
  moved = main.perturbed(rho=0.3, rho_heads=0.3)
  take = lambda b, at: b.gradient(at)[:, : quadratics.SHARED]
  loss = [take(b, x) for b in batches]
  flat = [take(b, moved) - g for b, g in zip(batches, loss, strict=True)]
  expected = sum(
    method.reference(
      stacks[0],
      methods.LOSSES[:3],
      memory=None,
      draw=None,
      extra=tuple(stacks[1:]),
    )[0][0]
    for stacks in (loss, flat)
  )
  shared, _ = quadratics.vectors(updates)
  np.testing.assert_allclose(
    shared, expected, atol=1e-4 * np.linalg.norm(expected)
  )


def test_methods_with_further_batches_say_what_they_miss():
  problem = quadratics.Quadratics.random()
  args = problem.task_grads, problem.params
  for wrap in (mtl_jax.shared_only, mtl_jax.flat_minima):
    tx = wrap(mtl_jax.modo(), problem.names)
    with pytest.raises(ValueError, match='extra_grads must hold'):
      tx.update(args[0], tx.init(args[1]), args[1], grad_fn=problem.grad_fn)
  stacks = (args[0],) * mtl_jax.modo().extra_batches
  with pytest.raises(ValueError, match='extra_grad_fn'):
    tx.update(
      args[0],
      tx.init(args[1]),
      args[1],
      grad_fn=problem.grad_fn,
      extra_grads=stacks,
    )
