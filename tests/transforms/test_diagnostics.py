"""What a state shows, against numbers made by hand."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quick_compile

import mtl_jax

# Inner products: g1.g2 = 0, g1.g3 = -2, g2.g3 = 3; lengths 2, 3, sqrt 2.
GRADS = jnp.array([[2.0, 0.0], [0.0, 3.0], [-1.0, 1.0]])


def _shown(tx, **extra):
  params = jnp.zeros(2)

  @quick_compile.jit
  def shown(state):
    _, state = tx.update(GRADS, state, params, **extra)
    return mtl_jax.diagnostics(state)

  return shown(tx.init(params))


def test_numbers_of_the_mean_by_hand():
  shown = _shown(mtl_jax.linear(num_tasks=3))
  np.testing.assert_allclose(shown['task_weights'], 1 / 3)
  np.testing.assert_allclose(
    shown['gram'], [[4, 0, -2], [0, 9, 3], [-2, 3, 2]], rtol=1e-6
  )
  np.testing.assert_allclose(shown['gradient_norms'], [2, 3, 2**0.5])
  np.testing.assert_allclose(shown['conflict'], 1 / 3)
  np.testing.assert_allclose(shown['mean_cosine'], 1, rtol=1e-6)
  assert 'residual' not in shown


def test_cosine_with_the_mean_by_hand():
  # The mean is (1/3, 4/3); the first task alone is (2, 0).
  shown = _shown(mtl_jax.linear(weights=(1, 0, 0), num_tasks=3))
  np.testing.assert_allclose(shown['mean_cosine'], 1 / 17**0.5, rtol=1e-6)


def test_absent_tasks_are_no_pairs():
  active = jnp.array([True, False, True])
  shown = _shown(mtl_jax.mgda(num_tasks=3), active=active)
  np.testing.assert_allclose(shown['conflict'], 1.0)
  assert shown['gradient_norms'][1] == 0
  # The nearest point to zero of the segment from (2, 0) to (-1, 1).
  np.testing.assert_allclose(shown['task_weights'], [0.4, 0, 0.6], rtol=1e-5)
  assert shown['residual'] <= 1e-6


def test_state_is_found_in_a_chain():
  tx = optax.chain(mtl_jax.linear(num_tasks=3), optax.adam(1e-3))
  np.testing.assert_allclose(_shown(tx)['task_weights'], 1 / 3)


def test_both_parts_of_flat_minima_are_shown_apart():
  # Losses 1/2 k |x - c|^2: flat gradients are k times the perturbation.
  stiffness = jnp.array([[1.0], [2.0], [3.0]])
  tx = optax.chain(
    mtl_jax.flat_minima(mtl_jax.linear(), ('a', 'b', 'c'), rho=0.1),
    optax.sgd(1.0),
  )
  shown = _shown(tx, grad_fn=lambda x: GRADS + stiffness * x)
  np.testing.assert_allclose(shown['loss/gradient_norms'], [2, 3, 2**0.5])
  np.testing.assert_allclose(
    shown['flat/gradient_norms'], [0.1, 0.2, 0.3], rtol=1e-5
  )
  assert set(shown) == {
    f'{part}/{name}'
    for part in ('loss', 'flat')
    for name in (
      'task_weights',
      'gram',
      'gradient_norms',
      'conflict',
      'mean_cosine',
    )
  }


def test_several_aggregators_are_told_apart_by_their_place():
  tx = optax.partition(
    {'x': mtl_jax.linear(num_tasks=3), 'y': mtl_jax.mgda(num_tasks=3)},
    {'first': 'x', 'second': 'y'},
  )
  params = {'first': jnp.zeros(2), 'second': jnp.zeros(2)}
  grads = {'first': GRADS, 'second': GRADS}
  _, state = tx.update(grads, tx.init(params), params)
  shown = mtl_jax.diagnostics(state)
  weights = [name for name in shown if name.endswith('task_weights')]
  assert len(weights) == 2
  assert any(name.endswith('residual') for name in shown)


@pytest.mark.parametrize(
  'tx', [optax.adam(1e-3), mtl_jax.linear(), mtl_jax.cagrad()]
)
def test_nothing_to_see_is_an_empty_dictionary(tx):
  assert mtl_jax.diagnostics(tx.init(jnp.zeros(2))) == {}
