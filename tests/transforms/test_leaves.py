"""Leaves are real floating-point arrays; others are named, or frozen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtl_jax

NAMES = ('a', 'b')


def _entries(loss_fn):
  """Everything that takes parameters first, by name."""
  tx = mtl_jax.cagrad()
  shared, flat = (
    mtl_jax.shared_only(tx, NAMES),
    mtl_jax.flat_minima(tx, NAMES),
  )
  at, at_each = mtl_jax.task_grad(loss_fn, NAMES)
  losses = mtl_jax.task_losses(lambda p, batch: loss_fn(p), NAMES)
  gram = mtl_jax.gram_update(tx, NAMES)
  stack = lambda p: jax.tree.map(lambda x: jnp.stack([x, x]), p)
  return {
    'init': tx.init,
    'update': lambda p: tx.update(stack(p), None, p),
    'update without params': lambda p: tx.update(stack(p), None),
    'shared_only init': shared.init,
    'shared_only update': lambda p: shared.update(stack(p), None, p),
    'flat_minima init': flat.init,
    'flat_minima update': lambda p: flat.update(
      stack(p), None, p, grad_fn=lambda own: own
    ),
    'at': at,
    'at_each': lambda p: at_each(stack(p)),
    'gram_update': lambda p: gram.update(losses.on({}), p, gram.init(p)),
    'moml': lambda p: mtl_jax.moml().init(2, p),
  }


def _losses(params):
  total = sum(jnp.sum(jnp.abs(x) ** 2) for x in jax.tree.leaves(params))
  return {'a': total, 'b': 2 * total}


ENTRIES = _entries(_losses)


@pytest.mark.parametrize('entry', ENTRIES.values(), ids=ENTRIES)
@pytest.mark.parametrize(
  ('dtype', 'mend'),
  [
    (jnp.complex64, 'complex64; complex parameters.*imaginary part'),
    (jnp.int32, "int32, expected a floating-point parameter.*'frozen'"),
    (jnp.bool_, "bool, expected a floating-point parameter.*'frozen'"),
  ],
)
def test_a_leaf_of_another_dtype_is_named_with_the_mend(entry, dtype, mend):
  params = {'good': jnp.ones(2), 'odd': jnp.ones(3, dtype)}
  with pytest.raises(ValueError, match=rf"at \['odd'\] is {mend}"):
    entry(params)


def test_frozen_leaves_may_have_any_dtype():
  params = {
    'w': jnp.array([1.0, 2.0]),
    'table': jnp.array([1, 0]),
    'phase': jnp.array([1j]),
  }
  labels = {'w': 'shared', 'table': 'frozen', 'phase': 'frozen'}

  def losses(params):
    w = params['w'][params['table']]
    return {'a': jnp.sum(w**2), 'b': jnp.abs(params['phase'][0]) * w[0]}

  at, at_each = mtl_jax.task_grad(losses, NAMES, param_labels=labels)
  for tx in (
    mtl_jax.shared_only(mtl_jax.linear(), NAMES, param_labels=labels),
    mtl_jax.flat_minima(mtl_jax.linear(), NAMES, rho=0.0, param_labels=labels),
  ):
    updates, _ = tx.update(
      at(params)[1],
      tx.init(params),
      params,
      grad_fn=lambda own: at_each(own)[1],
    )
    # Means of (2, 4) and (0, 1).
    np.testing.assert_allclose(updates['w'], [1, 2.5])
    for name in ('table', 'phase'):
      assert updates[name].dtype == params[name].dtype
      np.testing.assert_array_equal(updates[name], 0 * params[name])
