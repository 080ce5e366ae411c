"""Steps with loss weightings, with independent batches, and skipped steps."""

import digits
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import quick_compile

import mtl_jax
from mtl_jax import updates
from mtl_jax.gradients import slices
from mtl_jax.train import objective as objectives

WEIGHTINGS = {
  'equal': mtl_jax.equal_weights(),
  'gls': mtl_jax.gls(),
  'si': mtl_jax.si(),
  'uncertainty': mtl_jax.uncertainty(learning_rate=0.1),
  'rlw': mtl_jax.rlw(),
  'stch': mtl_jax.stch(),
  'famo': mtl_jax.famo(),
}
SLICED = ('gls', 'uncertainty', 'famo')
BILEVEL = {
  'auto_lambda': mtl_jax.auto_lambda(),
  'moml': mtl_jax.moml(),
  'forum': mtl_jax.forum(),
}


def _weighted(weighting, **options):
  joint = mtl_jax.weighted_update(weighting, digits.names())
  return digits.case(joint, **options)


def _stacked(aggregator, **options):
  tx = mtl_jax.shared_only(aggregator, digits.names())
  return digits.case(mtl_jax.stack_update(tx), **options)


def _run(cases, count, batch=None):
  batch = digits.batch() if batch is None else batch
  states, found = digits.start(cases), []
  step = quick_compile.jit(digits.step_of(cases))
  for _ in range(count):
    states, metrics = step(states, batch)
    found.append((states, metrics))
  return found


@pytest.fixture(scope='module')
def runs():
  """After each of three steps: one backward pass, task gradients, slices."""
  cases = {}
  for name, weighting in WEIGHTINGS.items():
    cases[name] = _weighted(weighting)
    cases[f'{name}, stacked'] = _stacked(mtl_jax.weighted(weighting))
    if name in SLICED:
      cases[f'{name}, sliced'] = _weighted(weighting, micro_batches=4)
  cases['linear'] = _stacked(mtl_jax.linear())
  return _run(cases, 3)


@pytest.mark.parametrize('name', WEIGHTINGS)
def test_one_backward_pass_gives_what_weighted_task_gradients_give(runs, name):
  states, metrics = runs[-1]
  expected, shown = (found[f'{name}, stacked'] for found in runs[-1])
  digits.close(states[name].params, expected.params)
  for task in digits.names():
    for key in ('weight', 'loss'):
      np.testing.assert_allclose(
        metrics[name][f'{task}/{key}'], shown[f'{task}/{key}'], rtol=1e-5
      )


def test_equal_weights_are_linear_scalarization(runs):
  states, _ = runs[-1]
  digits.close(states['equal'].params, states['linear'].params)


@pytest.mark.parametrize('name', SLICED)
def test_micro_batches_give_the_weights_and_the_gradient_of_the_batch(
  runs, name
):
  states, metrics = runs[-1]
  whole, cut = states[name], states[f'{name}, sliced']
  digits.close(cut.params, whole.params)
  # FAMO's logits are sums of differences of losses.
  digits.close(cut.joint, whole.joint, atol=1e-5)
  assert all(np.isfinite(x) for x in metrics[f'{name}, sliced'].values())


def test_famo_sees_the_losses_of_the_batch_after_the_step(runs):
  # By hand, one step: weights move by the change of the log losses.
  states, metrics = (found['famo'] for found in runs[0])
  problem, weighting = digits.problem(), WEIGHTINGS['famo']
  batch = problem.preprocess(digits.batch())
  predictions, _ = digits.model().apply(states.params, {}, batch, train=False)
  after = objectives.task_losses(problem, predictions, batch)
  memory = weighting.init(2)
  _, memory = weighting.update(
    jnp.stack([metrics[f'{task}/loss'] for task in digits.names()]), memory
  )
  memory = weighting.after_step(
    jnp.stack([after[task] for task in digits.names()]), memory
  )
  np.testing.assert_allclose(
    states.joint.weighting.logits, memory.logits, rtol=1e-4
  )


def test_an_absent_task_has_no_part_in_a_weighted_step():
  first, second = digits.names()
  cases = {'gls': _weighted(mtl_jax.gls())}
  before = digits.start(cases)['gls'].params
  ((states, metrics),) = _run(cases, 1, digits.masked(second, np.zeros(16)))
  assert metrics['gls'][f'{second}/weight'] == 0
  np.testing.assert_allclose(metrics['gls'][f'{first}/weight'], 1, rtol=1e-6)
  jax.tree.map(
    np.testing.assert_array_equal,
    states['gls'].params['heads'][second],
    before['heads'][second],
  )


def test_slices_of_the_batch_are_the_independent_batches():
  modo = mtl_jax.shared_only(mtl_jax.modo(), digits.names())
  cases = {'modo': digits.case(mtl_jax.stack_update(modo))}
  start = digits.start(cases)['modo']
  problem, its_model = digits.problem(), cases['modo'].model
  batch = problem.preprocess(digits.batch())

  def loss_fn(params, piece):
    predictions, _ = its_model.apply(params, {}, piece, train=False)
    return objectives.task_losses(problem, predictions, piece)

  @quick_compile.jit
  def by_hand(params, state, batch):
    at, _ = mtl_jax.task_grad(loss_fn, digits.names(), engine='unroll')
    pieces = slices.independent(batch, 1 + modo.extra_batches)
    found = [at(params, piece) for piece in pieces]
    grads, _ = modo.update(
      found[0][1], state, params, extra_grads=tuple(f[1] for f in found[1:])
    )
    losses = jnp.mean(jnp.stack([f[0][0] for f in found]), axis=0)
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), losses

  params, losses = by_hand(start.params, start.joint, batch)
  ((states, metrics),) = _run(cases, 1)
  digits.close(states['modo'].params, params)
  for task, loss in zip(digits.names(), losses, strict=True):
    np.testing.assert_allclose(metrics['modo'][f'{task}/loss'], loss, rtol=1e-5)


