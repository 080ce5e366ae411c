"""The joint update with loss weightings and with independent batches."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import test_step

import mtl_jax
from mtl_jax import models
from mtl_jax import slices
from mtl_jax.train import step as steps


def _run(tx, *, weighting=None, count=3, **options):
  """The state and metrics after a few steps on one batch."""
  problem, model = test_step._problem(), test_step._model()
  state = steps.init_state(
    problem, model, tx, seed=0, batch=test_step._batch(), weighting=weighting
  )
  step = jax.jit(
    steps.make_train_step(problem, model, tx, weighting=weighting, **options)
  )
  for _ in range(count):
    state, metrics = step(state, test_step._batch())
  return state, metrics


def _names():
  return test_step._problem().task_names


def _as_aggregator(weighting, **options):
  tx = mtl_jax.shared_only(mtl_jax.weighted(weighting), _names())
  return _run(optax.chain(tx, optax.sgd(0.1)), **options)


WEIGHTINGS = {
  'equal': mtl_jax.equal_weights(),
  'gls': mtl_jax.gls(),
  'si': mtl_jax.si(),
  'uncertainty': mtl_jax.uncertainty(learning_rate=0.1),
  'rlw': mtl_jax.rlw(),
  'stch': mtl_jax.stch(),
}


@pytest.mark.parametrize('name', WEIGHTINGS)
def test_one_backward_pass_gives_what_weighted_task_gradients_give(name):
  weighting = WEIGHTINGS[name]
  state, metrics = _run(optax.sgd(0.1), weighting=weighting)
  expected, shown = _as_aggregator(weighting)
  test_step._close(state.params, expected.params)
  for task in _names():
    np.testing.assert_allclose(
      metrics[f'{task}/weight'], shown[f'{task}/weight'], rtol=1e-5
    )
    np.testing.assert_allclose(
      metrics[f'{task}/loss'], shown[f'{task}/loss'], rtol=1e-5
    )


def test_equal_weights_are_linear_scalarization():
  state, _ = _run(optax.sgd(0.1), weighting=mtl_jax.equal_weights())
  tx = mtl_jax.shared_only(mtl_jax.linear(), _names())
  expected, _ = _run(optax.chain(tx, optax.sgd(0.1)))
  test_step._close(state.params, expected.params)


def test_famo_sees_the_losses_of_the_batch_after_the_step():
  weighting = mtl_jax.famo()
  state, _ = _run(optax.sgd(0.1), weighting=weighting)
  expected, _ = _as_aggregator(
    weighting,
    after_step=lambda losses, opt_state, active: mtl_jax.after_step(
      weighting, losses, opt_state, active
    ),
  )
  test_step._close(state.params, expected.params)
  # By hand, one step: weights move by the change of the log losses.
  problem, model = test_step._problem(), test_step._model()
  batch = problem.preprocess(test_step._batch())
  one, before = _run(optax.sgd(0.1), weighting=weighting, count=1)
  predictions, _ = model.apply(
    one.params, one.model_state, batch, train=True, key=jax.random.key(0)
  )
  after = steps.task_losses(problem, predictions, batch)
  memory = weighting.init(2)
  _, memory = weighting.update(
    jnp.stack([before[f'{task}/loss'] for task in _names()]), memory
  )
  memory = weighting.after_step(
    jnp.stack([after[task] for task in _names()]), memory
  )
  np.testing.assert_allclose(one.weighting.logits, memory.logits, rtol=1e-4)


@pytest.mark.parametrize('name', ['gls', 'uncertainty'])
def test_micro_batches_give_the_weights_and_the_gradient_of_the_batch(name):
  weighting = WEIGHTINGS[name]
  whole, _ = _run(optax.sgd(0.1), weighting=weighting)
  cut, metrics = _run(optax.sgd(0.1), weighting=weighting, micro_batches=4)
  test_step._close(cut.params, whole.params)
  test_step._close(cut.weighting, whole.weighting)
  assert all(np.isfinite(x) for x in metrics.values())


def test_an_absent_task_has_no_part_in_a_weighted_step():
  batch = test_step._batch()
  first, second = _names()
  batch = {
    **batch,
    'mask': {first: batch['mask'][first], second: 0 * batch['mask'][second]},
  }
  problem, model = test_step._problem(), test_step._model()
  weighting = mtl_jax.gls()
  state = steps.init_state(
    problem, model, optax.sgd(0.1), seed=0, batch=batch, weighting=weighting
  )
  step = steps.make_train_step(
    problem, model, optax.sgd(0.1), weighting=weighting
  )
  after, metrics = jax.jit(step)(state, batch)
  assert metrics[f'{second}/weight'] == 0
  np.testing.assert_allclose(metrics[f'{first}/weight'], 1, rtol=1e-6)
  same = lambda tree: jax.tree.leaves(tree['heads'][second])
  for a, b in zip(same(after.params), same(state.params), strict=True):
    np.testing.assert_array_equal(a, b)


def test_slices_of_the_batch_are_the_independent_batches():
  problem, model = test_step._problem(), test_step._model()
  aggregator = mtl_jax.shared_only(mtl_jax.modo(), _names())
  extra = aggregator.extra_batches
  tx = optax.chain(aggregator, optax.sgd(0.1))
  state, metrics = _run(tx, count=1, extra_batches=extra)
  start = steps.init_state(problem, model, tx, seed=0, batch=test_step._batch())
  batch = problem.preprocess(test_step._batch())
  number = 1 + extra
  pieces = slices.independent(batch, number)

  def loss_fn(params, piece):
    predictions, _ = model.apply(
      params, start.model_state, piece, train=True, key=jax.random.key(0)
    )
    return steps.task_losses(problem, predictions, piece)

  at, _ = mtl_jax.task_grad(loss_fn, _names())
  found = [at(start.params, piece) for piece in pieces]
  updates, _ = tx.update(
    found[0][1],
    start.opt_state,
    start.params,
    extra_grads=tuple(f[1] for f in found[1:]),
  )
  test_step._close(state.params, optax.apply_updates(start.params, updates))
  losses = np.mean([f[0][0] for f in found], axis=0)
  for task, loss in zip(_names(), losses, strict=True):
    np.testing.assert_allclose(metrics[f'{task}/loss'], loss, rtol=1e-5)


@pytest.mark.parametrize(
  'weighting', [mtl_jax.auto_lambda(), mtl_jax.moml(), mtl_jax.forum()]
)
def test_a_bilevel_weighting_learns_from_the_halves_of_the_batch(weighting):
  problem, model = test_step._problem(), test_step._model()
  state, metrics = _run(
    optax.sgd(0.1), weighting=weighting, count=1, lookahead=0.5
  )
  start = steps.init_state(
    problem,
    model,
    optax.sgd(0.1),
    seed=0,
    batch=test_step._batch(),
    weighting=weighting,
  )
  batch = problem.preprocess(test_step._batch())

  def losses_of(params, piece):
    predictions, _ = model.apply(
      params, start.model_state, piece, train=True, key=jax.random.key(0)
    )
    losses = steps.task_losses(problem, predictions, piece)
    return jnp.stack([losses[task] for task in _names()])

  halves = [jax.tree.map(lambda x, k=k: x[k::2], batch) for k in (0, 1)]
  weights, _ = weighting.update(
    losses_of, start.params, *halves, start.weighting, learning_rate=0.5
  )
  grads = jax.grad(lambda p: weights @ losses_of(p, batch))(start.params)
  expected = jax.tree.map(lambda p, g: p - 0.1 * g, start.params, grads)
  test_step._close(state.params, expected, rtol=1e-4, atol=1e-5)
  for i, task in enumerate(_names()):
    np.testing.assert_allclose(metrics[f'{task}/weight'], weights[i], rtol=1e-4)


def test_a_weighting_does_not_go_with_what_aggregators_need():
  with pytest.raises(ValueError, match='extra_batches and after_step'):
    steps.make_train_step(
      test_step._problem(),
      test_step._model(),
      optax.sgd(0.1),
      weighting=mtl_jax.gls(),
      extra_batches=1,
    )


LEFT_OUT = {
  'uncertainty': mtl_jax.uncertainty(),
  'dwa': mtl_jax.dwa(steps_per_epoch=2),
  'rlw': mtl_jax.rlw(),
  'famo': mtl_jax.famo(),
  'auto_lambda': mtl_jax.auto_lambda(),
  'moml': mtl_jax.moml(),
  'forum': mtl_jax.forum(),
  'moco': None,
  'famo as an aggregator': None,
}


@pytest.mark.parametrize('name', LEFT_OUT)
def test_a_step_that_is_left_out_changes_nothing_but_the_counts(name):
  problem = test_step._problem()
  # With running statistics, which no optimizer knows of.
  model = models.make_model(test_step._Normalised(), problem.tasks)
  weighting, after_step = LEFT_OUT[name], None
  tx = optax.adam(0.1)
  if name == 'moco':
    tx = optax.chain(mtl_jax.shared_only(mtl_jax.moco(), _names()), tx)
  if name == 'famo as an aggregator':
    famo = mtl_jax.famo()
    tx = optax.chain(mtl_jax.shared_only(mtl_jax.weighted(famo), _names()), tx)
    after_step = lambda losses, opt_state, active: mtl_jax.after_step(
      famo, losses, opt_state, active
    )
  tx = mtl_jax.skip_nonfinite(tx)
  batch = dict(test_step._batch())
  batch['image'] = batch['image'].astype(jnp.float32)
  bad = {**batch, 'image': batch['image'].at[0].set(jnp.nan)}
  state = steps.init_state(
    problem, model, tx, seed=0, batch=batch, weighting=weighting
  )
  step = jax.jit(
    steps.make_train_step(
      problem,
      model,
      tx,
      weighting=weighting,
      lookahead=0.1,
      after_step=after_step,
    )
  )
  before, metrics = step(state, batch)
  assert metrics['skipped'] == 0
  after, metrics = step(before, bad)
  assert metrics['skipped'] == 1
  assert metrics['loss'] == 0
  assert all(metrics[f'{task}/present'] == 0 for task in _names())
  assert after.step == before.step + 1
  assert after.opt_state.skipped == 1
  pair = [
    (s.params, s.model_state, s.opt_state.inner, s.weighting)
    for s in (before, after)
  ]
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(*_data(a, b)), *pair)
  # The good step did change something, or nothing would be shown by this.
  start = state.params, state.model_state, state.opt_state.inner
  for old, new in zip(start, pair[0], strict=False):
    assert any(
      np.any(a != b)
      for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True)
    )


def _data(*leaves):
  is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
  return [jax.random.key_data(x) if is_key(x) else x for x in leaves]


@pytest.mark.parametrize('kind', ['plain', 'flat'])
def test_numbers_of_each_group_are_logged_under_its_name(kind):
  aggregator = mtl_jax.per_group(mtl_jax.mgda(), 'leaf')
  if kind == 'flat':
    aggregator = mtl_jax.flat_minima(aggregator, _names(), rho=0.1)
  else:
    aggregator = mtl_jax.shared_only(aggregator, _names())
  state, metrics = _run(optax.chain(aggregator, optax.sgd(0.1)), count=1)
  shown = mtl_jax.diagnostics(state.opt_state)
  cosines = {k: v for k, v in shown.items() if k.endswith('/mean_cosine')}
  assert len(cosines) >= (4 if kind == 'flat' else 2)
  for key, value in cosines.items():
    parts = key.removesuffix('/mean_cosine')
    if parts.startswith('flat/'):
      logged = 'flat/mean_cosine/' + parts.removeprefix('flat/')
    else:
      logged = 'mean_cosine/' + parts.removeprefix('loss/')
    assert metrics[logged] == value
  assert 'mean_cosine' not in metrics
