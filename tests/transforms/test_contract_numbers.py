"""What every method promises: scale, homogeneity and hard gradients.

All inputs of a fact go through one program a method and number of tasks; the
message of a failure names the input.
"""

import methods
import numpy as np
import pytest


@pytest.mark.parametrize('method', methods.ALL)
def test_single_task_is_its_gradient_at_the_scale_of_the_method(method):
  g = methods.CONFLICTING[:1]
  found = methods.run_all(method, g[None])
  methods.close(found.updates[0], method.scale(1) * g[0], g, 1e-6)
  if method.weights == 'gradients':
    np.testing.assert_allclose(
      found.shown['task_weights'], [[method.scale(1)]], rtol=1e-6
    )


@pytest.mark.parametrize('method', methods.ALL)
def test_identical_tasks_are_one_gradient_at_the_scale_of_the_method(method):
  for size in (2, 3, 40):
    g = methods.matrix(1, methods.dimensions(size))
    # The mean loss of equal tasks too: normalised gradients stay identical.
    found = methods.run_all(
      method, np.repeat(g, size, axis=0)[None], losses=np.full(size, 2.0)
    )
    scale = method.scale(size)
    methods.close(found.updates[0], scale * g[0], scale * g, what=size)


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
def test_update_is_never_nan_nor_far_out(method):
  for size in (2, 3):
    stacks = np.array(list(HARD.values()), np.float32)[:, :size]
    found = methods.run_all(method, stacks)
    names = [f'{name}, {size} tasks' for name in HARD]
    methods.assert_finite(found.shown, names)
    for name, J, update in zip(names, stacks, found.updates, strict=True):
      longest = np.linalg.norm(J, axis=1).max()
      # NaN is no number that is small enough.
      assert np.linalg.norm(update) <= method.bound * longest, (name, update)


@pytest.mark.parametrize('method', methods.ALL)
def test_a_non_finite_gradient_reaches_the_update(method):
  """`skip_nonfinite` and the training step look there."""
  bad = [np.nan, np.inf]
  stacks = np.stack([methods.CONFLICTING] * len(bad))
  _, _, states = methods.run_all(method, stacks)
  stacks[:, 1, 2] = bad
  for states_before in (None, states):
    updates = methods.run_all(method, stacks, states=states_before).updates
    for value, update in zip(bad, updates, strict=True):
      assert not np.all(np.isfinite(update)), (value, update)


@pytest.mark.parametrize('method', methods.ALL)
def test_zero_gradients_give_a_zero_update(method):
  for size in (1, 2, 3, 40):
    zeros = np.zeros((1, size, methods.dimensions(size)))
    found = methods.run_all(method, zeros)
    np.testing.assert_array_equal(found.updates, 0, err_msg=f'{size} tasks')
    methods.assert_finite(found.shown, [f'{size} tasks'])


@pytest.mark.parametrize('method', methods.ALL)
def test_update_is_homogeneous_of_degree_one(method):
  # The same state, so that a random method draws the same.
  factors = np.array([1, 1e-10, 1e-3, 7, 1e4, 1e15], np.float32)
  for size in (2, 3):
    J = methods.CONFLICTING[:size]
    found = methods.run_all(method, factors[:, None, None] * J)
    update = found.updates[0]
    for factor, scaled in zip(factors, found.updates, strict=True):
      # Rounding is relative to the update too, which may be some times as long.
      methods.close(
        scaled / np.float64(factor),
        update,
        np.stack([*J, update]),
        what=f'times {factor}, {size} tasks',
      )


@pytest.mark.parametrize('method', methods.SYMMETRIC)
def test_order_of_tasks_does_not_matter(method):
  orders = [(0, 1, 2), (1, 0, 2), (1, 2, 0), (2, 1, 0)]
  runs = [
    methods.run_all(method, methods.CONFLICTING[None, order], tasks=order)
    for order in map(list, orders)
  ]
  for order, found in zip(orders, runs, strict=True):
    methods.close(
      found.updates[0],
      runs[0].updates[0],
      methods.CONFLICTING,
      what=order,
    )
    if method.weights != 'none':
      np.testing.assert_allclose(
        found.shown['task_weights'][0],
        runs[0].shown['task_weights'][0][list(order)],
        atol=1e-4,
        err_msg=str(order),
      )


@pytest.mark.parametrize('method', methods.NEEDS_LOSSES)
def test_update_is_right_for_losses_of_any_size(method):
  sizes = [(0.0, 1.0), (-3.0, 3.0), (1e-8, 1e-8), (1e8, 1e8)]
  for size in (2, 3):
    J = methods.CONFLICTING[:size]
    losses = np.array([(1.0, loss, 2.0) for loss, _ in sizes])[:, :size]
    found = methods.run_all(method, [J] * len(sizes), losses=losses)
    names = [f'loss {loss}, {size} tasks' for loss, _ in sizes]
    methods.assert_finite(found.shown, names)
    for (_, counts_as), name, given, update in zip(
      sizes, names, losses, found.updates, strict=True
    ):
      given[1] = counts_as
      (right,) = method.right(J, given, range(size))
      # Relative to the update too: a method may divide by its losses.
      methods.close(update, right, np.stack([*J, right]), what=name)
