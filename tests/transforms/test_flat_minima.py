"""The update of `flat_minima` against its closed form on quadratics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quadratics
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
  return tx.update(
    problem.task_grads,
    state,
    problem.params,
    grad_fn=problem.grad_fn,
    losses=quadratics.losses(len(problem.names)),
    **extra_args,
  )


def closed_form(method, **options):
  right = lambda J: method.right(J, quadratics.losses(), range(quadratics.SIZE))
  return PROBLEM.update(right, **options)


# The closed form scales heads by the coefficients of the task gradients.
WAYS = [
  pytest.param(method, head_scale, id=f'{method.name}-{head_scale}')
  for method in quadratics.FACTORIES
  for head_scale in ('none', 'weights')
  if method in quadratics.KNOWN
  if head_scale == 'none' or method.weights == 'gradients'
]
# The perturbation knows nothing of the method: with the other norms and balls
# one of each kind will do (without a solver, with one, random, without weights,
# with memory).
KINDS = ('linear', 'mgda', 'pcgrad', 'cagrad_0.1', 'trimmed_mean', 'moco')
BALLS = [('joint', False), ('separate', True), ('joint', True)]
CASES = [
  pytest.param(*way.values, 'separate', False, id=f'{way.id}-separate-sam')
  for way in WAYS
] + [
  pytest.param(
    *way.values,
    norm,
    adaptive,
    id=f'{way.id}-{norm}-{"asam" if adaptive else "sam"}',
  )
  for way in WAYS
  if way.values[0].name in KINDS
  for norm, adaptive in BALLS
]


def test_every_kind_of_method_is_in_the_cases():
  names = {way.values[0].name for way in WAYS}
  assert names.issuperset(KINDS)


@pytest.mark.parametrize('combination', COMBINATIONS)
@pytest.mark.parametrize(('method', 'head_scale', 'norm', 'adaptive'), CASES)
def test_update_is_the_closed_form(
  method, norm, adaptive, combination, head_scale
):
  combine, combiner, combiner_reference = COMBINATIONS[combination]
  options = {'norm': norm, 'adaptive': adaptive, 'head_scale': head_scale}
  radii = {'rho': 0.3, 'rho_heads': 0.7}
  tx = mtl_jax.flat_minima(
    quadratics.compiled(method),
    quadratics.NAMES,
    combine=combine,
    combiner=combiner,
    **radii,
    **options,
  )
  updates, _ = update(tx, PROBLEM)
  expected = closed_form(
    method, combine=combine, combiner=combiner_reference, **radii, **options
  )
  quadratics.assert_is_one_of(updates, expected)


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
  seen = []

  def grad_fn(task_params):
    seen.append(task_params)
    return task_grads

  tx = mtl_jax.flat_minima(mtl_jax.linear(), ('a', 'b'), **options)
  tx.update(task_grads, tx.init(params), params, grad_fn=grad_fn)
  (task_params,) = seen
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
