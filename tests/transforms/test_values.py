"""Updates against golden values and float64 references."""

import jax.numpy as jnp
import methods
import numpy as np
import pytest

_IDS = [method.name for method in methods.METHODS]


@pytest.mark.parametrize('method', methods.METHODS, ids=_IDS)
def test_golden_update(method):
  # Weights that differ from task to task would not be the golden ones.
  arguments = {'weights': (0.5, 1.5)} if method.per_task else {}
  tx = method.factory(**method.arguments, **arguments)
  J = jnp.asarray(methods.GOLDEN_MATRIX, jnp.float32)
  update, _ = tx.update(
    J,
    tx.init(jnp.zeros(3)),
    losses=jnp.asarray(methods.GOLDEN_LOSSES, jnp.float32),
  )
  np.testing.assert_allclose(update, method.golden, atol=2e-5)


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('size', [2, 3, 4])
@pytest.mark.parametrize('method', methods.METHODS, ids=_IDS)
def test_update_is_one_that_the_reference_allows(method, size, seed):
  J = methods.matrix(size, 12, seed)
  update, _ = methods.run(method, J)
  right = method.right(J, methods.LOSSES[:size], range(size))
  length = np.linalg.norm(J, axis=1).max()
  distances = np.linalg.norm(right - update, axis=1)
  assert distances.min() <= 1e-4 * length


# Rows whose lengths lie between 1e-2 and 1e2; PCGrad has too many orders here
# for its reference, and many equal weights say nothing new.
@pytest.mark.parametrize('size', [10, 40])
@pytest.mark.parametrize(
  'method',
  [m for m in methods.METHODS if not m.random],
  ids=[m.name for m in methods.METHODS if not m.random],
)
def test_update_is_right_for_rows_of_very_different_lengths(method, size):
  rng = np.random.default_rng(size)
  lengths = 10.0 ** rng.uniform(-2, 2, (size, 1))
  J = (lengths * rng.standard_normal((size, 60))).astype(np.float32)
  update, _ = methods.run(method, J)
  (right,) = method.right(J, methods.LOSSES[:size], range(size))
  np.testing.assert_allclose(
    update, right, atol=1e-4 * np.linalg.norm(right), rtol=1e-4
  )
