"""The update of `flat_minima` against its closed form on quadratics."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quadratics
import quick_compile
import references

import mtl_jax

PROBLEM = quadratics.Quadratics.random()

# What `combine` is given, and the combiner in NumPy.
COMBINATIONS = {
  'separate': ('separate', None, None),
  'direct': ('direct', None, None),
  'second, sum': ('second', None, None),
  'second, mean': (
    'second',
    mtl_jax.linear(),
    lambda rows: references.linear(rows, None)[0],
  ),
  'second, mgda': (
    'second',
    mtl_jax.mgda(),
    lambda rows: references.mgda('none')(rows, None)[0],
  ),
  'each, sum': ('each', None, None),
  'each, cagrad': (
    'each',
    mtl_jax.cagrad(c=0.4),
    lambda rows: references.cagrad(0.4)(rows, None)[0],
  ),
}


def update(tx, problem, *, state=None, **extra_args):
  state = tx.init(problem.params) if state is None else state
  step = lambda state: tx.update(
    problem.task_grads,
    state,
    problem.params,
    grad_fn=problem.grad_fn,
    losses=quadratics.losses(len(problem.names)),
    **extra_args,
  )
  return quick_compile.jit(step)(state)


def closed_form(method, **options):
  right = lambda J: method.right(J, quadratics.losses(), range(quadratics.SIZE))
  return PROBLEM.update(right, **options)


BALLS = [
  {'norm': norm, 'adaptive': adaptive}
  for norm in ('separate', 'joint')
  for adaptive in (False, True)
]
RADII = {'rho': 0.3, 'rho_heads': 0.7}


@pytest.mark.parametrize('combination', COMBINATIONS)
def test_an_aggregator_is_given_the_right_stacks_and_states(combination):
  """`flat_minima` knows nothing else of a method: this holds for all."""
  combine, combiner, combiner_reference = COMBINATIONS[combination]
  two_states = combine in ('separate', 'second')
  ways = [(ball, scale) for ball in BALLS for scale in ('none', 'weights')]
  aggregators = [
    mtl_jax.flat_minima(
      quadratics.recording(),
      quadratics.NAMES,
      combine=combine,
      combiner=combiner,
      head_scale=scale,
      **RADII,
      **ball,
    )
    for ball, scale in ways
  ]
  states = []
  for tx in aggregators:
    state = tx.init(PROBLEM.params)
    if two_states:
      state = state._replace(flat=state.flat._replace(mark=jnp.array(3.0)))
    states.append(state)
  found = quick_compile.jit(
    lambda states: [
      update(tx, PROBLEM, state=state)
      for tx, state in zip(aggregators, states, strict=True)
    ]
  )(states)

  sums = combiner_reference or (lambda rows: rows.sum(axis=0))
  w = quadratics.COEFFICIENTS
  for (ball, scale), (updates, state) in zip(ways, found, strict=True):
    first, flat, s = PROBLEM.stacks(
      combine=combine, combiner=sums, **RADII, **ball
    )
    shared, parts = w @ first, [(state.loss, 1, first)]
    if two_states:
      shared = sums(np.stack([shared, 3 * w @ flat]))
      parts.append((state.flat, 3, flat))
    else:
      assert not jax.tree.leaves(state.flat)
    for part, mark, stack in parts:
      assert part.mark == mark, (ball, scale)
      np.testing.assert_array_equal(part.losses, quadratics.losses())
      seen, _ = quadratics.vectors(
        {**part.stack, 'heads': PROBLEM.params['heads']}
      )
      np.testing.assert_allclose(
        seen, stack, atol=1e-5 * np.abs(stack).max(), err_msg=f'{ball}'
      )
    heads = s[:, 6:] * (w[:, None] if scale == 'weights' else 1)
    expected = shared[None], heads[None]
    quadratics.assert_is_one_of(updates, expected, name=(ball, scale))


def test_radius_zero_leaves_loss_gradients_and_flat_ones_of_zero():
  """A of nothing is nothing (`test_contract_numbers`): A(g) is left."""
  makes = {
    name: functools.partial(
      mtl_jax.flat_minima,
      quadratics.recording(),
      quadratics.NAMES,
      combine=name,
    )
    for name in ('separate', 'direct', 'second', 'each')
  }
  tx = {name: make(rho=0) for name, make in makes.items()}
  states = {name: t.init(PROBLEM.params) for name, t in tx.items()}
  found = quick_compile.jit(
    lambda states: {
      n: update(t, PROBLEM, state=states[n]) for n, t in tx.items()
    }
  )(states)
  right = PROBLEM.task_grads['shared']
  for name, (_, state) in found.items():
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
      state.loss.stack['shared'],
      right,
    )
    if name in ('separate', 'second'):
      assert all(np.all(x == 0) for x in jax.tree.leaves(state.flat.stack))


@pytest.mark.parametrize('method', **quadratics.by_name(quadratics.KNOWN))
def test_update_is_the_closed_form(method):
  expected = closed_form(
    method, head_scale=quadratics.head_scale(method), **quadratics.RADII
  )
  found = quadratics.flat(method)['all tasks']
  quadratics.assert_is_one_of(found.updates, expected)


@pytest.mark.parametrize('norm', ['separate', 'joint'])
def test_heads_take_the_radius_of_the_shared_part_unless_given_their_own(norm):
  linear = quadratics.FACTORIES[0]
  tx = mtl_jax.flat_minima(
    quadratics.compiled(linear), quadratics.NAMES, rho=0.3, norm=norm
  )
  updates, _ = update(tx, PROBLEM)
  quadratics.assert_is_one_of(
    updates, closed_form(linear, rho=0.3, rho_heads=0.3, norm=norm)
  )


def test_schedules_of_both_radii_are_called_with_the_number_of_updates():
  linear = quadratics.FACTORIES[0]
  tx = mtl_jax.flat_minima(
    quadratics.compiled(linear),
    quadratics.NAMES,
    rho=lambda count: 0.1 + 0.2 * count,
    rho_heads=lambda count: 0.5 / (1 + count),
  )
  state = tx.init(PROBLEM.params)
  radii = [(0.1, 0.5), (0.3, 0.25), (0.5, 0.5 / 3)]
  for rho, rho_heads in radii:
    updates, state = update(tx, PROBLEM, state=state)
    quadratics.assert_is_one_of(
      updates, closed_form(linear, rho=rho, rho_heads=rho_heads)
    )
  assert state.count == len(radii)


def perturbations(params, task_grads, **options):
  """What is added to the parameters of tasks 'a' and 'b'."""
  tx = mtl_jax.flat_minima(mtl_jax.linear(), ('a', 'b'), **options)

  @quick_compile.jit
  def seen(state, params, task_grads):
    found = []

    def grad_fn(task_params):
      found.append(task_params)
      return task_grads

    tx.update(task_grads, state, params, grad_fn=grad_fn)
    return found

  (task_params,) = seen(tx.init(params), params, task_grads)
  difference = jax.tree.map(
    lambda moved, start: moved - jnp.broadcast_to(start, moved.shape),
    task_params,
    params,
  )
  return jax.tree.map(np.asarray, difference)


BY_HAND_PARAMS = {
  'shared': jnp.array([2.0, -1.0]),
  'heads': {'a': jnp.array([3.0]), 'b': jnp.array([0.5])},
}
BY_HAND_GRADS = {
  'shared': jnp.array([[3.0, 4.0], [0.0, -2.0]]),
  'heads': {'a': jnp.array([-12.0]), 'b': jnp.array([1.5])},
}


def test_separate_norms_move_shared_part_and_head_by_their_own_radius():
  moved = perturbations(
    BY_HAND_PARAMS, BY_HAND_GRADS, rho=0.1, rho_heads=0.2, norm='separate'
  )
  np.testing.assert_allclose(
    moved['shared'], [[0.06, 0.08], [0.0, -0.1]], atol=1e-6
  )
  np.testing.assert_allclose(moved['heads']['a'], [-0.2], atol=1e-6)
  np.testing.assert_allclose(moved['heads']['b'], [0.2], atol=1e-6)


def test_joint_norm_divides_both_by_the_length_of_the_whole_gradient():
  moved = perturbations(
    BY_HAND_PARAMS, BY_HAND_GRADS, rho=0.1, rho_heads=0.2, norm='joint'
  )
  # The lengths are |(3, 4, -12)| = 13 and |(0, -2, 1.5)| = 2.5.
  np.testing.assert_allclose(
    moved['shared'], [[0.3 / 13, 0.4 / 13], [0.0, -0.2 / 2.5]], atol=1e-6
  )
  np.testing.assert_allclose(moved['heads']['a'], [-2.4 / 13], atol=1e-6)
  np.testing.assert_allclose(moved['heads']['b'], [0.3 / 2.5], atol=1e-6)


def test_adaptive_perturbation_is_elementwise_in_the_squared_parameters():
  moved = perturbations(BY_HAND_PARAMS, BY_HAND_GRADS, rho=0.1, adaptive=True)
  # w^2 g = (12, 4) and (0, -2); |w| g = (6, 4) and (0, -2).
  length = np.sqrt(52.0)
  np.testing.assert_allclose(
    moved['shared'], [[1.2 / length, 0.4 / length], [0.0, -0.1]], atol=1e-6
  )
  # A single number w: w^2 g / | |w| g | = |w| sign(g).
  np.testing.assert_allclose(moved['heads']['a'], [-0.3], atol=1e-6)
  np.testing.assert_allclose(moved['heads']['b'], [0.05], atol=1e-6)


def test_adaptive_perturbation_follows_a_rescaling_of_the_parameters():
  # With w = D v the gradient in v is D g; both must move to the same place.
  scale = {
    'shared': jnp.array([4.0, 0.25]),
    'heads': {'a': jnp.array([2.0]), 'b': jnp.array([8.0])},
  }
  rescaled_params = jax.tree.map(jnp.divide, BY_HAND_PARAMS, scale)
  rescaled_grads = jax.tree.map(
    lambda g, d: g * jnp.broadcast_to(d, g.shape), BY_HAND_GRADS, scale
  )
  moved = perturbations(BY_HAND_PARAMS, BY_HAND_GRADS, adaptive=True)
  rescaled = perturbations(rescaled_params, rescaled_grads, adaptive=True)
  jax.tree.map(
    lambda e, f, d: np.testing.assert_allclose(e, f * d, atol=1e-6),
    moved,
    rescaled,
    jax.tree.map(np.asarray, scale),
  )


def test_without_heads_and_labels_everything_is_shared():
  A = np.array([[2.0, 0.5], [1.0, 3.0]])
  centres = np.array([[1.0, 0.0], [0.0, 2.0]])
  theta = np.array([-1.0, 1.5])
  grad_fn = lambda x: (
    jnp.asarray(A, 'float32') * (x - jnp.asarray(centres, 'float32'))
  )
  tx = mtl_jax.flat_minima(mtl_jax.linear(), ('a', 'b'), rho=0.25)
  params = jnp.asarray(theta, jnp.float32)
  task_grads = grad_fn(jnp.stack([params, params]))
  updates, _ = tx.update(task_grads, tx.init(params), params, grad_fn=grad_fn)
  g = A * (theta - centres)
  s = A * (
    theta + 0.25 * g / np.linalg.norm(g, axis=1, keepdims=True) - centres
  )
  np.testing.assert_allclose(updates, s.mean(axis=0), rtol=1e-6)


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_update_and_task_parameters_keep_the_dtype_they_came_in(dtype):
  cast = lambda tree: jax.tree.map(lambda x: x.astype(dtype), tree)
  seen = []

  def grad_fn(task_params):
    seen.append(task_params)
    return cast(BY_HAND_GRADS)

  params = cast(BY_HAND_PARAMS)
  tx = mtl_jax.flat_minima(mtl_jax.linear(), ('a', 'b'))
  updates, _ = tx.update(
    cast(BY_HAND_GRADS), tx.init(params), params, grad_fn=grad_fn
  )
  for leaf in jax.tree.leaves((seen, updates)):
    assert leaf.dtype == dtype
