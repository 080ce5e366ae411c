"""What every method promises: scale, homogeneity and hard gradients."""

import methods
import numpy as np
import pytest

import mtl_jax


@pytest.mark.parametrize('method', methods.ALL)
def test_single_task_is_its_gradient_at_the_scale_of_the_method(method):
  g = methods.CONFLICTING[:1]
  update, state = methods.run(method, g)
  methods.close(update, method.scale(1) * g[0], g, 1e-6)
  if method.weights == 'gradients':
    np.testing.assert_allclose(state.task_weights, [method.scale(1)], rtol=1e-6)


@pytest.mark.parametrize('method', methods.ALL)
@pytest.mark.parametrize('size', [2, 3, 40])
def test_identical_tasks_are_one_gradient_at_the_scale_of_the_method(
  method, size
):
  g = methods.matrix(1, 48 if size == 40 else 5)
  # The mean loss of equal tasks too: normalised gradients stay identical.
  update, _ = methods.run(
    method, np.repeat(g, size, axis=0), losses=np.full(size, 2.0)
  )
  methods.close(update, method.scale(size) * g[0], method.scale(size) * g)


HARD = {
  'one row zero': [[1, 2, 0, 0, 1], [0, 0, 0, 0, 0], [-2, 1, 1, 0, 0]],
  'two rows zero': [[0, 0, 0, 0, 0], [3, 0, 0, 1, 0], [0, 0, 0, 0, 0]],
  'opposed': [[1, 2, 3, 4, 5], [-1, -2, -3, -4, -5], [1, 0, 0, 0, 0]],
  'opposed, unlike lengths': [
    [1e-3, 0, 0, 0, 0],
    [-1e3, 0, 0, 0, 0],
    [0, 1, 0, 0, 0],
  ],
  'duplicates': [[1, -2, 3, 0, 1], [1, -2, 3, 0, 1], [-1, 1, 1, 1, 1]],
  'one line': [[1, 2, 3, 4, 5], [2, 4, 6, 8, 10], [-3, -6, -9, -12, -15]],
  'one plane': [[1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [1, 1, 0, 0, 0]],
  'cancelling': [[1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [-1, -1, 0, 0, 0]],
  'zero within': [[1, 0, 0, 0, 0], [-1, 1, 0, 0, 0], [-1, -3, 0, 0, 0]],
  'lengths 1e-10 to 1e15': [
    [1e-10, -1e-10, 0, 0, 0],
    [-1, 1, 1, 0, 0],
    [1e15, 0, -1e15, 1e15, 0],
  ],
  'opposed, 1e15': [
    [1e15, 1e15, 0, 0, 0],
    [-1e15, -1e15, 1e8, 0, 0],
    [1e15, -1e15, 0, 0, 0],
  ],
}


@pytest.mark.parametrize('method', methods.ALL)
@pytest.mark.parametrize('hard', HARD)
@pytest.mark.parametrize('size', [2, 3])
def test_update_is_never_nan_nor_far_out(method, hard, size):
  J = np.asarray(HARD[hard], np.float32)[:size]
  update, state = methods.run(method, J)
  assert all(
    np.all(np.isfinite(x)) for x in mtl_jax.diagnostics(state).values()
  )
  assert (
    np.linalg.norm(update) <= method.bound * np.linalg.norm(J, axis=1).max()
  )


@pytest.mark.parametrize('method', methods.ALL)
@pytest.mark.parametrize('size', [1, 2, 3, 40])
def test_zero_gradients_give_a_zero_update(method, size):
  zeros = np.zeros((size, 48 if size == 40 else 5), np.float32)
  update, state = methods.run(method, zeros)
  np.testing.assert_array_equal(update, 0)
  assert all(
    np.all(np.isfinite(x)) for x in mtl_jax.diagnostics(state).values()
  )


@pytest.mark.parametrize('method', methods.ALL)
@pytest.mark.parametrize('factor', [1e-10, 1e-3, 7, 1e4, 1e15])
@pytest.mark.parametrize('size', [2, 3])
def test_update_is_homogeneous_of_degree_one(method, factor, size):
  # The same state, so that a random method draws the same.
  J = methods.CONFLICTING[:size]
  update, _ = methods.run(method, J)
  scaled, _ = methods.run(method, np.float32(factor) * J)
  # Rounding is relative to the update too, which may be some times as long.
  methods.close(scaled / np.float64(factor), update, np.stack([*J, update]))


@pytest.mark.parametrize('method', methods.SYMMETRIC)
@pytest.mark.parametrize('order', [(1, 0, 2), (1, 2, 0), (2, 1, 0)])
def test_order_of_tasks_does_not_matter(method, order):
  J = methods.CONFLICTING[list(order)]
  update, state = methods.run(method, J, tasks=order)
  expected, expected_state = methods.run(method, methods.CONFLICTING)
  methods.close(update, expected, J)
  if method.weights != 'none':
    np.testing.assert_allclose(
      state.task_weights,
      expected_state.task_weights[np.array(order)],
      atol=1e-4,
    )


@pytest.mark.parametrize('method', methods.NEEDS_LOSSES)
@pytest.mark.parametrize('size', [2, 3])
@pytest.mark.parametrize(
  ('loss', 'counts_as'), [(0.0, 1.0), (-3.0, 3.0), (1e-8, 1e-8), (1e8, 1e8)]
)
def test_update_is_right_for_losses_of_any_size(method, size, loss, counts_as):
  J = methods.CONFLICTING[:size]
  losses = np.array([1.0, loss, 2.0])[:size]
  update, state = methods.run(method, J, losses=losses)
  losses[1] = counts_as
  (right,) = method.right(J, losses, range(size))
  # Relative to the update too: a method may divide by its losses.
  methods.close(update, right, np.stack([*J, right]))
  assert all(
    np.all(np.isfinite(x)) for x in mtl_jax.diagnostics(state).values()
  )
