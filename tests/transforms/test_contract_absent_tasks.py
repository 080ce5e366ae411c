"""What every method promises about tasks that are absent, and about chance."""

import jax
import jax.numpy as jnp
import methods
import numpy as np
import pytest
import quick_compile

from mtl_jax.transforms.contract import lifting

NAN, INF = float('nan'), float('inf')


ABSENT = [(1,), (0,), (0, 1), (1, 2)]
# What the rows of absent tasks hold, and their losses.
FILLS = [(0, 1), (1e30, 0), (NAN, NAN), (INF, -1), (-INF, INF)]


@pytest.mark.parametrize('method', methods.ALL)
def test_absent_task_is_as_if_it_were_not_there(method):
  J, losses = methods.CONFLICTING, np.asarray(methods.LOSSES[:3], np.float32)
  cases = [
    (absent, np.isin(np.arange(3), absent, invert=True), *fill)
    for absent in ABSENT
    for fill in FILLS
  ]
  found = methods.run_all(
    method,
    [
      np.where(active[:, None], J, np.float32(row))
      for _, active, row, _ in cases
    ],
    losses=[np.where(active, losses, loss) for _, active, _, loss in cases],
    active=[active for _, active, _, _ in cases],
  )
  methods.assert_finite(found.shown, [str(case) for case in cases])
  for i, (absent, active, row, _) in enumerate(cases):
    name = f'{absent} absent, holding {row}'
    (present,) = np.nonzero(active)
    alone = methods.run_all(
      method, J[None, present], losses=losses[present], tasks=present
    )
    methods.close(found.updates[i], alone.updates[0], J, what=name)
    if method.weights != 'none':
      weights = found.shown['task_weights'][i]
      np.testing.assert_array_equal(weights[list(absent)], 0, err_msg=name)
      np.testing.assert_allclose(
        weights[present],
        alone.shown['task_weights'][0],
        atol=1e-5,
        err_msg=name,
      )


@pytest.mark.parametrize('method', methods.ALL)
def test_all_active_is_the_default(method):
  J = methods.CONFLICTING[None]
  found = methods.run_all(method, J, active=[True, True, True])
  expected = methods.run_all(method, J)
  methods.close(found.updates, expected.updates, methods.CONFLICTING, 1e-6)


@pytest.mark.parametrize('method', methods.ALL)
def test_no_active_task_means_zero_update(method):
  for size in (1, 3):
    found = methods.run_all(
      method,
      np.full((1, size, 5), NAN),
      losses=np.full(size, NAN),
      active=np.zeros(size, bool),
    )
    name = f'{size} tasks'
    np.testing.assert_array_equal(found.updates, 0, err_msg=name)
    if method.weights != 'none':
      np.testing.assert_array_equal(found.shown['task_weights'], 0, name)
    before = methods.initial(method, size).memory
    jax.tree.map(
      lambda new, old: np.testing.assert_array_equal(new[0], old),
      found.states.memory,
      before,
    )
    methods.assert_finite(found.shown, [name])


@pytest.mark.parametrize('method', methods.ENUMERATED)
@pytest.mark.parametrize('active', [None, (True, True, False, True)], ids=str)
def test_outcomes_of_random_method_come_as_often_as_they_should(method, active):
  J = methods.CONFLICTING
  if active is not None:
    J = np.insert(methods.CONFLICTING, 2, NAN, axis=0)
    active = jnp.array(active)
  tx = method.make(range(len(J)))

  @quick_compile.jit
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


def test_a_rule_is_kept_from_absent_tasks_whatever_it_does():
  def combine(given):
    return lifting.Combined(
      updates=jnp.ones(given.task_grads.shape[1:]),
      memory=given.memory + given.losses,
    )

  tx = lifting.lift(
    combine,
    memory=lambda size, params, dtype: jnp.zeros(size, dtype),
    num_tasks=2,
  )
  state = tx.init(jnp.zeros(3))
  J, losses = jnp.ones((2, 3)), jnp.array([3.0, NAN])
  updates, new = tx.update(
    J, state, losses=losses, active=jnp.array([True, False])
  )
  np.testing.assert_array_equal(updates, 1)
  np.testing.assert_array_equal(new.memory, [3, 1])
  # Of no task at all there is nothing to move by and nothing to learn.
  updates, new = tx.update(J, state, losses=losses, active=jnp.zeros(2, bool))
  np.testing.assert_array_equal(updates, 0)
  np.testing.assert_array_equal(new.memory, 0)
