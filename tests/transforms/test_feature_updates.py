"""Tasks are combined at the features, and the trunk is pulled back once."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import methods
import numpy as np
import pytest
import quadratics
import quick_compile

import mtl_jax

NAMES = ('shape', 'colour', 'depth')
BATCH, INPUTS, WIDTH = 8, 10, 4

# Further stacks, or memory of the features' shape.
REFUSED = tuple(
  m
  for m in methods.METHODS
  if m.extra_batches or m.name.startswith(('moco', 'db_mtl', 'excess_mtl'))
)
GRAM_BASED = [
  m
  for m in quadratics.FACTORIES
  if m.weights == 'gradients' and m not in REFUSED
]


def draw(seed, *shape):
  values = np.random.default_rng(seed).standard_normal(shape)
  return jnp.asarray(values, jnp.float32)


PARAMS = {
  'shared': draw(0, INPUTS, WIDTH),
  'heads': {task: draw(1 + i, WIDTH) for i, task in enumerate(NAMES)},
}
# Orthogonal rows: the Jacobian of the linear trunk times its transpose is 4 I.
ORTHOGONAL = 2 * jnp.linalg.qr(draw(4, INPUTS, BATCH))[0].T
IMAGE = draw(5, BATCH, INPUTS)


def linear_trunk(params, image):
  return image @ params['shared']


def tanh_trunk(params, image):
  # A tree of features, of which heads take different parts.
  hidden = jnp.tanh(image @ params['shared'])
  return {'all': hidden, 'mean': jnp.mean(hidden, axis=0)}


def heads_loss(params, features, image):
  del image
  hidden = features
  if isinstance(features, dict):
    hidden = features['all'] + features['mean'][None, :] ** 2
  losses = {}
  for i, task in enumerate(NAMES):
    error = hidden @ params['heads'][task] - 3.0 * draw(6 + i, BATCH)
    losses[task] = (1 + i) * jnp.mean(error**2)
  return losses


def whole_loss(trunk):
  return lambda params, image: heads_loss(params, trunk(params, image), image)


def one(method):
  """The row's aggregator for three tasks."""
  return method.make(range(3), num_tasks=3)


def run(step, params, *args, **options):
  """The first update, compiled."""
  state = step.init(params, *args)
  return quick_compile.jit(step.update)(params, state, *args, **options)


def close(found, expected, tolerance=1e-5):
  size = max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(expected))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      a, b, rtol=0, atol=tolerance * size
    ),
    found,
    expected,
  )


@pytest.mark.parametrize('method', methods.params(GRAM_BASED))
def test_orthogonal_trunk_gives_what_gradients_of_parameters_give(method):
  step = mtl_jax.feature_update(linear_trunk, heads_loss, one(method), NAMES)
  tx = mtl_jax.shared_only(one(method), NAMES)
  at, _ = mtl_jax.task_grad(whole_loss(linear_trunk), NAMES)

  @quick_compile.jit
  def both(params, state, exact_state, active):
    _, found, state = step.update(params, state, ORTHOGONAL, active=active)
    (losses, _), task_grads = at(params, ORTHOGONAL)
    exact, exact_state = tx.update(
      task_grads, exact_state, params, losses=losses, active=active
    )
    return found, state, exact, exact_state

  params = PARAMS
  state, exact_state = step.init(params, ORTHOGONAL), tx.init(params)
  for active in ([True, True, True], [True, False, True]):
    found, state, exact, exact_state = both(
      params, state, exact_state, np.array(active)
    )
    close(found, exact, 1e-4)
    params = jax.tree.map(lambda p, g: p - 0.1 * g, params, exact)
  shown, wanted = mtl_jax.diagnostics(state), mtl_jax.diagnostics(exact_state)
  np.testing.assert_allclose(
    shown['task_weights'], wanted['task_weights'], rtol=1e-3, atol=1e-4
  )
  np.testing.assert_allclose(4 * shown['gram'], wanted['gram'], rtol=1e-3)


@pytest.mark.parametrize('trunk', [linear_trunk, tanh_trunk])
def test_equal_weights_are_the_gradient_of_the_mean_loss(trunk):
  step = mtl_jax.feature_update(trunk, heads_loss, mtl_jax.linear(), NAMES)
  (losses, aux), found, _ = run(step, PARAMS, IMAGE)
  mean = lambda params: sum(whole_loss(trunk)(params, IMAGE).values()) / 3
  close(found, jax.grad(mean)(PARAMS))
  expected = list(whole_loss(trunk)(PARAMS, IMAGE).values())
  np.testing.assert_allclose(losses, expected, rtol=1e-6)
  assert aux is None


