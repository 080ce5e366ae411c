"""Gram-based updates without a stack are those with one."""

import comparing
import jax
import jax.numpy as jnp
import methods
import numpy as np
import pytest
import quadratics
import quick_compile

import mtl_jax
from mtl_jax.updates import _gram_based

PROBLEM = quadratics.Quadratics.random()
NAMES = quadratics.NAMES
# The gradients know nothing of the method: one of each kind (in closed form,
# with a solver, random, with memory) will do. What makes weights of a Gram
# matrix is compared for every method in tests/transforms/test_weigh.py.
KINDS = ('linear', 'mgda', 'pcgrad', 'gradnorm')
ACTIVES = ([1, 1, 1], [1, 0, 1], [1, 1, 1], [0, 0, 0])


def loss_fn(params, batch):
  del batch
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


LOSSES = mtl_jax.task_losses(loss_fn, NAMES, engine='unroll')


def aggregator_of(name):
  (method,) = (m for m in methods.METHODS if m.name == name)
  return method.make(range(3), num_tasks=3)


def pair(name, flat=None, **options):
  """The update without a stack, and the one with it."""
  joint = mtl_jax.gram_update(
    aggregator_of(name),
    NAMES,
    flat=None if flat is None else mtl_jax.Perturbation(**flat),
    **options,
  )
  if flat is None:
    tx = mtl_jax.shared_only(aggregator_of(name), NAMES, **options)
  else:
    tx = mtl_jax.flat_minima(aggregator_of(name), NAMES, **flat, **options)
  return joint, mtl_jax.stack_update(tx)


def test_plain_update_is_that_with_a_stack():
  pairs = {name: pair(name) for name in KINDS} | {
    'heads by weights': pair('pcgrad', head_scale='weights')
  }
  batches = comparing.batches_of(NAMES, ACTIVES)
  comparing.assert_same_updates(LOSSES, pairs, PROBLEM.params, batches, 1e-5)


def test_flat_update_is_that_with_two_stacks():
  radii = {'rho': 0.3, 'rho_heads': 0.6}
  asam = {
    'rho': lambda count: 0.3 + 0.1 * count,
    'adaptive': True,
    'norm': 'joint',
  }
  pairs = {name: pair(name, radii) for name in ('mgda', 'pcgrad')} | {
    'asam': pair('gradnorm', asam, head_scale='weights')
  }
  batches = comparing.batches_of(NAMES, ACTIVES)
  comparing.assert_same_updates(LOSSES, pairs, PROBLEM.params, batches)


@pytest.mark.parametrize(
  'make', [mtl_jax.gram_update, mtl_jax.ghost_update], ids=['gram', 'ghost']
)
def test_a_method_that_needs_more_than_inner_products_is_refused(make):
  refused = []
  for method in methods.METHODS:
    try:
      make(method.make(range(3), num_tasks=3), NAMES)
    except ValueError as error:
      assert 'map from the Gram matrix' in str(error)
      refused.append(method.name)
  assert refused == [
    m.name
    for m in methods.METHODS
    if m.make(range(3), num_tasks=3).weigh is None
  ]
  assert 'graddrop' in refused


@pytest.mark.parametrize(
  'make', [mtl_jax.gram_update, mtl_jax.ghost_update], ids=['gram', 'ghost']
)
def test_arguments_out_of_range_are_named(make):
  with pytest.raises(ValueError, match=r"head_scale must be .*got 'half'"):
    make(mtl_jax.mgda(), NAMES, head_scale='half')
  with pytest.raises(ValueError, match='without axes'):
    make(mtl_jax.mgda(axis_name='i'), NAMES)
  for options, message in (
    ({'rho': -1.0}, 'rho must be finite and not negative, got -1.0'),
    ({'norm': 'both'}, "norm must be one of .*got 'both'"),
    ({'eps': 0.0}, 'eps must be positive'),
  ):
    with pytest.raises(ValueError, match=message):
      mtl_jax.Perturbation(**options)


@pytest.mark.parametrize('share', [0.5, 2.0])
def test_flat_gradients_that_are_only_rounding_have_no_weight(share):
  method = _gram_based.GramMethod(
    'gram_update', mtl_jax.linear(), 2, mtl_jax.Perturbation(0.1), None
  )
  resolution = float(jnp.finfo(jnp.float32).eps)
  weights, state = method.flat_weights(
    jnp.diag(jnp.array([share * resolution**2, 1.0])),
    jnp.eye(2),
    method.init(None).flat,
    _gram_based.Given(jnp.ones(2), jnp.array([True, True])),
    [jnp.ones(3)],
  )
  np.testing.assert_array_equal(weights, [0.0 if share < 1 else 0.5, 0.5])
  shown = mtl_jax.diagnostics(state)['gram'][0, 0]
  assert (shown == 0) == (share < 1)


def test_a_gradient_that_is_not_finite_reaches_the_update_if_present():
  joints = [
    mtl_jax.gram_update(aggregator_of('nash_mtl'), NAMES, flat=flat)
    for flat in (None, mtl_jax.Perturbation(0.3))
  ]
  params = jax.tree.map(lambda x: x, PROBLEM.params)
  params['heads'][NAMES[1]]['scale'] *= jnp.nan

  @quick_compile.jit
  def run(batch):
    here = LOSSES.on(batch)
    return [j.update(here, params, j.init(params))[0].grads for j in joints]

  present, absent = comparing.batches_of(NAMES, ([1, 1, 1], [1, 0, 1]))
  for grads in run(present):
    for leaf in jax.tree.leaves(grads['shared']):
      assert not np.any(np.isfinite(leaf))
  # An absent task's is none of the others' business.
  for grads in run(absent):
    for leaf in jax.tree.leaves(grads):
      assert np.isfinite(leaf).all()
    for leaf in jax.tree.leaves(grads['heads'][NAMES[1]]):
      np.testing.assert_array_equal(leaf, 0)


TASKS, WIDTH = 8, 192


@pytest.mark.parametrize(
  ('flat', 'copies'),
  [(None, 2), (mtl_jax.Perturbation(0.1), 4)],
  ids=['plain', 'flat'],
)
def test_no_more_copies_of_the_gradient_than_promised(flat, copies):
  names = tuple(f't{i}' for i in range(TASKS))
  shape = lambda *numbers: jax.ShapeDtypeStruct(numbers, jnp.float32)
  params = {
    'shared': shape(WIDTH, WIDTH),
    'heads': {task: shape(WIDTH) for task in names},
  }

  def large(params, x):
    hidden = jnp.tanh(x @ params['shared'])
    return {t: jnp.sum(hidden @ params['heads'][t]) ** 2 for t in names}

  losses = mtl_jax.task_losses(large, names)
  joint = mtl_jax.gram_update(mtl_jax.mgda(), names, flat=flat)

  def update(params, state, x):
    found, state = joint.update(losses.on(x), params, state)
    return found.grads, state

  state = jax.eval_shape(joint.init, params)
  compiled = (
    jax.jit(update)
    .lower(params, state, shape(2, WIDTH))
    .compile(quick_compile.DEFAULTS)
  )
  temporary = compiled.memory_analysis().temp_size_in_bytes
  assert temporary <= (copies + 0.5) * 4 * WIDTH**2
