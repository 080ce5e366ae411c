"""Aggregators around aggregators, and independent batches."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import methods
import numpy as np
import optax
from optax.experimental import aggregating
import pytest
import quadratics
import quick_compile
import references

import mtl_jax

J = jnp.asarray(methods.CONFLICTING)
OTHER = jnp.asarray(methods.matrix(3, 5, seed=4))


def _updates(tx, stacks, actives=None):
  """The updates of a row of stacks, and the last state."""
  update = quick_compile.jit(tx.update)
  state, found = tx.init(stacks[0][0]), []
  for i, stack in enumerate(stacks):
    active = None if actives is None else jnp.asarray(actives[i])
    updates, state = update(stack, state, active=active)
    found.append(np.asarray(updates))
  return found, state


def test_every_keeps_the_weights_of_the_last_time_they_were_computed():
  mgda = mtl_jax.mgda(num_tasks=3)
  update = quick_compile.jit(mgda.update)
  weights = [
    np.asarray(update(stack, mgda.init(J[0]))[1].task_weights)
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
  'method',
  [
    mtl_jax.graddrop(),
    mtl_jax.moco(),
    aggregating.average_per_element_updates(),
  ],
)
def test_every_refuses_what_is_no_weighted_sum_of_task_gradients(method):
  with pytest.raises(ValueError, match=r'every .*weights='):
    mtl_jax.every(2, method)


def test_every_refuses_a_period_below_one():
  message = 'k must be a whole number of at least 1, got 0'
  with pytest.raises(ValueError, match=message):
    mtl_jax.every(0, mtl_jax.mgda())


# Losses with the geometric means 2, 2 and 3 of two tasks, and what `gls` makes
# of them: a mean over 2 L_i.
GLS = [
  ((1.0, 4.0), (1.0, 0.25)),
  ((4.0, 1.0), (0.25, 1.0)),
  ((9.0, 1.0), (1 / 6, 1.5)),
]


def _weights_of_gls(tx):
  """The weights of updates with the losses of `GLS`, from the updates."""
  update = quick_compile.jit(tx.update)
  state, found = tx.init(jnp.zeros(2)), []
  for losses, _ in GLS:
    # Orthogonal gradients of length 1: the update is the weights.
    updates, state = update(jnp.eye(2), state, losses=jnp.array(losses))
    np.testing.assert_allclose(state.task_weights, updates, rtol=1e-6)
    found.append(np.asarray(updates))
  return found


def test_every_keeps_the_weights_of_a_weighting_though_losses_change():
  tx = mtl_jax.every(2, mtl_jax.weighted(mtl_jax.gls()), num_tasks=2)
  first, _, third = (weights for _, weights in GLS)
  np.testing.assert_allclose(
    _weights_of_gls(tx), [first, first, third], rtol=1e-6
  )


def test_cr_mogm_averages_the_weights_of_a_weighting():
  tx = mtl_jax.cr_mogm(mtl_jax.weighted(mtl_jax.gls()), decay=0.5, num_tasks=2)
  first, second, third = (np.array(weights) for _, weights in GLS)
  expected = [first, (first + second) / 2, (first + second + 2 * third) / 4]
  np.testing.assert_allclose(_weights_of_gls(tx), expected, rtol=1e-6)


def test_every_in_flat_minima_keeps_the_weights_of_both_parts():
  before = quadratics.Quadratics.random()
  after = dataclasses.replace(
    before, shared=-before.shared, heads=0.5 * before.heads
  )
  radii = {'rho': 0.3, 'rho_heads': 0.6}
  tx = mtl_jax.flat_minima(
    mtl_jax.every(2, mtl_jax.mgda()), before.names, **radii
  )
  # A problem differs from the other by its parameters alone.
  update = quick_compile.jit(
    functools.partial(tx.update, grad_fn=before.grad_fn)
  )

  def parts(problem):
    """Loss and flat gradients of the shared parameters, [T, 6] each."""
    loss, sam = (
      problem.gradient(problem.perturbed(**by))[:, : quadratics.SHARED]
      for by in ({'rho': 0, 'rho_heads': 0}, radii)
    )
    return loss, sam - loss

  state = tx.init(before.params)
  steps = ((before, before), (before, after), (after, after))
  for weighed, problem in steps:
    updates, state = update(problem.task_grads, state, problem.params)
    weights = [references.least_norm_weights(part) for part in parts(weighed)]
    for part, expected in zip((state.loss, state.flat), weights, strict=True):
      np.testing.assert_allclose(part.task_weights, expected, atol=1e-3)
    shared, _ = quadratics.vectors(updates)
    expected = sum(
      w @ part for w, part in zip(weights, parts(problem), strict=True)
    )
    np.testing.assert_allclose(
      shared, expected, atol=1e-3 * np.linalg.norm(expected)
    )


def test_every_for_other_tasks_than_its_wrapper_names_is_refused():
  with pytest.raises(ValueError, match='num_tasks is 3, but there are 2'):
    mtl_jax.shared_only(
      mtl_jax.every(2, mtl_jax.mgda(), num_tasks=3), ('a', 'b')
    )


@pytest.mark.parametrize(
  ('method', 'fewest', 'message'),
  [
    (mtl_jax.krum(2), 7, r'num_tasks must be at least 7 .*, got \d'),
    (
      mtl_jax.trimmed_mean(2),
      5,
      r'num_tasks must be more than twice trim=2, got \d',
    ),
  ],
  ids=['krum', 'trimmed_mean'],
)
def test_too_few_tasks_are_refused_when_only_the_wrapper_knows_them(
  method, fewest, message
):
  def run(size):
    tx = mtl_jax.shared_only(method, tuple('abcdefg'[:size]))
    J = jnp.ones((size, 2))
    return tx.update(J, tx.init(J[0]), J[0])[0]

  for size in (3, fewest - 1):
    with pytest.raises(ValueError, match=message):
      run(size)
  np.testing.assert_allclose(run(fewest), jnp.ones(2))


TREE = {'a': {'w': J[:, :2]}, 'b': (J[:, 2:4], J[:, 4])}
PARAMS = jax.tree.map(lambda x: x[0], TREE)


def test_each_group_is_aggregated_by_itself():
  labels = {'a': 'bottom', 'b': ('top', 'bottom')}
  tx = mtl_jax.per_group(mtl_jax.mgda(num_tasks=3), labels)
  updates, state = quick_compile.jit(tx.update)(TREE, tx.init(PARAMS), PARAMS)
  alone = mtl_jax.mgda(num_tasks=3)
  update = quick_compile.jit(alone.update)
  bottom = jnp.concatenate([J[:, :2], J[:, 4:]], axis=1)
  expected, _ = update(bottom, alone.init(bottom[0]))
  found = np.append(updates['a']['w'], updates['b'][1])
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
  expected, _ = update(J[:, 2:4], alone.init(J[0, 2:4]))
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
  for aggregator in (mtl_jax.mgda(), mtl_jax.gradvac(), mtl_jax.graddrop()):
    grouped = mtl_jax.per_group(aggregator, labels)
    plain = mtl_jax.shared_only(grouped, problem.names)
    flat = mtl_jax.flat_minima(grouped, problem.names, rho=0.0)
    args = problem.task_grads, problem.params
    expected, _ = quick_compile.jit(plain.update)(
      args[0], plain.init(args[1]), args[1]
    )
    update = functools.partial(flat.update, grad_fn=problem.grad_fn)
    found, _ = quick_compile.jit(update)(args[0], flat.init(args[1]), args[1])
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


# Of every method the update shows it (`test_contract_numbers`).
@pytest.mark.parametrize('name', ['linear', 'pcgrad', 'moco'])
def test_a_non_finite_gradient_makes_a_step_that_is_skipped_and_counted(name):
  (method,) = (m for m in methods.METHODS if m.name == name)
  aggregator = method.make_alone(range(3), num_tasks=3)
  tx = mtl_jax.skip_nonfinite(optax.chain(aggregator, optax.trace(0.9)))
  update = quick_compile.jit(tx.update)
  losses = jnp.asarray(methods.LOSSES[:3], jnp.float32)
  # Both here, for they share the program and another process may not.
  for bad in (np.nan, np.inf):
    state = tx.init(J[0])
    for i, stack in enumerate((J, J.at[1, 2].set(bad), OTHER)):
      before = state
      updates, state = update(stack, state, losses=losses)
      if i == 1:
        np.testing.assert_array_equal(updates, 0, err_msg=f'with {bad}')
        same = jax.tree.map(
          lambda a, b: bool(jnp.array_equal(a, b)), state.inner, before.inner
        )
        assert all(jax.tree.leaves(same)), bad
        assert int(state.skipped) == int(state.consecutive) == 1, bad
      else:
        assert np.all(np.isfinite(updates)), bad
        assert int(state.skipped) == (0 if i == 0 else 1), bad
        assert int(state.consecutive) == 0, bad
    assert int(mtl_jax.diagnostics(state)['skipped']) == 1, bad


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
  update = functools.partial(
    tx.update,
    grad_fn=main.grad_fn,
    extra_grad_fn=lambda own: tuple(b.grad_fn(own) for b in batches[1:]),
  )
  updates, _ = quick_compile.jit(update)(
    main.task_grads,
    tx.init(main.params),
    main.params,
    extra_grads=tuple(b.task_grads for b in batches[1:]),
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
