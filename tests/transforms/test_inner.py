"""Inner products of gradients of many parameters."""

import jax
import jax.numpy as jnp
import numpy as np

import mtl_jax


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
