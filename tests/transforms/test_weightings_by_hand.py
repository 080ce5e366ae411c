"""Facts of single loss weightings, by hand or from outside."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtl_jax

NAN = float('nan')


def weigh(weighting, *losses, state=None, **options):
  """Weights of some updates in a row, and the last state."""
  state = weighting.init(len(losses[0])) if state is None else state
  update, weights = jax.jit(weighting.update), []
  for now in losses:
    found, state = update(jnp.array(now), state, **options)
    weights.append(np.asarray(found))
  return np.stack(weights), state


@functools.cache
def all_draws(distribution, seed):
  """The program `active -> weights [4000, T]` of updates in a row."""
  weighting = mtl_jax.rlw(distribution, seed=seed)

  @jax.jit
  def of(active):
    def step(state, _):
      losses = jnp.ones(active.size)
      return weighting.update(losses, state, active=active)[::-1]

    return jax.lax.scan(step, weighting.init(active.size), length=4000)[1]

  return of


def draws(distribution, size=3, active=None, seed=0):
  """Weights [4000, T] of one state's updates in a row."""
  active = np.ones(size, bool) if active is None else np.array(active)
  return np.asarray(all_draws(distribution, seed)(active))


@pytest.mark.parametrize(
  'distribution',
  [
    'normal',
    'uniform',
    'dirichlet',
    'bernoulli',
    'constrained_bernoulli',
    'random_normal',
  ],
)
def test_rlw_lies_on_the_simplex_of_the_active_and_is_fair(distribution):
  for active in ((True,) * 4, (True, False, True, True)):
    present = [i for i in range(4) if active[i]]
    found = draws(distribution, 4, active)
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-5)
    assert found.min() >= 0
    np.testing.assert_array_equal(np.delete(found, present, axis=1), 0)
    assert len(np.unique(found, axis=0)) > len(present) - 1
    if distribution != 'random_normal':
      # Five standard deviations of a mean of 4000 weights.
      spread = found[:, present].std(axis=0).max() / np.sqrt(len(found))
      share = 1 / len(present)
      np.testing.assert_allclose(
        found[:, present].mean(axis=0), share, atol=5 * spread
      )


def test_rlw_normal_is_a_softmax_of_standard_normals():
  # The logarithm of the quotient of two weights is the difference of two
  # standard normals.
  found = draws('normal', 2)
  logits = np.log(found[:, 0] / found[:, 1])
  np.testing.assert_allclose(logits.std(), np.sqrt(2), rtol=0.06)
  kurtosis = np.mean(logits**4) / np.mean(logits**2) ** 2
  np.testing.assert_allclose(kurtosis, 3, atol=0.4)


def test_rlw_uniform_is_a_softmax_of_uniform_numbers():
  found = draws('uniform', 2)
  logits = np.log(found[:, 0] / found[:, 1])
  assert np.abs(logits).max() <= 1
  np.testing.assert_allclose(logits.std(), np.sqrt(1 / 6), rtol=0.05)


def test_rlw_dirichlet_is_uniform_on_the_simplex():
  # A weight is the smallest of T - 1 uniform numbers in distribution.
  found = draws('dirichlet', 3)
  for weight in found.T:
    for level in (0.1, 0.3, 0.6):
      share = np.mean(weight > level)
      np.testing.assert_allclose(share, (1 - level) ** 2, atol=0.04)


def test_rlw_random_normal_keeps_its_means_and_deviations():
  weighting = mtl_jax.rlw('random_normal', seed=3)
  state = weighting.init(2)
  _, after = weigh(weighting, [1.0, 1.0], [1.0, 1.0], state=state)
  np.testing.assert_array_equal(state.means, after.means)
  for drawn in (state.means, state.deviations):
    assert 0 <= min(drawn) < max(drawn) <= 1
  logits = draws('random_normal', 2, seed=3)
  logits = np.log(logits[:, 0] / logits[:, 1])
  np.testing.assert_allclose(
    logits.mean(), state.means[0] - state.means[1], atol=0.06
  )
  np.testing.assert_allclose(
    logits.std(), np.linalg.norm(state.deviations), rtol=0.06
  )


