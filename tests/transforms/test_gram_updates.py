"""Gram-based updates without a stack are those with one."""

import functools

import jax
import jax.numpy as jnp
import methods
import numpy as np
import pytest
import quadratics
import quick_compile

import mtl_jax
from mtl_jax import gram_based

PROBLEM = quadratics.Quadratics.random()
NAMES = quadratics.NAMES
WAYS = {
  'plain': {},
  'plain, heads by weights': {'head_scale': 'weights'},
  'flat': {'rho': 0.3, 'rho_heads': 0.6},
  'flat asam': {
    'rho': lambda count: 0.3 + 0.1 * count,
    'adaptive': True,
    'norm': 'joint',
    'head_scale': 'weights',
  },
}
# Extra stacks, tracked or remembered gradients, or no weights.
REFUSED = tuple(
  m
  for m in methods.METHODS
  if m.weights != 'gradients' or m.extra_batches or m.name == 'excess_mtl'
)
GRAM_BASED = [
  m for m in quadratics.FACTORIES if m.name not in {r.name for r in REFUSED}
]
# The gradients know nothing of the method: one of each kind (in closed form,
# with a solver, random, with memory) will do for most ways.
KINDS = ('linear', 'mgda', 'pcgrad', 'gradnorm')
CASES = [
  pytest.param(m, way, id=f'{m.name}-{way}')
  for m in GRAM_BASED
  for way in WAYS
  if way == 'flat' or m.name in KINDS
]


def loss_fn(params):
  A, c = (jnp.asarray(x, jnp.float32) for x in (PROBLEM.A, PROBLEM.c))
  shared = params['shared']
  shared = jnp.concatenate([shared['kernel'].reshape(-1), shared['bias']])
  losses = {}
  for i, task in enumerate(NAMES):
    head = params['heads'][task]
    own = jnp.concatenate([head['scale'], head['offset'].reshape(1)])
    x = jnp.concatenate([shared, own]) - c[i]
    losses[task] = 0.5 * jnp.einsum('i,ij,j', x, A[i], x, precision='highest')
  return losses


@functools.cache
def with_a_stack(name, way):
  """`(params, state, active) -> (updates, state)`, and its first state."""
  method = next(m for m in methods.METHODS if m.name == name)
  at, at_each = mtl_jax.task_grad(loss_fn, NAMES)
  aggregator, options = method.make(range(3), num_tasks=3), dict(WAYS[way])
  if 'rho' in options:
    tx = mtl_jax.flat_minima(aggregator, NAMES, **options)
  else:
    tx = mtl_jax.shared_only(aggregator, NAMES, **options)

  def update(params, state, active):
    (losses, _), task_grads = at(params)
    return tx.update(
      task_grads,
      state,
      params,
      losses=losses,
      active=active,
      grad_fn=lambda own: at_each(own)[1],
    )

  return quick_compile.jit(update), tx.init(PROBLEM.params)


@functools.cache
def without(name, way):
  method = next(m for m in methods.METHODS if m.name == name)
  aggregator = method.make(range(3), num_tasks=3)
  step = mtl_jax.gram_update(loss_fn, aggregator, NAMES, **WAYS[way])
  update = lambda params, state, active: step.update(
    params, state, active=active
  )
  return quick_compile.jit(update), step.init(PROBLEM.params)


