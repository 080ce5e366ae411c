"""Shared leaves are aggregated; heads pass, scaled if asked."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick_compile

import mtl_jax

NAMES = ('a', 'b')
PARAMS = {
  'shared': {'w': jnp.array([1.0, -1.0]), 'v': jnp.array(2.0)},
  'heads': {'a': jnp.array([1.0, 2.0]), 'b': jnp.array([3.0])},
}
GRADS = {
  'shared': {
    'w': jnp.array([[3.0, 0.0], [-1.0, 2.0]]),
    'v': jnp.array([1.0, -4.0]),
  },
  'heads': {'a': jnp.array([5.0, 6.0]), 'b': jnp.array([7.0])},
}


def _update(tx, grads=None, params=PARAMS, **extra):
  grads = GRADS if grads is None else grads
  return quick_compile.jit(tx.update)(grads, tx.init(PARAMS), params, **extra)


def _equal(actual, expected):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), actual, expected
  )


def test_aggregator_sees_the_shared_leaves_alone():
  alone = mtl_jax.mgda()
  expected, _ = alone.update(GRADS['shared'], alone.init(PARAMS['shared']))
  updates, _ = _update(mtl_jax.shared_only(mtl_jax.mgda(), NAMES))
  _equal(updates, {'shared': expected, 'heads': GRADS['heads']})


def test_equal_weights_are_the_gradient_of_the_mean_loss_heads_included():
  def losses(params, x):
    hidden = jnp.tanh(params['shared']['w'] @ x + params['shared']['v'])
    return {
      task: jnp.sum((head * hidden - 1) ** 2)
      for task, head in params['heads'].items()
    }

  x = jnp.array([0.3, 0.7])
  at, _ = mtl_jax.task_grad(losses, NAMES)
  _, grads = at(PARAMS, x)
  mean = jax.grad(lambda p: sum(losses(p, x).values()) / 2)(PARAMS)
  # No num_tasks and no head_scale: the default has to be right.
  updates, _ = _update(mtl_jax.shared_only(mtl_jax.linear(), NAMES), grads)
  _equal(updates, mean)


def test_weights_multiply_each_head_by_its_task():
  tx = mtl_jax.shared_only(mtl_jax.mgda(), NAMES, head_scale='weights')
  updates, state = _update(tx)
  a, b = state.task_weights
  assert 0 < float(a) < 1
  _equal(
    updates['heads'],
    {'a': a * GRADS['heads']['a'], 'b': b * GRADS['heads']['b']},
  )


def test_heads_are_not_scaled_by_default_of_other_methods():
  updates, _ = _update(mtl_jax.shared_only(mtl_jax.cagrad(), NAMES))
  _equal(updates['heads'], GRADS['heads'])


def test_frozen_leaves_get_a_zero_update():
  labels = {'shared': {'w': 'shared', 'v': 'frozen'}, 'heads': 'frozen'}
  grads = {**GRADS, 'shared': {'w': GRADS['shared']['w'], 'v': jnp.array(9.0)}}
  tx = mtl_jax.shared_only(mtl_jax.linear(), NAMES, param_labels=labels)
  updates, _ = _update(tx, grads)
  _equal(updates['shared']['w'], jnp.array([1.0, 1.0]))
  assert float(updates['shared']['v']) == 0
  assert not any(np.any(x) for x in jax.tree.leaves(updates['heads']))


def test_labels_may_be_a_function_of_the_parameters():
  params = {'trunk': jnp.array([1.0, 2.0]), 'depth': jnp.array(1.0)}
  grads = {
    'trunk': jnp.array([[2.0, 0.0], [0.0, 4.0]]),
    'depth': jnp.array(3.0),
  }

  def labels(tree):
    return {k: 'b' if k == 'depth' else 'shared' for k in tree}

  tx = mtl_jax.shared_only(mtl_jax.linear(), NAMES, param_labels=labels)
  updates, _ = tx.update(grads, tx.init(params), params)
  _equal(updates, {'trunk': jnp.array([1.0, 2.0]), 'depth': jnp.array(1.5)})


def test_tree_without_heads_is_shared_as_a_whole():
  params = {'w': jnp.zeros(2)}
  tx = mtl_jax.shared_only(mtl_jax.linear(), NAMES)
  updates, _ = tx.update({'w': GRADS['shared']['w']}, tx.init(params), params)
  _equal(updates['w'], jnp.array([1.0, 1.0]))


@pytest.mark.parametrize('head_scale', ['none', 'weights'])
def test_head_of_an_absent_task_is_not_updated(head_scale):
  grads = {
    'shared': jax.tree.map(lambda g: g.at[1].set(jnp.nan), GRADS['shared']),
    'heads': {**GRADS['heads'], 'b': jnp.array([jnp.nan])},
  }
  tx = mtl_jax.shared_only(mtl_jax.mgda(), NAMES, head_scale=head_scale)
  updates, _ = _update(tx, grads, active=jnp.array([True, False]))
  _equal(updates['shared'], jax.tree.map(lambda g: g[0], GRADS['shared']))
  _equal(updates['heads'], {'a': GRADS['heads']['a'], 'b': jnp.zeros(1)})


def test_nothing_shared_leaves_heads_as_they_are():
  params = {'shared': {}, 'heads': PARAMS['heads']}
  grads = {'shared': {}, 'heads': GRADS['heads']}
  tx = mtl_jax.shared_only(mtl_jax.cagrad(num_tasks=2), NAMES)
  updates, _ = tx.update(grads, tx.init(params), params)
  _equal(updates, grads)


@pytest.mark.parametrize(
  ('grads', 'message'),
  [
    (
      {**GRADS, 'heads': {**GRADS['heads'], 'b': jnp.zeros((2, 1))}},
      r"heads'\]\['b'\].*\(2, 1\), expected \(1,\)",
    ),
    (
      {**GRADS, 'shared': PARAMS['shared']},
      r"shared'\]\['v'\].*\(\), expected \(2,\)",
    ),
    (
      jax.tree.map(lambda x: x, {**GRADS, 'shared': {'w': jnp.zeros((3, 2))}}),
      'structure',
    ),
  ],
)
def test_wrong_shapes_are_named(grads, message):
  with pytest.raises(ValueError, match=message):
    _update(mtl_jax.shared_only(mtl_jax.linear(), NAMES), grads)


def test_unknown_label_is_named():
  tx = mtl_jax.shared_only(
    mtl_jax.linear(), NAMES, param_labels={'shared': 'shared', 'heads': 'c'}
  )
  with pytest.raises(ValueError, match=r"'c' at .*heads"):
    tx.init(PARAMS)


@pytest.mark.parametrize(
  ('names', 'error'),
  [
    ((), ValueError),
    (('a', 'a'), ValueError),
    (('a', 'shared'), ValueError),
    ('ab', TypeError),
  ],
)
def test_task_names_are_checked(names, error):
  with pytest.raises(error, match='task_names'):
    mtl_jax.shared_only(mtl_jax.linear(), names)


def test_scaling_by_weights_needs_a_method_that_has_some():
  import optax

  mean = optax.experimental.aggregating.average_per_element_updates()
  tx = mtl_jax.shared_only(mean, NAMES, head_scale='weights')
  with pytest.raises(ValueError, match='task_weights'):
    tx.init(PARAMS)
  with pytest.raises(ValueError, match=r"head_scale.*'heads'"):
    mtl_jax.shared_only(mean, NAMES, head_scale='heads')


def test_any_aggregator_of_optax_can_be_wrapped():
  import optax

  mean = optax.experimental.aggregating.average_per_element_updates()
  updates, _ = _update(mtl_jax.shared_only(mean, NAMES))
  _equal(updates['shared']['w'], jnp.array([1.0, 1.0]))
