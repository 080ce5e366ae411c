"""Losses are in the order of the task names, whatever they come in."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick_compile

import mtl_jax
from mtl_jax.gradients import ENGINES

# Sorted they are in another order.
NAMES = ('z', 'a')
FORMS = {
  'unsorted mapping': lambda p, _: collections.OrderedDict(
    z=3 * p[0], a=4 * p[1]
  ),
  'list': lambda p, _: [3 * p[0], 4 * p[1]],
  'stack': lambda p, _: jnp.stack([3 * p[0], 4 * p[1]]),
  'array': lambda p, _: jnp.array([3.0, 4.0]) * p,
  'compiled': jax.jit(lambda p, _: {'a': 4 * p[1], 'z': 3 * p[0]}),
  'checkpoint': jax.checkpoint(lambda p, _: {'a': 4 * p[1], 'z': 3 * p[0]}),
}


@pytest.mark.parametrize('form', FORMS)
def test_every_answer_is_in_the_order_of_the_names(form):
  @quick_compile.jit
  def run(params):
    found = {}
    for engine in ENGINES:
      here = mtl_jax.task_losses(FORMS[form], NAMES, engine=engine).on(None)
      found[engine] = here.gradients(params)[1]
      found[f'{engine}, each'] = here.gradients_each(
        jnp.stack([params, params])
      )[1]
    weigh = lambda losses: (jnp.array([1.0, 10.0]), losses)
    _, (_, losses), found['weighted'] = here.weighted_gradient(weigh, params)
    return found, losses, here.values(params)

  found, losses, values = run(jnp.array([1.0, 2.0]))
  np.testing.assert_array_equal(losses, [3, 8])
  np.testing.assert_array_equal(values, [3, 8])
  np.testing.assert_array_equal(found.pop('weighted'), [3, 40])
  for engine, grads in found.items():
    np.testing.assert_array_equal(grads, [[3, 0], [0, 4]], err_msg=engine)


def test_another_tasks_nan_reaches_no_row_of_any_engine():
  def loss_fn(params, count):
    features = jnp.tanh(params['shared'])
    return {
      'z': jnp.sum(params['heads']['z'] * features),
      'a': jnp.sum(params['heads']['a'] * features) / count,  # 0 / 0
    }

  params = {
    'shared': jnp.zeros(2),
    'heads': {'z': jnp.ones(2), 'a': jnp.zeros(2)},
  }

  @quick_compile.jit
  def run(count):
    found = {}
    for engine in ENGINES:
      at, at_each = mtl_jax.task_grad(loss_fn, NAMES, engine=engine)
      found[engine] = at(params, count)[1]
      own = {**params, 'shared': jnp.zeros((2, 2))}
      found[f'{engine}, each'] = at_each(own, count)[1]
    return found

  for engine, grads in run(0.0).items():
    np.testing.assert_array_equal(grads['shared'][0], [1, 1], err_msg=engine)
    np.testing.assert_array_equal(grads['heads']['z'], [0, 0], err_msg=engine)
    assert not np.isfinite(grads['shared'][1]).any(), engine
