"""Cases in which `flat_minima` is something simpler."""

import functools

import jax
import jax.numpy as jnp
import methods
import numpy as np
import optax
import pytest
import quadratics
import quick_compile

import mtl_jax

PROBLEM = quadratics.Quadratics.random()


def run(tx, problem, *, task_grads=None, grad_fn=None, **extra_args):
  """One update of a new state, with losses; also the state."""
  step = lambda state: tx.update(
    problem.task_grads if task_grads is None else task_grads,
    state,
    problem.params,
    grad_fn=grad_fn or problem.grad_fn,
    losses=quadratics.losses(len(problem.names)),
    **extra_args,
  )
  return quick_compile.jit(step)(tx.init(problem.params))


def assert_trees_close(actual, expected, **tolerance):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, **tolerance), actual, expected
  )


# How they combine does not matter: `test_flat_minima` shows what is aggregated.
@pytest.mark.parametrize('method', **quadratics.by_name(methods.METHODS))
def test_radius_zero_is_the_aggregator_alone(method):
  plain = mtl_jax.shared_only(
    method.make_alone(range(quadratics.SIZE), num_tasks=quadratics.SIZE),
    quadratics.NAMES,
    head_scale=quadratics.head_scale(method),
  )
  expected, _ = quick_compile.jit(plain.update)(
    PROBLEM.task_grads,
    plain.init(PROBLEM.params),
    PROBLEM.params,
    losses=quadratics.losses(),
  )
  found = quadratics.flat(method)['radius zero']
  assert_trees_close(found.updates, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('combine', ['separate', 'direct', 'second', 'each'])
def test_one_task_with_a_joint_norm_is_sam(combine):
  problem = PROBLEM.take([1])
  tx = mtl_jax.flat_minima(
    mtl_jax.linear(),
    problem.names,
    rho=0.4,
    rho_heads=0.4,
    norm='joint',
    combine=combine,
  )
  updates, _ = run(tx, problem)
  # Foret et al. 2020, eq. 2 and 3, in NumPy.
  (A,), (c,) = problem.A, problem.c
  x = np.concatenate([problem.shared, problem.heads[0]])
  g = A @ (x - c)
  sam = A @ (x + 0.4 * g / np.linalg.norm(g) - c)
  shared, heads = quadratics.vectors(updates, problem.names)
  np.testing.assert_allclose(np.append(shared, heads), sam, rtol=1e-5)


def test_one_task_with_a_joint_norm_is_the_sam_of_optax():
  problem = PROBLEM.take([0])
  tx = mtl_jax.flat_minima(
    mtl_jax.linear(), problem.names, rho=0.4, norm='joint'
  )
  updates, _ = run(tx, problem)

  def gradient(params, _=None):
    row = lambda tree: jax.tree.map(lambda x: x[None], tree)
    grads = problem.grad_fn({**params, 'shared': row(params['shared'])})
    return {**grads, 'shared': jax.tree.map(lambda x: x[0], grads['shared'])}

  # An outer step of 1 against the gradient: what comes out is minus it.
  sam = optax.contrib.sam(
    optax.sgd(1.0),
    optax.chain(optax.contrib.normalize(), optax.sgd(0.4)),
    sync_period=2,
    opaque_mode=True,
  )
  params = problem.params
  expected, _ = sam.update(
    gradient(params), sam.init(params), params, grad_fn=gradient
  )
  assert_trees_close(
    updates, jax.tree.map(jnp.negative, expected), rtol=1e-5, atol=1e-6
  )


@pytest.mark.parametrize(
  'method',
  **quadratics.by_name(
    [m for m in methods.METHODS if m.factory is mtl_jax.linear]
  ),
)
def test_a_linear_aggregator_makes_separate_equal_direct(method):
  ways = [
    (norm, combine)
    for norm in ('separate', 'joint')
    for combine in ('separate', 'direct')
  ]
  inner = method.make(range(quadratics.SIZE))
  aggregators = [
    mtl_jax.flat_minima(
      inner, quadratics.NAMES, rho=0.5, norm=norm, combine=combine
    )
    for norm, combine in ways
  ]
  found = quick_compile.jit(
    lambda: [run(tx, PROBLEM)[0] for tx in aggregators]
  )()
  for separate, direct in (found[:2], found[2:]):
    assert_trees_close(separate, direct, rtol=1e-5, atol=1e-6)


def assert_starts(found, tasks, name):
  """The tasks are where the parameters are, and everything is a number."""
  shared, heads = quadratics.vectors(found.task_params)
  for task in tasks:
    np.testing.assert_array_equal(
      shared[task], PROBLEM.shared.astype('float32'), err_msg=name
    )
    np.testing.assert_array_equal(
      heads[task], PROBLEM.heads[task].astype('float32'), err_msg=name
    )
  for leaf in jax.tree.leaves(found):
    assert np.all(np.isfinite(leaf)), name


def assert_zero_gradients_are_safe(found, name=''):
  assert_starts(found['one gradient zero'], [0], name)
  none = found['all gradients zero']
  assert_starts(none, range(quadratics.SIZE), name)
  assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(none.updates)), name