@pytest.mark.parametrize('active', [None, (True, True, False, True)], ids=str)
def test_rlw_bernoulli_is_any_set_of_tasks_but_none_equally_often(active):
  size = 3 if active is None else 4
  found = draws('bernoulli', size, active)
  if active is not None:
    found = found[:, [0, 1, 3]]
  sets = [s for s in itertools.product((0, 1), repeat=3) if any(s)]
  for chosen in sets:
    share = np.mean(np.all((found > 0) == np.array(chosen), axis=1))
    # Five standard deviations of a share of 1/7 of 4000.
    np.testing.assert_allclose(share, 1 / 7, atol=0.028)
  for weights in found:
    assert len(np.unique(weights[weights > 0])) == 1


def test_rlw_is_a_function_of_its_seed_and_copies_a_key():
  key = jax.random.key(7)
  first, _ = weigh(mtl_jax.rlw(seed=7), [1.0, 1.0], [1.0, 1.0])
  second, _ = weigh(mtl_jax.rlw(seed=key), [1.0, 1.0], [1.0, 1.0])
  other, _ = weigh(mtl_jax.rlw(seed=8), [1.0, 1.0], [1.0, 1.0])
  np.testing.assert_array_equal(first, second)
  assert np.abs(first - other).max() > 1e-3
  assert np.abs(first[0] - first[1]).max() > 1e-3
  weighting = mtl_jax.rlw(seed=key)
  jax.jit(weighting.update, donate_argnums=1)(jnp.ones(2), weighting.init(2))
  assert not key.is_deleted()


def test_uncertainty_of_constant_losses_ends_at_half_their_reciprocals():
  for likelihood in ('gaussian', 'softmax'):
    weighting = mtl_jax.uncertainty(
      1.0, optimizer=optax.sgd, likelihood=likelihood
    )
    weights, _ = weigh(weighting, *[[1.0, 0.25]] * 60)
    np.testing.assert_allclose(weights[-1], [0.5, 2.0], rtol=1e-3)


def test_imtl_l_makes_constant_losses_equal():
  weighting = mtl_jax.imtl_l(0.5, optimizer=optax.sgd)
  weights, _ = weigh(weighting, *[[1.0, 0.25]] * 60)
  np.testing.assert_allclose(weights[-1], [1.0, 4.0], rtol=1e-3)


def test_learning_rate_schedule_counts_a_tasks_own_updates():
  weighting = mtl_jax.imtl_l(
    lambda count: 1.0 / (count + 1), optimizer=optax.sgd
  )
  state = weighting.init(2)
  _, state = weigh(
    weighting, [2.0, 2.0], state=state, active=jnp.array([True, False])
  )
  np.testing.assert_allclose(state.log_scales, [-1.0, 0.0])
  _, state = weigh(weighting, [2.0, 2.0], state=state)
  # exp(-1) 2 - 1 at the rate 1/2, and 2 - 1 at the rate 1.
  np.testing.assert_allclose(
    state.log_scales, [-1 - (2 / np.e - 1) / 2, -1.0], rtol=1e-6
  )


def test_dwa_averages_over_epochs():
  # TorchJD's test: the means of two epochs of two updates are (1, 1) and
  # (1, 4).
  weighting = mtl_jax.dwa(steps_per_epoch=2)
  losses = [[2.0, 2.0], [0.0, 0.0], [2.0, 6.0], [0.0, 2.0], [3.0, 5.0]]
  weights, _ = weigh(weighting, *losses)
  np.testing.assert_array_equal(weights[:4], 1)
  expected = 2 * np.exp([0.5, 2.0]) / np.exp([0.5, 2.0]).sum()
  np.testing.assert_allclose(weights[4], expected, rtol=1e-6)


def test_dwa_averages_the_updates_in_which_a_task_was_there():
  weighting = mtl_jax.dwa(steps_per_epoch=2)
  state = weighting.init(2)
  # Task 1: (2, absent), both absent, (3, 5) and so the quotient 4 / 2.
  for loss, there in [(2, 1), (9, 0), (9, 0), (9, 0), (3, 1), (5, 1)]:
    _, state = weigh(
      weighting,
      [1.0, float(loss)],
      state=state,
      active=jnp.array([True, bool(there)]),
    )
  np.testing.assert_array_equal(state.rate, [1.0, 2.0])


def test_dwa_has_the_rate_1_where_the_earlier_mean_is_zero():
  weighting = mtl_jax.dwa(steps_per_epoch=1)
  weights, _ = weigh(weighting, [0.0, 1.0], [3.0, 1.0], [1.0, 1.0])
  np.testing.assert_array_equal(weights, 1)


