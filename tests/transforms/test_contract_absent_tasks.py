"""What every method promises about tasks that are absent, and about chance."""

import jax
import jax.numpy as jnp
import methods
import numpy as np
import pytest

import mtl_jax

NAN, INF = float('nan'), float('inf')


ABSENT = [(1,), (0,), (0, 1), (1, 2)]


@pytest.mark.parametrize('method', methods.ALL)
@pytest.mark.parametrize('absent', ABSENT, ids=str)
def test_absent_task_is_as_if_it_were_not_there(method, absent):
  present = [i for i in range(3) if i not in absent]
  active = np.isin(np.arange(3), present)
  losses = np.asarray(methods.LOSSES[:3], np.float32)
  expected, expected_state = methods.run(
    method, methods.CONFLICTING[present], losses=losses[present], tasks=present
  )
  for row, loss in [(0, 1), (1e30, 0), (NAN, NAN), (INF, -1), (-INF, INF)]:
    J = np.where(active[:, None], methods.CONFLICTING, np.float32(row))
    update, state = methods.run(
      method, J, losses=np.where(active, losses, loss), active=active
    )
    methods.close(update, expected, methods.CONFLICTING)
    if method.weights != 'none':
      weights = np.asarray(state.task_weights)
      np.testing.assert_array_equal(weights[list(absent)], 0)
      np.testing.assert_allclose(
        weights[present], expected_state.task_weights, atol=1e-5
      )
    assert all(
      np.all(np.isfinite(x)) for x in mtl_jax.diagnostics(state).values()
    )


@pytest.mark.parametrize('method', methods.ALL)
def test_all_active_is_the_default(method):
  update, _ = methods.run(
    method, methods.CONFLICTING, active=[True, True, True]
  )
  expected, _ = methods.run(method, methods.CONFLICTING)
  methods.close(update, expected, methods.CONFLICTING, 1e-6)


@pytest.mark.parametrize('method', methods.ALL)
@pytest.mark.parametrize('size', [1, 3])
def test_no_active_task_means_zero_update(method, size):
  update, state = methods.run(
    method,
    np.full((size, 5), NAN, np.float32),
    losses=np.full(size, NAN),
    active=np.zeros(size, bool),
  )
  np.testing.assert_array_equal(update, 0)
  if method.weights != 'none':
    np.testing.assert_array_equal(state.task_weights, 0)
  before = methods.compiled(method, range(size)).tx.init(jnp.zeros(5)).memory
  jax.tree.map(np.testing.assert_array_equal, state.memory, before)
  assert all(
    np.all(np.isfinite(x)) for x in mtl_jax.diagnostics(state).values()
  )


@pytest.mark.parametrize('method', methods.ENUMERATED)
@pytest.mark.parametrize('active', [None, (True, True, False, True)], ids=str)
def test_outcomes_of_random_method_come_as_often_as_they_should(method, active):
  J = methods.CONFLICTING
  if active is not None:
    J = np.insert(methods.CONFLICTING, 2, NAN, axis=0)
    active = jnp.array(active)
  tx = method.make(range(len(J)))

  @jax.jit
  def outcomes(state, J):
    # One state all along: every update has to draw anew.
    step = lambda state, _: tx.update(J, state, active=active)[::-1]
    return jax.lax.scan(step, state, None, length=2000)[1]

  drawn = np.asarray(outcomes(tx.init(J[0]), J))
  right = method.right(methods.CONFLICTING, methods.LOSSES[:3], range(3))
  distances = np.abs(drawn[:, None] - right[None]).max(axis=2)
  assert distances.min(axis=1).max() < 1e-5
  # Equal outcomes of different draws count together.
  same = np.abs(right[:, None] - right[None]).max(axis=2) < 1e-4
  expected = same.mean(axis=1)
  assert len(np.unique(np.argmax(same, axis=1))) > 4
  seen = (distances < 1e-4).mean(axis=0)
  # Five standard deviations of a share near 1/8 among 2000.
  np.testing.assert_allclose(seen, expected, atol=0.04)