@pytest.mark.parametrize('method', **quadratics.by_name(quadratics.FACTORIES))
def test_a_zero_gradient_is_not_perturbed_and_gives_no_nan(method):
  assert_zero_gradients_are_safe(quadratics.flat(method))


def test_a_zero_gradient_is_not_perturbed_in_any_ball():
  balls = {
    f'{norm}, {"asam" if adaptive else "sam"}': {
      'norm': norm,
      'adaptive': adaptive,
    }
    for norm in ('separate', 'joint')
    for adaptive in (False, True)
  }
  makes = {
    name: functools.partial(
      mtl_jax.flat_minima, mtl_jax.linear(), quadratics.NAMES, **ball
    )
    for name, ball in balls.items()
  }
  for name, found in quadratics.situations(PROBLEM, makes).items():
    assert_zero_gradients_are_safe(found, name)


def test_a_zero_shared_gradient_leaves_the_perturbation_of_the_head():
  shared, heads = quadratics.vectors(PROBLEM.task_grads, xp=jnp)
  task_grads = quadratics.tree(jnp.zeros_like(shared), heads)
  tx = mtl_jax.flat_minima(mtl_jax.linear(), quadratics.NAMES, rho=0.5)

  @quick_compile.jit
  def task_params(state):
    seen = []

    def grad_fn(task_params):
      seen.append(task_params)
      return task_grads

    tx.update(task_grads, state, PROBLEM.params, grad_fn=grad_fn)
    return seen[0]

  moved_shared, moved_heads = quadratics.vectors(
    task_params(tx.init(PROBLEM.params))
  )
  np.testing.assert_array_equal(
    moved_shared, np.tile(PROBLEM.shared.astype('float32'), (3, 1))
  )
  np.testing.assert_allclose(
    np.linalg.norm(moved_heads - PROBLEM.heads, axis=1), 0.5, rtol=1e-5
  )


def labels(params):
  """Freezes the shared bias and the offset of the head of 'depth'."""
  found = mtl_jax.default_labels(params)
  found['shared']['bias'] = 'frozen'
  found['heads']['depth']['offset'] = 'frozen'
  return found


def with_frozen(tree, offset, bias):
  """A tree of task parameters or task gradients with these frozen leaves."""
  depth = {**tree['heads']['depth'], 'offset': offset}
  return {
    'shared': {**tree['shared'], 'bias': bias},
    'heads': {**tree['heads'], 'depth': depth},
  }