def test_gradients_of_different_examples_never_meet():
  # Of the parameter the gradients are -1 and 2, in conflict: MGDA would give 0.
  # Of the features they are (1, -2) and (3, -1), with the inner product 5: the
  # first is the shortest of their hull, and its sum is -1.
  rows = jnp.array([[1.0, -2.0], [3.0, -1.0]])
  step = mtl_jax.feature_update(
    lambda w, x: w * x,
    lambda w, z, x: rows @ z,
    mtl_jax.mgda(),
    ('a', 'b'),
  )
  w, x = jnp.array(1.0), jnp.ones(2)
  _, grad, state = run(step, w, x)
  np.testing.assert_allclose(grad, -1.0, rtol=1e-6)
  shown = mtl_jax.diagnostics(state)
  np.testing.assert_allclose(shown['gram'], [[5.0, 5.0], [5.0, 10.0]])


def test_graddrop_picks_a_sign_for_every_feature_of_every_example():
  rows = jnp.array([[1.0, 2.0, 4.0, 8.0], [-1.0, -2.0, -4.0, -8.0]])
  step = mtl_jax.feature_update(
    lambda w, x: w + x, lambda w, z, x: rows @ z, mtl_jax.graddrop(), ('a', 'b')
  )
  update = quick_compile.jit(step.update)
  x, w = jnp.zeros(4), jnp.array(0.0)
  state, seen = step.init(w, x), set()
  for _ in range(40):
    _, grad, state = update(w, state, x)
    seen.add(float(grad))
  # Sums of 1, 2, 4 and 8 with signs: the picked ones can be read off.
  assert seen <= set(np.arange(-15.0, 16.0, 2.0))
  assert len(seen) > 8


@pytest.mark.parametrize('head_scale', ['none', 'weights'])
def test_a_head_has_its_own_gradient_times_its_weight_if_asked(head_scale):
  step = mtl_jax.feature_update(
    tanh_trunk, heads_loss, mtl_jax.mgda(), NAMES, head_scale=head_scale
  )
  active = np.array([True, True, False])
  _, found, state = run(step, PARAMS, IMAGE, active=active)
  weights = mtl_jax.diagnostics(state)['task_weights']
  for i, task in enumerate(NAMES):
    own = jax.grad(lambda p, t=task: whole_loss(tanh_trunk)(p, IMAGE)[t])
    factor = weights[i] if head_scale == 'weights' else 1.0
    expected = active[i] * factor * own(PARAMS)['heads'][task]
    np.testing.assert_allclose(found['heads'][task], expected, rtol=1e-5)


@pytest.mark.parametrize('name', ['linear', 'mgda', 'graddrop'])
def test_a_gradient_that_is_not_finite_reaches_the_update_if_present(name):
  step = mtl_jax.feature_update(
    linear_trunk, heads_loss, getattr(mtl_jax, name)(), NAMES
  )
  update = quick_compile.jit(step.update)
  params = jax.tree.map(lambda x: x, PARAMS)
  params['heads']['colour'] *= jnp.nan
  state = step.init(params, IMAGE)
  _, grads, _ = update(params, state, IMAGE, active=np.array([True] * 3))
  assert not np.any(np.isfinite(grads['shared']))
  active = np.array([True, False, True])
  _, grads, _ = update(params, state, IMAGE, active=active)
  assert np.all(np.isfinite(grads['shared']))
  np.testing.assert_array_equal(grads['heads']['colour'], 0)
  _, grads, _ = update(params, state, IMAGE, active=np.array([False] * 3))
  for leaf in jax.tree.leaves(grads):
    np.testing.assert_array_equal(leaf, 0)


def test_zero_gradients_give_a_zero_update():
  step = mtl_jax.feature_update(
    linear_trunk,
    lambda params, z, x: 0 * jnp.sum(z) * jnp.ones(3),
    mtl_jax.mgda(),
    NAMES,
  )
  _, grads, _ = run(step, PARAMS, IMAGE)
  for leaf in jax.tree.leaves(grads):
    np.testing.assert_array_equal(leaf, 0)


