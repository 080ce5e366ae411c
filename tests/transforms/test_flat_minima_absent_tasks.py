"""Tasks without a label in the batch, inside `flat_minima`."""

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

import mtl_jax

PROBLEM = quadratics.Quadratics.random()
# The task in the middle is absent; of the two others PCGrad has one result.
PRESENT = (0, 2)
ABSENT = 1
ONE_ABSENT = [name for name in quadratics.SITUATIONS if 'absent' in name]


def expected(method, **options):
  """Of the active tasks alone, in NumPy; the absent head does not move."""
  losses = np.take(methods.LOSSES, PRESENT)
  shared, heads = PROBLEM.take(PRESENT).update(
    lambda J: method.right(J, losses, PRESENT), **quadratics.RADII, **options
  )
  return shared, np.insert(heads, ABSENT, 0, axis=1)


@pytest.mark.parametrize('method', **quadratics.by_name(quadratics.KNOWN))
def test_result_is_that_of_the_active_tasks_alone(method):
  right = expected(method, head_scale=quadratics.head_scale(method))
  for name in ONE_ABSENT:
    found = quadratics.flat(method)[name]
    quadratics.assert_is_one_of(found.updates, right, name=name)


@pytest.mark.parametrize('method', **quadratics.by_name(methods.METHODS))
def test_an_absent_task_has_no_weight_in_either_part(method):
  for name in ONE_ABSENT:
    shown = quadratics.flat(method)[name].shown
    for part in ('loss', 'flat'):
      assert np.all(np.isfinite(shown[f'{part}/gram'])), name
      if method.weights != 'none':
        weights = shown[f'{part}/task_weights']
        assert weights[ABSENT] == 0, name
        assert np.all(np.isfinite(weights)), name


@pytest.mark.parametrize('method', **quadratics.by_name(quadratics.FACTORIES))
def test_no_active_task_means_a_zero_update(method):
  assert_nothing_moves(quadratics.flat(method)['none active'])


def assert_nothing_moves(found, name=''):
  for leaf in jax.tree.leaves(found.updates):
    np.testing.assert_array_equal(leaf, 0, err_msg=str(name))
  assert_not_perturbed(found, range(quadratics.SIZE), name)
  for key, value in found.shown.items():
    assert np.all(np.isfinite(value)), (name, key)


def assert_not_perturbed(found, tasks, name=''):
  shared, heads = quadratics.vectors(found.task_params)
  for task in tasks:
    for moved, start in (
      (shared[task], PROBLEM.shared),
      (heads[task], PROBLEM.heads[task]),
    ):
      np.testing.assert_array_equal(
        moved, start.astype('float32'), err_msg=str(name)
      )


@pytest.mark.parametrize('combine', ['separate', 'direct', 'second', 'each'])
def test_absent_tasks_count_in_no_ball_no_combination_and_no_head(combine):
  (linear,) = (m for m in methods.METHODS if m.name == 'linear')
  ways = {
    f'{norm}, {"asam" if adaptive else "sam"}, {scale}': {
      'norm': norm,
      'adaptive': adaptive,
      'head_scale': scale,
    }
    for norm in ('separate', 'joint')
    for adaptive in (False, True)
    for scale in ('none', 'weights')
  }
  make = lambda options: functools.partial(
    mtl_jax.flat_minima,
    mtl_jax.linear(),
    quadratics.NAMES,
    combine=combine,
    **options,
  )
  found = quadratics.situations(
    PROBLEM, {name: make(options) for name, options in ways.items()}
  )
  for way, options in ways.items():
    right = expected(linear, combine=combine, **options)
    ball = {name: options[name] for name in ('norm', 'adaptive')}
    moved = PROBLEM.perturbed(**quadratics.RADII, **ball)
    for situation in ONE_ABSENT:
      name = f'{way}, {situation}'
      one = found[way][situation]
      quadratics.assert_is_one_of(one.updates, right, name=name)
      assert_not_perturbed(one, [ABSENT], name)
      x = np.concatenate(quadratics.vectors(one.task_params), axis=1)
      np.testing.assert_allclose(
        x[[*PRESENT]], moved[[*PRESENT]], rtol=1e-5, err_msg=name
      )
    assert_nothing_moves(found[way]['none active'], way)


def test_the_flat_gradient_of_an_absent_task_is_zero():
  tx = mtl_jax.flat_minima(quadratics.recording(), quadratics.NAMES)
  keep = jnp.array([True, False, True])
  broken = lambda grads: quadratics.filled(grads, keep, jnp.nan)

  @quick_compile.jit
  def step(state):
    return tx.update(
      broken(PROBLEM.task_grads),
      state,
      PROBLEM.params,
      grad_fn=lambda own: broken(PROBLEM.grad_fn(own)),
      losses=quadratics.losses(),
      active=keep,
    )[1]

  for leaf in jax.tree.leaves(step(tx.init(PROBLEM.params)).flat.stack):
    np.testing.assert_array_equal(leaf[ABSENT], 0)
    assert np.all(np.isfinite(leaf))


def test_active_is_read_as_truth_values_whatever_its_dtype():
  tx = mtl_jax.flat_minima(
    mtl_jax.linear(), quadratics.NAMES, **quadratics.RADII
  )
  by_bool, by_count = (
    tx.update(
      PROBLEM.task_grads,
      tx.init(PROBLEM.params),
      PROBLEM.params,
      grad_fn=PROBLEM.grad_fn,
      active=active,
    )[0]
    for active in (jnp.array([True, False, True]), jnp.array([5.0, 0.0, 2.0]))
  )
  jax.tree.map(np.testing.assert_array_equal, by_count, by_bool)
  assert np.all(by_bool['heads']['depth']['scale'] == 0)


def test_what_absent_tasks_hold_does_not_reach_an_aggregator_of_optax():
  mean = aggregating.Aggregator(
    lambda params: optax.EmptyState(),
    lambda rows, state, params=None: (
      jax.tree.map(lambda x: x.sum(0), rows),
      state,
    ),
  )
  rows = jnp.array([[1.0, 2.0], [jnp.nan, jnp.inf]])
  active = jnp.array([True, False])
  for tx in (
    mtl_jax.flat_minima(mean, ('a', 'b'), rho=0.0),
    mtl_jax.shared_only(mean, ('a', 'b')),
  ):
    params = jnp.zeros(2)
    updates, _ = tx.update(
      rows,
      tx.init(params),
      params,
      grad_fn=lambda task_params: rows,
      active=active,
    )
    np.testing.assert_allclose(updates, [1, 2])