@pytest.mark.parametrize('norm', ['separate', 'joint'])
@pytest.mark.parametrize('adaptive', [False, True], ids=['sam', 'asam'])
def test_frozen_leaves_are_neither_perturbed_nor_updated_nor_measured(
  norm, adaptive
):
  params = PROBLEM.params
  bias = params['shared']['bias']
  offset = params['heads']['depth']['offset']
  tx = mtl_jax.flat_minima(
    mtl_jax.linear(),
    quadratics.NAMES,
    rho=0.5,
    rho_heads=0.8,
    norm=norm,
    adaptive=adaptive,
    param_labels=labels,
  )

  @quick_compile.jit
  def step(state):
    seen = []

    def grad_fn(task_params):
      seen.append(task_params)
      rows = jnp.broadcast_to(task_params['shared']['bias'], (3, 2))
      grads = PROBLEM.grad_fn(with_frozen(task_params, offset, rows))
      # Gradients of frozen leaves are large: they must not reach a norm.
      return with_frozen(grads, jnp.array(1e3), jnp.full(2, 1e3))

    task_grads = grad_fn(with_frozen(PROBLEM.task_params, offset, bias))
    updates, _ = tx.update(task_grads, state, params, grad_fn=grad_fn)
    return updates, seen[1]

  updates, task_params = step(tx.init(params))
  np.testing.assert_array_equal(task_params['shared']['bias'], bias)
  assert task_params['heads']['depth']['offset'] == offset
  np.testing.assert_array_equal(updates['shared']['bias'], np.zeros(2))
  assert updates['heads']['depth']['offset'] == 0

  # The same in NumPy: frozen coordinates have the gradient zero.
  free = np.ones((3, 9))
  free[:, 4:6] = 0
  free[1, 8] = 0
  x = np.concatenate([np.tile(PROBLEM.shared, (3, 1)), PROBLEM.heads], axis=1)
  g = PROBLEM.gradient(x) * free
  measured = np.abs(x) * g if adaptive else g
  radii = np.array([0.5] * 6 + [0.8] * 3)
  if norm == 'joint':
    lengths = np.linalg.norm(measured, axis=1, keepdims=True)
  else:
    parts = np.split(measured, [6], axis=1)
    each = np.stack([np.linalg.norm(p, axis=1) for p in parts], axis=1)
    lengths = np.repeat(each, [6, 3], axis=1)
  e = radii * (x**2 if adaptive else 1) * g / lengths
  s = PROBLEM.gradient(x + e) * free
  shared, heads = quadratics.vectors(updates)
  np.testing.assert_allclose(shared, s[:, :6].mean(axis=0), rtol=1e-4)
  np.testing.assert_allclose(heads, s[:, 6:], rtol=1e-4)


@pytest.mark.parametrize(
  'dtype, below, above',
  # Between two neighbours of 1 lie 1.2e-7 in float32 and 7.8e-3 in bfloat16.
  [('float32', 6e-8, 4e-7), ('bfloat16', 4e-3, 3e-2)],
)
def test_flat_gradients_below_the_resolution_count_as_zero(dtype, below, above):
  params = jnp.zeros(3, dtype)
  task_grads = jnp.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], dtype)
  # Task 0 has a flat gradient that is only rounding, task 1 a real one.
  noise = jnp.array([[0.0, 0.0, below], [0.0, 0.0, above]], dtype)
  tx = mtl_jax.flat_minima(mtl_jax.imtl_g(num_tasks=2), ('a', 'b'), rho=0.1)
  updates, state = tx.update(
    task_grads, tx.init(params), params, grad_fn=lambda _: task_grads + noise
  )
  assert state.flat.gram[0, 0] == 0
  assert state.flat.gram[1, 1] > 0
  # IMTL-G leaves a zero row out, so that task 1's flat gradient is the result.
  np.testing.assert_allclose(
    updates.astype('float32'), [0.5, 0.5, noise[1, 2]], rtol=1e-2
  )


def test_a_sam_gradient_that_is_not_finite_reaches_the_update():
  shared = PROBLEM.task_grads['shared']
  broken = jax.tree.map(lambda g: g.at[0].set(jnp.nan), shared)
  tx = mtl_jax.flat_minima(mtl_jax.linear(), quadratics.NAMES)
  updates, _ = run(
    tx,
    PROBLEM,
    grad_fn=lambda p: {**PROBLEM.grad_fn(p), 'shared': broken},
  )
  assert np.any(np.isnan(updates['shared']['kernel']))