def test_dtp_takes_indicators_from_its_user():
  weighting = mtl_jax.dtp(gamma=2.0, alpha=0.5)
  state = weighting.init(2)
  _, state = weighting.update(jnp.ones(2), state, kpis=jnp.array([0.2, 1.0]))
  weights, state = weighting.update(
    jnp.ones(2), state, kpis=jnp.array([0.6, 0.0])
  )
  np.testing.assert_allclose(state.kpis, [0.4, 0.5])
  np.testing.assert_allclose(
    weights, [-0.36 * np.log(0.4), -0.25 * np.log(0.5)], rtol=1e-5
  )
  with pytest.raises(ValueError, match=r'kpis must have shape \(2,\)'):
    weighting.update(jnp.ones(2), state, kpis=jnp.ones(3))


@pytest.mark.parametrize('kpi', [-0.1, 1.5, NAN])
def test_dtp_has_no_weight_for_an_indicator_out_of_range(kpi):
  weighting = mtl_jax.dtp()
  _, state = weigh(weighting, [1.0, 1.0])
  weights, after = weighting.update(
    jnp.ones(2), state, kpis=jnp.array([0.5, kpi])
  )
  assert np.isfinite(weights[0])
  assert np.isnan(weights[1])
  assert after.kpis[1] == state.kpis[1]


def test_dtp_is_finite_where_nothing_is_right_yet():
  weighting = mtl_jax.dtp()
  weights, _ = weigh(weighting, [1000.0, 1.0])
  assert np.all(np.isfinite(weights))
  assert weights[0, 0] > 50


def test_gls_neither_overflows_nor_underflows():
  for size in (1e-30, 1e30):
    weights, _ = weigh(mtl_jax.gls(), np.full(40, size))
    np.testing.assert_allclose(weights, 1 / 40, rtol=1e-4)


def test_stch_tends_to_the_largest_loss_without_overflow():
  # TorchJD's test: losses 1e30 (1, 2, 3) and a smoothing of 1e-10.
  weighting, losses = mtl_jax.stch(1e-10), jnp.array([1e30, 2e30, 3e30])
  weights, _ = weighting.update(losses, weighting.init(3))
  np.testing.assert_allclose(weights, [0, 0, 1 / 3], rtol=1e-6)


def test_stch_goes_on_where_its_warm_up_ends():
  weighting = mtl_jax.stch(
    0.25, objectives='log_losses', warm_up_steps=4, nadir_steps=2
  )
  losses = [[9.0, 9.0], [9.0, 9.0], [1.0, 3.0], [3.0, 5.0]]
  weights, state = weigh(weighting, *losses)
  np.testing.assert_allclose(weights, 1 / np.array(losses), rtol=1e-6)
  # At the nadir (2, 4) it is what it was; then the task that lags gets more.
  weights, _ = weigh(weighting, [2.0, 4.0], [2.0, 2.0], state=state)
  np.testing.assert_allclose(weights[0], [1 / 2, 1 / 4], rtol=1e-6)
  np.testing.assert_allclose(weights[1], [16 / 17, 1 / 17], rtol=1e-5)


def test_stch_task_that_missed_the_warm_up_takes_its_first_loss_for_the_nadir():
  weighting = mtl_jax.stch(objectives='log_losses', warm_up_steps=1)
  there, alone = jnp.array([True, True]), jnp.array([True, False])
  _, state = weigh(weighting, [2.0, NAN], active=alone)
  _, state = weigh(weighting, [2.0, NAN], state=state, active=alone)
  weights, state = weigh(weighting, [2.0, 8.0], state=state, active=there)
  np.testing.assert_allclose(weights[0], [1 / 2, 1 / 8], rtol=1e-6)
  weights, _ = weigh(weighting, [2.0, 4.0], state=state, active=there)
  # 2 / L times the softmax of log (1, 1/2).
  np.testing.assert_allclose(weights[0], [2 / 3, 1 / 6], rtol=1e-5)


def test_cosmos_without_penalty_is_a_weighted_sum():
  weighting = mtl_jax.cosmos(0.0, preference=(2.0, 1.0))
  weights, _ = weigh(weighting, [3.0, 4.0], [0.0, 0.0])
  np.testing.assert_array_equal(weights, [[2.0, 1.0], [2.0, 1.0]])


def test_cosmos_has_no_penalty_on_the_ray_and_for_losses_of_zero():
  weighting = mtl_jax.cosmos(8.0, preference=(1.0, 2.0))
  weights, _ = weigh(weighting, [2.0, 4.0], [0.0, 0.0])
  np.testing.assert_allclose(weights, [[1.0, 2.0]] * 2, atol=1e-6)