@pytest.mark.parametrize(('method', 'way'), CASES)
def test_update_is_that_with_a_stack(method, way):
  (expected_of, expected_state) = with_a_stack(method.name, way)
  (found_of, state) = without(method.name, way)
  for active in ([True, True, True], [True, False, True], [False] * 3):
    params, one, other = PROBLEM.params, expected_state, state
    for _ in range(2):
      expected, one = expected_of(params, one, np.array(active))
      (losses, aux), found, other = found_of(params, other, np.array(active))
      assert aux is None
      right = quadratics.vectors(expected)
      # Of heads and of the shared part, relative to their own length.
      for part, wanted in zip(quadratics.vectors(found), right, strict=True):
        np.testing.assert_allclose(
          part, wanted, atol=1e-5 * np.linalg.norm(wanted)
        )
      np.testing.assert_allclose(
        losses, list(loss_fn(params).values()), rtol=1e-6
      )
      params = jax.tree.map(lambda p, u: p - 0.1 * u, params, expected)
    shown, wanted = mtl_jax.diagnostics(other), mtl_jax.diagnostics(one)
    for key, value in wanted.items():
      np.testing.assert_allclose(shown[key], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('method', methods.params(REFUSED))
def test_method_that_needs_more_than_inner_products_is_refused(method):
  with pytest.raises(ValueError, match='map from the Gram matrix'):
    mtl_jax.gram_update(loss_fn, method.make(range(3), num_tasks=3), NAMES)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'rho': -1.0}, 'rho must be finite and not negative, got -1.0'),
    ({'rho': 0.1, 'norm': 'both'}, "norm must be one of .*got 'both'"),
    ({'head_scale': 'half'}, "head_scale must be one of .*got 'half'"),
    ({'rho': 0.1, 'eps': 0.0}, 'eps must be positive'),
  ],
)
def test_arguments_out_of_range_are_named(options, message):
  with pytest.raises(ValueError, match=message):
    mtl_jax.gram_update(loss_fn, mtl_jax.mgda(), NAMES, **options)


def test_aggregator_with_axes_is_refused():
  with pytest.raises(ValueError, match='must have no axes'):
    mtl_jax.gram_update(loss_fn, mtl_jax.mgda(axis_name='i'), NAMES)


@pytest.mark.parametrize('share', [0.5, 2.0])
def test_flat_gradients_that_are_only_rounding_have_no_weight(share):
  options = gram_based.Options(
    mtl_jax.linear(),
    2,
    rho=0.1,
    rho_heads=None,
    norm='separate',
    head_scale=None,
    eps=1e-12,
  )
  resolution = float(jnp.finfo(jnp.float32).eps)
  weights, state = gram_based.weights_of_flat(
    options.inner,
    jnp.diag(jnp.array([share * resolution**2, 1.0])),
    jnp.eye(2),
    options.init(None).flat,
    jnp.ones(2),
    jnp.array([True, True]),
    [jnp.ones(3)],
  )
  np.testing.assert_array_equal(weights, [0.0 if share < 1 else 0.5, 0.5])
  shown = mtl_jax.diagnostics(state)['gram'][0, 0]
  assert (shown == 0) == (share < 1)


@pytest.mark.parametrize('name', ['linear', 'nash_mtl', 'pcgrad'])
@pytest.mark.parametrize('way', ['plain', 'flat'])
def test_gradient_that_is_not_finite_reaches_the_update(name, way):
  update, state = without(name, way)
  params = jax.tree.map(lambda x: x, PROBLEM.params)
  params['heads'][NAMES[1]]['scale'] *= jnp.nan
  _, grads, _ = update(params, state, np.array([True] * 3))
  for leaf in jax.tree.leaves(grads['shared']):
    assert not np.any(np.isfinite(leaf))
  # An absent task's is none of the others' business.
  _, grads, _ = update(params, state, np.array([True, False, True]))
  for leaf in jax.tree.leaves(grads['heads'][NAMES[1]]):
    np.testing.assert_array_equal(leaf, 0)


TASKS, WIDTH = 8, 192


def _large(params, x):
  hidden = jnp.tanh(x @ params['shared'])
  return {
    f't{i}': jnp.sum(hidden @ params['heads'][f't{i}']) ** 2
    for i in range(TASKS)
  }


@pytest.mark.parametrize(
  ('options', 'copies'), [({}, 2), ({'rho': 0.1}, 4)], ids=['plain', 'flat']
)
def test_no_more_copies_of_the_gradient_than_promised(options, copies):
  names = [f't{i}' for i in range(TASKS)]
  params = {
    'shared': jnp.ones((WIDTH, WIDTH)),
    'heads': {task: jnp.ones(WIDTH) for task in names},
  }
  step = mtl_jax.gram_update(_large, mtl_jax.mgda(), names, **options)
  compiled = (
    jax.jit(step.update)
    .lower(params, step.init(params), jnp.ones((2, WIDTH)))
    .compile(quick_compile.DEFAULTS)
  )
  size = params['shared'].nbytes
  temporary = compiled.memory_analysis().temp_size_in_bytes
  assert temporary <= (copies + 0.5) * size