def test_a_bilevel_weighting_learns_from_the_halves_of_the_batch():
  cases = {
    name: digits.case(
      mtl_jax.bilevel_update(weighting, digits.names(), lookahead=0.5)
    )
    for name, weighting in BILEVEL.items()
  }
  start, problem = digits.start(cases), digits.problem()
  batch, its_model = problem.preprocess(digits.batch()), digits.model()

  def losses_of(params, piece):
    predictions, _ = its_model.apply(params, {}, piece, train=False)
    losses = objectives.task_losses(problem, predictions, piece)
    return jnp.stack([losses[task] for task in digits.names()])

  @quick_compile.jit
  def by_hand(start, batch):
    halves = [jax.tree.map(lambda x, k=k: x[k::2], batch) for k in (0, 1)]
    found = {}
    for name, weighting in BILEVEL.items():
      params = start[name].params
      weights, _ = weighting.update(
        losses_of, params, *halves, start[name].joint, learning_rate=0.5
      )
      grads = jax.grad(lambda p, w=weights: w @ losses_of(p, batch))(params)
      params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
      found[name] = params, weights
    return found

  ((states, metrics),) = _run(cases, 1)
  for name, (params, weights) in by_hand(start, batch).items():
    digits.close(states[name].params, params, rtol=1e-4, atol=1e-5)
    for i, task in enumerate(digits.names()):
      np.testing.assert_allclose(
        metrics[name][f'{task}/weight'], weights[i], rtol=1e-4
      )


def _skipping():
  """Cases of every kind of state, whose optimizer skips what is not finite."""
  joints = {
    name: mtl_jax.weighted_update(weighting, digits.names())
    for name, weighting in {
      'dwa': mtl_jax.dwa(steps_per_epoch=2),
      'rlw': mtl_jax.rlw(),
      'famo': mtl_jax.famo(),
    }.items()
  }
  joints['moml'] = mtl_jax.bilevel_update(
    BILEVEL['moml'], digits.names(), lookahead=0.1
  )
  stack = lambda tx: mtl_jax.stack_update(
    mtl_jax.shared_only(tx, digits.names())
  )
  joints['moco'] = stack(mtl_jax.moco())
  joints['famo as an aggregator'] = stack(mtl_jax.weighted(mtl_jax.famo()))
  joints['gram'] = mtl_jax.gram_update(mtl_jax.gradnorm(), digits.names())
  # With running statistics, which no optimizer knows of.
  return {
    name: digits.case(
      joint,
      mtl_jax.skip_nonfinite(optax.adam(0.1)),
      its_model=digits.normalised(),
    )
    for name, joint in joints.items()
  }


def test_a_skipped_step_changes_nothing_but_the_counts():
  cases = _skipping()
  batch = dict(digits.batch())
  batch['image'] = batch['image'].astype(jnp.float32)
  bad = {**batch, 'image': batch['image'].at[0].set(jnp.nan)}
  start = digits.start(cases, batch)
  step = quick_compile.jit(digits.step_of(cases))
  good, metrics = step(start, batch)
  later, skipped = step(good, bad)
  for name in cases:
    first, before, after = (x[name] for x in (start, good, later))
    assert metrics[name]['skipped'] == 0
    shown = skipped[name]
    assert shown['skipped'] == 1
    assert shown['loss'] == 0
    assert all(shown[f'{task}/present'] == 0 for task in digits.names())
    assert after.step == before.step + 1
    assert after.opt_state.skipped == 1
    parts = lambda s: (s.params, s.model_state, s.opt_state.inner, s.joint)
    digits.close(parts(after), parts(before), rtol=0, atol=0, err_msg=name)
    # The good step did change something, or nothing would be shown by this.
    pairs = zip(parts(first), parts(before), strict=True)
    for part, (old, new) in enumerate(map(digits.numbers, pairs)):
      assert any(
        np.any(a != b)
        for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True)
      ), (name, part)


def test_numbers_of_each_group_are_logged_under_its_name():
  grouped = mtl_jax.per_group(mtl_jax.mgda(), 'leaf')
  cases = {
    'plain': _stacked(grouped),
    'flat': digits.case(
      mtl_jax.stack_update(
        mtl_jax.flat_minima(grouped, digits.names(), rho=0.1)
      )
    ),
  }
  ((states, metrics),) = _run(cases, 1)
  for kind in cases:
    shown = mtl_jax.diagnostics(states[kind].joint)
    cosines = {k: v for k, v in shown.items() if k.endswith('/mean_cosine')}
    assert len(cosines) >= (4 if kind == 'flat' else 2)
    for key, value in cosines.items():
      parts = key.removesuffix('/mean_cosine')
      if parts.startswith('flat/'):
        logged = 'flat/mean_cosine/' + parts.removeprefix('flat/')
      else:
        logged = 'mean_cosine/' + parts.removeprefix('loss/')
      assert metrics[kind][logged] == value
    assert 'mean_cosine' not in metrics[kind]


def test_what_is_no_weighting_is_refused():
  for make in (
    lambda x: updates.weighted_update(x, digits.names()),
    lambda x: updates.bilevel_update(x, digits.names(), lookahead=0.1),
  ):
    with pytest.raises(TypeError, match=r'must be a .*got Aggregator'):
      make(mtl_jax.mgda())
  with pytest.raises(ValueError, match='lookahead must be positive'):
    updates.bilevel_update(BILEVEL['moml'], digits.names(), lookahead=0.0)