@pytest.mark.parametrize('preference', [(1.0, 2.0, 3.0), (0.3, 0.7, 0.1)])
def test_pbi_has_no_penalty_on_the_ray(preference):
  # Rounding takes the losses off the ray, in a direction that means nothing.
  weighting = mtl_jax.pbi(1e3, preference=preference)
  sizes = [[1e-20], [0.1], [1.0], [1e20]]
  weights, _ = weigh(weighting, *sizes * np.array(preference, np.float32))
  right = np.array(preference) / np.linalg.norm(preference)
  np.testing.assert_allclose(weights, [right] * 4, rtol=1e-5)


def test_pbi_has_its_penalty_just_off_the_ray():
  weights, _ = weigh(mtl_jax.pbi(1.0), [1.0, 1.0001])
  np.testing.assert_allclose(weights, [[0, np.sqrt(2)]], atol=2e-3)


def test_pbi_of_torchjd():
  # Losses (3, 1), ideal point (1, 1) and equal preferences: (2, 0) is off the
  # ray along (1, -1) / sqrt(2), which adds to (1, 1) / sqrt(2).
  weights, _ = weigh(mtl_jax.pbi(1.0, ideal=1.0), [3.0, 1.0])
  np.testing.assert_allclose(weights, [[np.sqrt(2), 0]], atol=1e-6)


def test_famo_gives_less_to_the_task_that_gained_more():
  weighting = mtl_jax.famo()
  _, state = weigh(weighting, [1.0, 1.0, 1.0])
  state = weighting.after_step(jnp.array([0.5, 1.0, 1.5]), state)
  weights, _ = weigh(weighting, [1.0, 1.0, 1.0], state=state)
  assert weights[0, 0] < 1 / 3 < weights[0, 2]
  # With equal gains nothing moves.
  again = weighting.after_step(
    jnp.array([0.5, 0.5, 0.5]), weigh(weighting, [1.0, 1.0, 1.0])[1]
  )
  np.testing.assert_allclose(again.logits, 0, atol=1e-6)


def test_famo_counts_a_task_only_if_it_was_there_before_and_after():
  weighting = mtl_jax.famo()
  state = weighting.init(2)
  # Never an update: nothing to compare with.
  after = weighting.after_step(jnp.array([0.1, 0.2]), state)
  np.testing.assert_array_equal(after.logits, 0)
  alone = jnp.array([True, False])
  _, state = weigh(weighting, [1.0, 1.0], active=alone)
  after = weighting.after_step(jnp.array([0.1, 0.2]), state)
  np.testing.assert_array_equal(after.logits, 0)
  # That it was there in an earlier update does not count.
  _, state = weigh(weighting, [1.0, 1.0])
  _, state = weigh(weighting, [1.0, 1.0], state=state, active=alone)
  after = weighting.after_step(jnp.array([0.1, 0.2]), state)
  np.testing.assert_array_equal(after.logits, 0)


def test_famo_goes_on_without_a_task_that_has_no_logarithm():
  weighting = mtl_jax.famo()
  after_step = jax.jit(weighting.after_step)
  _, state = weigh(weighting, [1.0, 1.0, 1.0])
  for loss in (0.0, -1.0, NAN, float('inf')):
    after = after_step(jnp.array([0.5, loss, 2.0]), state)
    assert after.logits[0] < 0 == after.logits[1] < after.logits[2], loss


def test_first_then_hands_losses_after_a_step_to_the_one_that_weighed():
  # A state that counts its updates and the losses it was shown after.
  counting = mtl_jax.LossWeighting(
    init=lambda num_tasks: jnp.zeros(2),
    update=lambda losses, state, *, active: (
      jnp.ones(2),
      state + jnp.array([1.0, 0.0]),
    ),
    after_step=lambda new_losses, state, *, active: (
      state + jnp.array([0.0, 1.0])
    ),
  )
  weighting = mtl_jax.first_then(counting, 2, counting)
  state = weighting.init(2)
  for first, then in ((1, 0), (2, 0), (2, 1), (2, 2)):
    _, state = weigh(weighting, [1.0, 1.0], state=state)
    state = weighting.after_step(jnp.ones(2), state)
    np.testing.assert_array_equal(state.first, first)
    np.testing.assert_array_equal(state.then, then)


