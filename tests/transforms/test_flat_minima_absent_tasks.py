"""Tasks without a label in the batch, inside `flat_minima`."""

import jax
import jax.numpy as jnp
import methods
import numpy as np
import optax
from optax.experimental import aggregating
import pytest
import quadratics

import mtl_jax

PROBLEM = quadratics.Quadratics.random()
# The task in the middle is absent; of the two others PCGrad has one result.
PRESENT = (0, 2)
ABSENT = 1
ACTIVE = jnp.array([True, False, True])
RADII = {'rho': 0.3, 'rho_heads': 0.7}


def with_absent(task_grads, value):
  """Task gradients whose absent task holds `value` everywhere."""
  shared, heads = quadratics.vectors(task_grads, xp=jnp)
  return quadratics.tree(
    shared.at[ABSENT].set(value), heads.at[ABSENT].set(value)
  )


def run(tx, value, active=ACTIVE):
  """One update, its state, and the task parameters that grad_fn was given."""
  seen = []

  def grad_fn(task_params):
    seen.append(task_params)
    return with_absent(PROBLEM.grad_fn(task_params), value)

  updates, state = tx.update(
    with_absent(PROBLEM.task_grads, value),
    tx.init(PROBLEM.params),
    PROBLEM.params,
    grad_fn=grad_fn,
    losses=quadratics.losses().at[ABSENT].set(value),
    active=active,
  )
  return updates, state, *seen


def expected(method, **options):
  """Of the active tasks alone, in NumPy; the absent head does not move."""
  losses = np.take(methods.LOSSES, PRESENT)
  shared, heads = PROBLEM.take(PRESENT).update(
    lambda J: method.right(J, losses, PRESENT), **RADII, **options
  )
  return shared, np.insert(heads, ABSENT, 0, axis=1)


@pytest.mark.parametrize('value', [np.nan, np.inf, 1e3])
@pytest.mark.parametrize('method', **quadratics.by_name(quadratics.KNOWN))
def test_result_is_that_of_the_active_tasks_alone(method, value):
  tx = mtl_jax.flat_minima(
    quadratics.compiled(method), quadratics.NAMES, **RADII
  )
  updates, _, _ = run(tx, value)
  quadratics.assert_is_one_of(updates, expected(method))


@pytest.mark.parametrize('head_scale', ['none', 'weights'])
@pytest.mark.parametrize('norm', ['separate', 'joint'])
@pytest.mark.parametrize('adaptive', [False, True], ids=['sam', 'asam'])
@pytest.mark.parametrize('combine', ['separate', 'direct', 'second', 'each'])
def test_result_is_that_of_the_active_tasks_alone_with_every_option(
  combine, adaptive, norm, head_scale
):
  options = {
    'combine': combine,
    'adaptive': adaptive,
    'norm': norm,
    'head_scale': head_scale,
  }
  (method,) = [m for m in methods.METHODS if m.name == 'linear']
  tx = mtl_jax.flat_minima(
    quadratics.compiled(method), quadratics.NAMES, **RADII, **options
  )
  updates, _, _ = run(tx, np.nan)
  quadratics.assert_is_one_of(updates, expected(method, **options))


@pytest.mark.parametrize('norm', ['separate', 'joint'])
@pytest.mark.parametrize('value', [np.nan, 1e3])
def test_an_absent_task_is_not_perturbed(norm, value):
  tx = mtl_jax.flat_minima(
    mtl_jax.linear(), quadratics.NAMES, norm=norm, **RADII
  )
  _, _, task_params = run(tx, value)
  shared, heads = quadratics.vectors(task_params)
  x = np.concatenate([shared, heads], axis=1)
  start = np.concatenate([PROBLEM.shared, PROBLEM.heads[ABSENT]])
  np.testing.assert_array_equal(x[ABSENT], start.astype('float32'))
  moved = PROBLEM.perturbed(norm=norm, **RADII)
  np.testing.assert_allclose(x[[*PRESENT]], moved[[*PRESENT]], rtol=1e-5)


@pytest.mark.parametrize('method', **quadratics.by_name(quadratics.WEIGHTED))
def test_an_absent_task_has_no_weight_in_either_part(method):
  tx = mtl_jax.flat_minima(quadratics.compiled(method), quadratics.NAMES)
  _, state, _ = run(tx, np.nan)
  for part in (state.loss, state.flat):
    assert part.task_weights[ABSENT] == 0
    assert np.all(np.isfinite(part.task_weights))
    assert np.all(np.isfinite(part.gram))


@pytest.mark.parametrize('combine', ['separate', 'direct', 'second', 'each'])
@pytest.mark.parametrize('method', **quadratics.by_name(quadratics.FACTORIES))
def test_no_active_task_means_a_zero_update(method, combine):
  tx = mtl_jax.flat_minima(
    quadratics.compiled(method), quadratics.NAMES, combine=combine
  )
  updates, state, task_params = run(tx, np.nan, active=jnp.zeros(3, bool))
  for leaf in jax.tree.leaves(updates):
    np.testing.assert_array_equal(leaf, np.zeros_like(leaf))
  jax.tree.map(np.testing.assert_array_equal, task_params, PROBLEM.task_params)
  assert all(
    np.all(np.isfinite(value))
    for value in mtl_jax.diagnostics(state.loss).values()
  )


def test_active_is_read_as_truth_values_whatever_its_dtype():
  tx = mtl_jax.flat_minima(mtl_jax.linear(), quadratics.NAMES, **RADII)
  by_bool, _, _ = run(tx, np.nan)
  by_count, _, _ = run(tx, np.nan, active=jnp.array([5.0, 0.0, 2.0]))
  jax.tree.map(np.testing.assert_array_equal, by_count, by_bool)


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