def test_bfloat16_features_have_a_float32_gram_matrix():
  step = mtl_jax.feature_update(
    lambda w, x: (w * x).astype(jnp.bfloat16),
    lambda w, z, x: {'a': jnp.sum(z), 'b': -jnp.sum(z)},
    mtl_jax.linear(),
    ('a', 'b'),
  )
  w, x = jnp.ones(()), jnp.ones(4096)
  _, grad, state = run(step, w, x)
  # In bfloat16 a sum of ones stops at 256.
  expected = 4096 * np.array([[1.0, -1.0], [-1.0, 1.0]])
  np.testing.assert_array_equal(mtl_jax.diagnostics(state)['gram'], expected)
  assert grad.dtype == jnp.float32


def test_frozen_leaves_serve_both_functions_and_have_no_gradient():
  labels = {'in': 'shared', 'scale': 'frozen', 'a': 'a', 'b': 'b'}
  params = {'in': 2.0, 'scale': 3.0, 'a': 5.0, 'b': 7.0}
  params = jax.tree.map(jnp.asarray, params)
  step = mtl_jax.feature_update(
    lambda p, x: p['scale'] * p['in'] * x,
    lambda p, z, x: {t: p['scale'] * p[t] * z for t in ('a', 'b')},
    mtl_jax.linear(),
    ('a', 'b'),
    param_labels=labels,
  )
  _, grads, _ = run(step, params, 1.0)
  # The mean of 9 in a and 9 in b.
  expected = {'in': 54.0, 'scale': 0.0, 'a': 9.0, 'b': 9.0}
  assert jax.tree.map(float, grads) == expected


def test_aux_is_that_of_both_functions():
  step = mtl_jax.feature_update(
    lambda w, x: (w * x, 'trunk'),
    lambda w, z, x: ({'a': jnp.sum(z)}, 2 * x),
    mtl_jax.linear(),
    ('a',),
    has_aux=True,
  )
  w, x = jnp.ones(2), jnp.array([1.0, 2.0])
  (_, aux), grad, _ = step.update(w, step.init(w, x), x)
  assert aux[0] == 'trunk'
  np.testing.assert_array_equal(aux[1], [2.0, 4.0])
  np.testing.assert_array_equal(grad, x)


@pytest.mark.parametrize('method', methods.params(REFUSED))
def test_method_that_keeps_gradients_or_needs_more_of_them_is_refused(method):
  with pytest.raises(ValueError, match=r'extra_grads|shape of the features'):
    mtl_jax.feature_update(linear_trunk, heads_loss, one(method), NAMES).init(
      PARAMS, IMAGE
    )


def test_second_step_and_a_smaller_batch_fit_the_same_state():
  traces = []

  def trunk(params, image):
    traces.append(image.shape)
    return linear_trunk(params, image)

  def loss(params, z, x):
    return {t: jnp.mean((z @ params['heads'][t]) ** 2) for t in NAMES}

  step = mtl_jax.feature_update(trunk, loss, mtl_jax.gradvac(), NAMES)
  update = quick_compile.jit(step.update)
  state = step.init(PARAMS, IMAGE)
  before = methods.structure(state)
  del traces[:]
  _, _, state = update(PARAMS, state, IMAGE)
  once = len(traces)
  _, _, state = update(PARAMS, state, IMAGE)
  assert len(traces) == once
  _, _, state = update(PARAMS, state, IMAGE[:3])
  assert methods.structure(state) == before


@pytest.mark.parametrize('name', ['mgda', 'graddrop'])
def test_eight_devices_give_what_one_gives(name):
  def loss(params, z, batch):
    return {
      t: jnp.mean((z @ params['heads'][t] - batch['y'] * i) ** 2)
      for i, t in enumerate(NAMES)
    }

  trunk = lambda params, batch: jnp.tanh(batch['x'] @ params['shared'])
  step = mtl_jax.feature_update(trunk, loss, getattr(mtl_jax, name)(), NAMES)
  batch = {'x': draw(7, 32, INPUTS), 'y': draw(8, 32)}
  state = step.init(PARAMS, batch)
  update = quick_compile.jit(step.update)
  _, expected, _ = update(PARAMS, state, batch)
  mesh = jax.make_mesh(
    (8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,)
  )
  place = lambda spec: functools.partial(
    jax.device_put, device=jax.sharding.NamedSharding(mesh, spec)
  )
  _, found, _ = update(
    place(P())(PARAMS), place(P())(state), place(P('data'))(batch)
  )
  close(found, expected)