def test_first_then_changes_over_and_leaves_the_other_alone():
  first, then = mtl_jax.uncertainty(0.1), mtl_jax.famo()
  weighting = mtl_jax.first_then(first, 2, then)
  new_losses = jnp.array([0.5, 2.0])
  state = weighting.init(2)
  for _ in range(2):
    _, state = weigh(weighting, [1.0, 2.0], state=state)
    state = weighting.after_step(new_losses, state)
  np.testing.assert_array_equal(state.then.logits, 0)
  learnt = np.asarray(state.first.log_variances)
  assert np.abs(learnt).max() > 0
  weights, state = weigh(weighting, [1.0, 2.0], state=state)
  np.testing.assert_allclose(weights[0], [2 / 3, 1 / 3], rtol=1e-6)
  state = weighting.after_step(new_losses, state)
  assert np.abs(state.then.logits).max() > 0
  np.testing.assert_array_equal(state.first.log_variances, learnt)


def test_first_then_of_zero_steps_is_the_second():
  weighting = mtl_jax.first_then(mtl_jax.si(), 0, mtl_jax.equal_weights())
  weights, _ = weigh(weighting, [1.0, 4.0])
  np.testing.assert_array_equal(weights, [[0.5, 0.5]])
  assert weighting.after_step is None


def test_first_then_hands_on_what_only_one_of_the_two_knows():
  weighting = mtl_jax.first_then(mtl_jax.dtp(), 1, mtl_jax.si())
  weights, _ = weighting.update(
    jnp.ones(2), weighting.init(2), kpis=jnp.array([0.5, 1.0])
  )
  np.testing.assert_allclose(weights, [0.5 * np.log(2), 0], rtol=1e-6)


def test_scheduled_weights_may_be_one_function():
  weighting = mtl_jax.scheduled_weights(
    lambda count: jnp.array([1.0, 2.0]) * (count + 1)
  )
  weights, _ = weigh(weighting, [1.0, 1.0], [1.0, 1.0])
  np.testing.assert_array_equal(weights, [[1.0, 2.0], [2.0, 4.0]])
  with pytest.raises(ValueError, match=r'schedules must give weights \(3,\)'):
    weighting.init(3)


def test_all_equal_losses_have_the_weights_of_the_mean_or_the_sum():
  # What a user who compares methods at one learning rate has to know.
  losses = np.full(4, 0.5)
  for weighting, total in (
    (mtl_jax.equal_weights(), 1),
    (mtl_jax.gls(), 1),
    (mtl_jax.famo(), 1),
    (mtl_jax.stch(), 1 / 4),
    (mtl_jax.dwa(1), 4),
    (mtl_jax.imtl_l(), 4),
    (mtl_jax.uncertainty(), 2),
    (mtl_jax.si(), 8),
  ):
    weights, _ = weigh(weighting, losses)
    np.testing.assert_allclose(weights.sum(), total, rtol=1e-6)


SOLVABLE = {
  'gls': (mtl_jax.gls, 0.0),
  'si': (mtl_jax.si, 0.0),
  'famo': (mtl_jax.famo, 0.0),
  'famo with bounds': (
    lambda: mtl_jax.famo(min_losses=(0.5, 0.25, 0.125)),
    0.25,
  ),
  'stch': (lambda: mtl_jax.stch(objectives='log_losses', nadir=2.0), 0.0),
  'stch warming up': (
    lambda: mtl_jax.stch(objectives='log_losses', warm_up_steps=2),
    0.0,
  ),
}


@pytest.mark.parametrize(
  ('make', 'bound'), SOLVABLE.values(), ids=SOLVABLE.keys()
)
def test_a_task_at_the_bound_of_its_loss_counts_as_absent(make, bound):
  weighting = make()
  state = weighting.init(3)
  found, _ = weighting.update(jnp.array([2.0, bound, 3.0]), state)
  expected, _ = weighting.update(
    jnp.array([2.0, 1.0, 3.0]), state, active=jnp.array([True, False, True])
  )
  np.testing.assert_array_equal(found, expected)
  assert found[1] == 0 < min(found[0], found[2])
  nobody, _ = weighting.update(
    jnp.array([0.5, 0.25, 0.125]) * (bound > 0), state
  )
  np.testing.assert_array_equal(nobody, [0, 0, 0])


@pytest.mark.parametrize('make', [mtl_jax.uncertainty, mtl_jax.imtl_l])
def test_a_learned_weight_stays_finite_while_the_loss_stays_zero(make):
  weighting = make(50.0, optimizer=optax.sgd)
  state = weighting.init(2)
  for _ in range(6):
    weights, state = weighting.update(jnp.array([0.0, 1e-3]), state)
  assert weights[0] > 1e37
  assert weights[0] * 0 == 0
