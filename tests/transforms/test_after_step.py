"""The losses after a step reach a weighting through every wrapper."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtl_jax

NAMES = ('a', 'b', 'c')
FAMO = mtl_jax.famo(gamma=0.1)
PARAMS = {
  'shared': {'first': jnp.ones(2), 'second': jnp.ones(3)},
  'heads': {task: jnp.ones(2) for task in NAMES},
}
GRADS = {
  'shared': jax.tree.map(
    lambda p: jnp.arange(3.0 * p.size).reshape(3, *p.shape), PARAMS['shared']
  ),
  'heads': PARAMS['heads'],
}
LOSSES, AFTER = jnp.array([1.0, 2.0, 3.0]), jnp.array([0.5, 2.0, 9.0])
ACTIVE = jnp.array([True, True, False])


def inner():
  return mtl_jax.weighted(FAMO, num_tasks=len(NAMES))


# Each with the number of states that it keeps of the weighting.
WRAPPED = {
  'shared_only': (mtl_jax.shared_only(inner(), NAMES), 1),
  'flat_minima': (mtl_jax.flat_minima(inner(), NAMES, rho=0.1), 2),
  'every': (mtl_jax.shared_only(mtl_jax.every(2, inner()), NAMES), 1),
  'per_group': (
    mtl_jax.shared_only(mtl_jax.per_group(inner(), 'leaf'), NAMES),
    2,
  ),
  'all of them': (
    mtl_jax.flat_minima(
      mtl_jax.per_group(mtl_jax.every(2, inner()), 'leaf'), NAMES
    ),
    4,
  ),
}


@pytest.mark.parametrize('name', WRAPPED)
def test_losses_after_a_step_reach_every_state_of_the_weighting(name):
  tx, count = WRAPPED[name]
  _, state = tx.update(
    GRADS,
    tx.init(PARAMS),
    PARAMS,
    losses=LOSSES,
    active=ACTIVE,
    grad_fn=lambda own: jax.tree.map(lambda g: 2 * g, GRADS),
  )
  kind = type(FAMO.init(3))
  is_famo = lambda x: isinstance(x, kind)
  states = lambda tree: [
    x for x in jax.tree.leaves(tree, is_leaf=is_famo) if is_famo(x)
  ]
  before = states(state)
  moved = tx.after_step(AFTER, state, active=ACTIVE)
  assert len(before) == count
  for old, new in zip(before, states(moved), strict=True):
    expected = FAMO.after_step(AFTER, old, active=ACTIVE)
    jax.tree.map(np.testing.assert_array_equal, new, expected)
    # The loss of the first fell and its logit with it; the last one is absent.
    assert new.logits[0] < 0 < new.logits[1]
    assert new.logits[2] == 0
  assert jax.tree.structure(moved) == jax.tree.structure(state)


def test_a_method_that_does_not_look_at_them_says_so():
  for weighting in (mtl_jax.si(), mtl_jax.uncertainty()):
    tx = mtl_jax.weighted(weighting, num_tasks=3)
    for made in (
      mtl_jax.shared_only(tx, NAMES),
      mtl_jax.flat_minima(tx, NAMES),
      mtl_jax.every(2, tx),
      mtl_jax.per_group(tx, 'leaf'),
    ):
      assert made.after_step is None