def _regularised(params, z, x):
  losses = heads_loss(params, z, x)
  return {**losses, 'depth': losses['depth'] + jnp.sum(params['shared'] ** 2)}


def _looks_at_a_constant(params, z, x):
  size = jax.lax.stop_gradient(jnp.sum(params['shared'] ** 2))
  return jax.checkpoint(heads_loss)(params, z / size, x)


def _mixed_trunk(params, x):
  return linear_trunk(params, x) * params['heads']['colour'][None, :]


@pytest.mark.parametrize(
  ('trunk', 'loss', 'message'),
  [
    (linear_trunk, _regularised, r"loss_fn must .* \[\"\['shared'\]\"\]"),
    (
      _mixed_trunk,
      heads_loss,
      r"features_fn must not .* \[\"\['heads'\]\['colour'\]\"\]",
    ),
  ],
)
def test_gradient_that_would_be_lost_is_an_error(trunk, loss, message):
  step = mtl_jax.feature_update(trunk, loss, mtl_jax.mgda(), NAMES)
  state = step.init(PARAMS, IMAGE)
  for update in (step.update, quick_compile.jit(step.update)):
    with pytest.raises(ValueError, match=message):
      update(PARAMS, state, IMAGE)


def test_shared_parameters_without_a_gradient_in_the_losses_are_no_error():
  step = mtl_jax.feature_update(
    linear_trunk, _looks_at_a_constant, mtl_jax.linear(), NAMES
  )
  _, grads, _ = run(step, PARAMS, IMAGE)
  mean = lambda params: sum(
    _looks_at_a_constant(params, linear_trunk(params, IMAGE), IMAGE).values()
  )
  close(grads, jax.tree.map(lambda g: g / 3, jax.grad(mean)(PARAMS)))


def test_arguments_that_do_not_fit_are_named():
  make = functools.partial(
    mtl_jax.feature_update, linear_trunk, heads_loss, task_names=NAMES
  )
  with pytest.raises(ValueError, match='must have no axes'):
    make(mtl_jax.mgda(axis_name='i'))
  with pytest.raises(ValueError, match=r"head_scale must be .*got 'half'"):
    make(mtl_jax.mgda(), head_scale='half')
  with pytest.raises(ValueError, match="'weights' needs an aggregator"):
    make(mtl_jax.graddrop(), head_scale='weights').init(PARAMS, IMAGE)
  step = mtl_jax.feature_update(
    lambda w, x: {'z': x.astype(int)}, heads_loss, mtl_jax.mgda(), NAMES
  )
  with pytest.raises(ValueError, match=r"floating-point, got int.* at \['z'\]"):
    step.init(PARAMS, IMAGE)


def _flops(tasks):
  """Of the compiled update, and what it should be: matrix products alone."""
  batch, inputs, hidden, outputs = 16, 32, 128, 8
  names = [f'task_{i}' for i in range(tasks)]
  params = {
    'shared': (jnp.ones((inputs, hidden)), jnp.ones((hidden, hidden))),
    'heads': {task: jnp.ones((hidden, outputs)) for task in names},
  }

  def trunk(params, image):
    first, second = params['shared']
    return jnp.tanh(jnp.tanh(image @ first) @ second)

  def loss(params, z, image):
    return {t: jnp.mean((z @ params['heads'][t]) ** 2) for t in names}

  step = mtl_jax.feature_update(trunk, loss, mtl_jax.linear(), names)
  image = jnp.ones((batch, inputs))
  state = step.init(params, image)
  lowered = jax.jit(step.update).lower(params, state, image)
  first, second = 2 * batch * inputs * hidden, 2 * batch * hidden * hidden
  head, gram = 3 * 2 * batch * hidden * outputs, 2 * tasks**2 * batch * hidden
  expected = 2 * first + 3 * second + tasks * head + gram
  return lowered.compile(quick_compile.DEFAULTS).cost_analysis()[
    'flops'
  ], expected


@pytest.mark.parametrize('tasks', [1, 8])
def test_the_trunk_is_pulled_back_once_whatever_the_number_of_tasks(tasks):
  found, expected = _flops(tasks)
  # Elementwise work; one pull-back of the trunk more would be 40 per cent.
  assert found == pytest.approx(expected, rel=0.12)
