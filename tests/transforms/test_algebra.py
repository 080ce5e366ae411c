"""Inner products of gradients of many parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtl_jax
from mtl_jax.transforms.contract import algebra


def _gram(rows):
  """As an aggregator forms it, from leaves [T, ...]."""
  tx = mtl_jax.linear(num_tasks=2)
  init = jax.eval_shape(tx.init, [jax.ShapeDtypeStruct((), rows.dtype)])
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), init)
  update = jax.jit(lambda rows, state: tx.update([rows], state)[1].gram)
  return update(rows, zeros)


def test_long_rows_have_the_inner_products_of_float64():
  # Neither a power of two nor a multiple of the pieces they are added up in;
  # all of one sign, so that rounding does not cancel.
  rows = np.random.default_rng(0).uniform(0.5, 1.5, size=(2, 3, 700_001))
  rows = rows.astype(np.float32)
  flat = rows.reshape(2, -1).astype(np.float64)
  np.testing.assert_allclose(_gram(rows), flat @ flat.T, rtol=1e-6)


def test_long_rows_of_bfloat16_are_added_up_in_float32():
  rows = np.random.default_rng(0).uniform(0.5, 1.5, size=(2, 300_000))
  rows = jnp.asarray(rows, jnp.bfloat16)
  flat = np.asarray(rows, np.float64)
  # Squares of numbers of 8 bits lie on a grid of squares, which float32 sums
  # round down more often than up; bfloat16 sums would be off by 4e-3.
  np.testing.assert_allclose(_gram(rows), flat @ flat.T, rtol=2e-5)


def test_long_rows_can_be_differentiated():
  # Of half the squared length of the sum: the sum, in every row.
  rows = jnp.linspace(-1, 1, 2 * 200_000).reshape(2, -1)
  half_square = lambda rows: 0.5 * jnp.sum(_gram(rows))
  gradient = jax.jit(jax.grad(half_square))(rows)
  np.testing.assert_allclose(gradient[0], rows.sum(0), rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(gradient[1], rows.sum(0), rtol=1e-5, atol=1e-6)


def _grad_fn(task_params):
  return {'shared': jnp.sin(3 * task_params['shared'])}


@pytest.mark.parametrize(
  ('name', 'combine'),
  [
    *(('cagrad', combine) for combine in ('separate', 'each', 'direct')),
    # By coordinates.
    ('graddrop', 'separate'),
  ],
)
def test_accelerators_and_cpus_have_one_update(name, combine, monkeypatch):
  # More rows than are added up in one pass; what an absent one holds is no
  # matter.
  names = tuple(f'task_{i}' for i in range(11))
  aggregator = {
    'cagrad': mtl_jax.cagrad(),
    'graddrop': mtl_jax.graddrop(seed=0),
  }[name]
  tx = mtl_jax.flat_minima(aggregator, names, 0.1, combine=combine)
  params = {'shared': jnp.linspace(-1, 1, 21).reshape(3, 7)}
  rows = jax.random.normal(jax.random.key(0), (11, 3, 7)).at[4].set(jnp.nan)
  active = jnp.arange(11) != 4

  def update():
    # Traced anew each time: the platform is asked for while tracing.
    return jax.jit(
      lambda rows: tx.update(
        {'shared': rows},
        tx.init(params),
        params,
        grad_fn=_grad_fn,
        active=active,
      )
    )(rows)

  on_cpu = update()
  monkeypatch.setattr(algebra, 'on_cpu', lambda: False)
  elsewhere = update()
  assert np.isfinite(on_cpu[0]['shared']).all()
  leaves = zip(*map(jax.tree.leaves, (on_cpu, elsewhere)), strict=True)
  for ours, theirs in leaves:
    if jnp.issubdtype(ours.dtype, jnp.floating):
      np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
