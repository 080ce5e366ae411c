"""`Aggregator.weigh`: weights from a Gram matrix alone are those of a stack."""

import functools

import jax
import jax.numpy as jnp
import methods
import numpy as np
import pytest
import quadratics
import quick_compile

TASKS = 3
# Which tasks are there in each of the steps.
ACTIVES = np.array([[1, 1, 1], [1, 0, 1], [1, 1, 1], [0, 0, 0]], bool)
# Of each factory one, and those that look at the losses.
METHODS = [
  *quadratics.FACTORIES,
  *(m for m in methods.METHODS if m.name == 'mgda_loss'),
]
AGGREGATORS = {m.name: m.make(range(TASKS), num_tasks=TASKS) for m in METHODS}
WEIGHING = [m for m in METHODS if AGGREGATORS[m.name].weigh is not None]


@functools.cache
def found():
  """`{method: ((states, states of weigh), ...)}` of every step."""
  rng = np.random.default_rng(0)
  # Each task conflicts with the others in the first, and is redundant later.
  stacks = np.stack(
    [methods.CONFLICTING]
    + [methods.matrix(TASKS, 5, seed) for seed in range(len(ACTIVES) - 1)]
  )
  losses = rng.uniform(0.5, 2, (len(ACTIVES), TASKS)).astype(np.float32)

  def run(inputs):
    answers = {}
    for method in WEIGHING:
      tx = AGGREGATORS[method.name]

      def step(states, inputs, tx=tx):
        J, losses, active = inputs
        given = {'losses': losses, 'active': active}
        _, of_stack = tx.aggregate(J, states[0], **given)
        gram = jnp.matmul(J, J.T, precision='highest')
        of_gram = tx.weigh(gram, states[1], **given)
        states = of_stack, of_gram
        return states, jax.tree.map(_plain, states)

      start = tx.init(jnp.zeros(5))
      answers[method.name] = jax.lax.scan(step, (start, start), inputs)[1]
    return answers

  return quick_compile.jit(run)((stacks, losses, ACTIVES))


def _plain(leaf):
  is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
  return jax.random.key_data(leaf) if is_key else leaf


@pytest.mark.parametrize('method', methods.params(WEIGHING))
def test_weights_from_the_gram_matrix_are_those_of_the_update(method):
  of_stack, of_gram = found()[method.name]
  weights = of_stack.task_weights
  assert np.all(np.any(weights[:-1] != 0, axis=1))
  np.testing.assert_allclose(
    of_gram.task_weights, weights, rtol=1e-3, atol=1e-4 * np.max(weights)
  )
  for name in ('gram', 'key'):
    expected = getattr(of_stack, name)
    if expected is not None:
      np.testing.assert_allclose(getattr(of_gram, name), expected, rtol=1e-5)


def test_methods_that_need_more_than_inner_products_have_no_such_map():
  assert {m.name for m in METHODS} - {m.name for m in WEIGHING} == {
    # Coordinates of the gradients.
    *('graddrop', 'trimmed_mean'),
    # Gradients of earlier steps.
    *('moco', 'db_mtl', 'excess_mtl'),
    # Independent batches; SDMGrad may do with one.
    *('modo', 'sdmgrad'),
  }
  (single,) = (m for m in methods.METHODS if m.name == 'sdmgrad_single')
  assert single.make(range(TASKS), num_tasks=TASKS).weigh is not None
