"""Gram matrices from inputs and cotangents are those of the gradients."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import methods
import numpy as np
import pytest
import quick_compile

import mtl_jax

NAMES = ('shape', 'colour', 'depth')
BATCH, POSITIONS, INPUTS, WIDTH = 2, 3, 24, 32

# The aggregator sees the same Gram matrix: one of each kind will do.
KINDS = ('linear', 'mgda', 'pcgrad', 'gradnorm')
REFUSED = ('graddrop', 'trimmed_mean', 'moco', 'db_mtl', 'excess_mtl', 'modo')


def draw(seed, *shape):
  values = np.random.default_rng(seed).standard_normal(shape)
  return jnp.asarray(values / np.sqrt(shape[0]), jnp.float32)


PARAMS = {
  'shared': {
    # Six rows are fewer than in and out of the first, and more than the out of
    # the second: its task gradients are formed.
    'wide': draw(0, INPUTS, WIDTH),
    'bias': draw(1, WIDTH),
    'narrow': draw(2, WIDTH, 2),
  },
  'heads': {task: draw(3 + i, 2) for i, task in enumerate(NAMES)},
}
IMAGE = 5 * draw(6, BATCH, POSITIONS, INPUTS)


def loss_fn(params, dense, image):
  shared = params['shared']
  hidden = jnp.tanh(dense(image, shared['wide']) + shared['bias'][None, None])
  hidden = jnp.sum(dense(hidden, shared['narrow']), axis=1)
  return {
    task: (1 + i) * jnp.mean((hidden @ params['heads'][task] - 2.0 * i) ** 2)
    for i, task in enumerate(NAMES)
  }


def plain_loss(params, image):
  return loss_fn(params, jnp.matmul, image)


def method_named(name):
  (method,) = (m for m in methods.METHODS if m.name == name)
  return method.make(range(3), num_tasks=3)


def run(step, params, *args, **options):
  """The first update, compiled."""
  state = step.init(params)
  return quick_compile.jit(step.update)(params, state, *args, **options)


def check_steps(step, tx, plain_loss, params):
  """Both take three steps, with other tasks present in each, and agree."""
  at, at_each = mtl_jax.task_grad(plain_loss, NAMES)

  @quick_compile.jit
  def both(params, state, exact_state, active):
    (losses, _), found, state = step.update(params, state, IMAGE, active=active)
    (wanted, _), task_grads = at(params, IMAGE)
    exact, exact_state = tx.update(
      task_grads,
      exact_state,
      params,
      losses=wanted,
      active=active,
      grad_fn=lambda task_params: at_each(task_params, IMAGE)[1],
    )
    return (losses, found), state, (wanted, exact), exact_state

  state, exact_state = step.init(params), tx.init(params)
  for active in ([True] * 3, [True, False, True], [False] * 3):
    found, state, exact, exact_state = both(
      params, state, exact_state, np.array(active)
    )
    size = max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(exact[1]))
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, atol=1e-4 * size),
      found,
      exact,
    )
    params = jax.tree.map(lambda p, g: p - 0.1 * g, params, exact[1])
  shown, wanted = mtl_jax.diagnostics(state), mtl_jax.diagnostics(exact_state)
  assert wanted
  for key, value in wanted.items():
    np.testing.assert_allclose(shown[key], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('head_scale', ['none', 'weights'])
@pytest.mark.parametrize('name', KINDS)
def test_update_is_that_of_task_gradients(name, head_scale):
  options = {'head_scale': head_scale}
  step = mtl_jax.ghost_update(loss_fn, method_named(name), NAMES, **options)
  tx = mtl_jax.shared_only(method_named(name), NAMES, **options)
  check_steps(step, tx, plain_loss, PARAMS)


def through_features(features):
  """A second wide layer after the first, and a first one of its own.

  Args:
    features: what the second one is given of the first one's outputs.
  """

  def loss_fn(params, dense, image):
    shared = params['shared']
    first = jnp.tanh(dense(image, shared['wide']) + shared['bias'][None, None])
    hidden = (
      first
      + dense(features(first), shared['second'])
      + jnp.sin(dense(image, shared['beside']))
    )
    return {
      task: (1 + i) * jnp.mean((hidden @ params['heads'][task] - 2.0 * i) ** 2)
      for i, task in enumerate(NAMES)
    }

  return loss_fn


DEEP = {
  'shared': {
    'wide': draw(0, INPUTS, WIDTH),
    'bias': draw(1, WIDTH),
    'second': draw(11, WIDTH, WIDTH),
    'beside': draw(12, INPUTS, WIDTH),
  },
  'heads': {task: draw(13 + i, WIDTH) for i, task in enumerate(NAMES)},
}


@pytest.mark.parametrize('norm', ['separate', 'joint'])
@pytest.mark.parametrize('name', KINDS)
def test_flat_update_is_that_of_flat_minima(name, norm):
  loss_fn = through_features(lambda x: x)
  options = {'rho': 0.5, 'rho_heads': 0.3, 'norm': norm}
  step = mtl_jax.ghost_update(loss_fn, method_named(name), NAMES, **options)
  tx = mtl_jax.flat_minima(method_named(name), NAMES, **options)
  plain = lambda params, image: loss_fn(params, jnp.matmul, image)
  check_steps(step, tx, plain, DEEP)


def test_inputs_that_depend_on_parameters_without_a_derivative_are_seen():
  loss_fn = through_features(lambda x: jax.lax.stop_gradient(jnp.round(3 * x)))
  step = mtl_jax.ghost_update(loss_fn, mtl_jax.mgda(), NAMES, rho=0.5)
  tx = mtl_jax.flat_minima(mtl_jax.mgda(), NAMES, rho=0.5)
  plain = lambda params, image: loss_fn(params, jnp.matmul, image)
  check_steps(step, tx, plain, DEEP)


def test_heads_of_a_flat_update_are_scaled_if_asked():
  loss_fn = through_features(lambda x: x)
  aggregator = mtl_jax.linear(weights=(1, 2, 3), num_tasks=3)
  step = mtl_jax.ghost_update(
    loss_fn, aggregator, NAMES, rho=0.5, head_scale='weights'
  )
  tx = mtl_jax.flat_minima(aggregator, NAMES, rho=0.5, head_scale='weights')
  plain = lambda params, image: loss_fn(params, jnp.matmul, image)
  check_steps(step, tx, plain, DEEP)


def test_radius_follows_its_schedule():
  step = mtl_jax.ghost_update(
    loss_fn, mtl_jax.linear(), NAMES, rho=lambda count: 0.5 * (count + 1)
  )
  update, state = quick_compile.jit(step.update), step.init(PARAMS)
  for radius in (0.5, 1.0):
    fixed = mtl_jax.ghost_update(loss_fn, mtl_jax.linear(), NAMES, rho=radius)
    _, wanted, _ = run(fixed, PARAMS, IMAGE)
    _, found, state = update(PARAMS, state, IMAGE)
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, atol=1e-6), found, wanted
    )


def test_gram_matrix_is_that_of_the_gradients_in_float64():
  rng = np.random.default_rng(0)
  x, w = rng.standard_normal((4, 16)), rng.standard_normal((16, 12))
  D = rng.standard_normal((2, 4, 12))

  def loss(w, dense, x):
    y = dense(x, w)
    return [jnp.sum(y * d) for d in jnp.asarray(D, jnp.float32)]

  step = mtl_jax.ghost_update(
    lambda *args: jnp.stack(loss(*args)), mtl_jax.linear(), ('a', 'b')
  )
  w, x32 = (jnp.asarray(a, jnp.float32) for a in (w, x))
  _, grad, state = run(step, w, x32)
  rows = np.einsum('ni,tno->tio', x, D)
  np.testing.assert_allclose(grad, rows.mean(axis=0), rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(
    mtl_jax.diagnostics(state)['gram'],
    np.einsum('tio,sio->ts', rows, rows),
    rtol=1e-5,
  )


@pytest.mark.parametrize('rho', [None, 0.5])
def test_a_gradient_that_is_not_finite_reaches_the_update_if_present(rho):
  step = mtl_jax.ghost_update(loss_fn, mtl_jax.mgda(), NAMES, rho=rho)
  params = jax.tree.map(lambda x: x, PARAMS)
  params['heads']['colour'] *= jnp.nan
  update, state = quick_compile.jit(step.update), step.init(params)
  _, grads, _ = update(params, state, IMAGE, active=np.array([True] * 3))
  for leaf in jax.tree.leaves(grads['shared']):
    assert not np.any(np.isfinite(leaf))
  active = np.array([True, False, True])
  _, grads, _ = update(params, state, IMAGE, active=active)
  for leaf in jax.tree.leaves(grads):
    assert np.all(np.isfinite(leaf))
  np.testing.assert_array_equal(grads['heads']['colour'], 0)


def test_dense_computes_in_the_dtype_of_its_input():
  def loss(w, dense, x):
    y = dense(x, w)
    assert y.dtype == jnp.bfloat16
    return {'a': jnp.sum(y), 'b': -jnp.sum(y)}

  step = mtl_jax.ghost_update(loss, mtl_jax.linear(weights=(3, 1)), ('a', 'b'))
  w, x = jnp.ones((4096, 8)), jnp.ones((1, 4096), jnp.bfloat16)
  _, grad, state = run(step, w, x)
  assert grad.dtype == jnp.float32
  np.testing.assert_array_equal(grad, 2.0)
  # In bfloat16 a sum of ones stops at 256.
  np.testing.assert_allclose(
    mtl_jax.diagnostics(state)['gram'],
    4096 * 8 * np.array([[1, -1], [-1, 1]]),
    rtol=1e-5,
  )


@pytest.mark.parametrize('rho', [None, 0.5])
def test_eight_devices_give_what_one_gives(rho):
  names = NAMES[:2]

  def loss(params, dense, x):
    y = jnp.tanh(dense(x, params['shared']))
    return {t: jnp.mean((y @ params['heads'][t]) ** 2) for t in names}

  params = {
    'shared': draw(7, 40, 48),
    'heads': {t: draw(8 + i, 48) for i, t in enumerate(names)},
  }
  x = 4 * draw(10, 16, 40)
  step = mtl_jax.ghost_update(loss, mtl_jax.mgda(), names, rho=rho)
  state, update = step.init(params), quick_compile.jit(step.update)
  _, expected, _ = update(params, state, x)
  mesh = jax.make_mesh(
    (8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,)
  )
  put = lambda tree, *spec: jax.device_put(
    tree, jax.sharding.NamedSharding(mesh, P(*spec))
  )
  _, found, _ = update(put(params), put(state), put(x, 'data'))
  size = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(found))
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, atol=1e-5 * size),
    found,
    expected,
  )


def test_aux_is_that_of_the_loss_function():
  step = mtl_jax.ghost_update(
    lambda w, dense, x: ({'a': jnp.sum(dense(x, w))}, 3 * x),
    mtl_jax.linear(),
    ('a',),
    has_aux=True,
  )
  x = jnp.ones((1, 2))
  (_, aux), grad, _ = run(step, jnp.ones((2, 2)), x)
  np.testing.assert_array_equal(aux, 3 * x)
  np.testing.assert_array_equal(grad, 1.0)


@pytest.mark.parametrize('seed', range(4))
def test_gradient_that_cancels_to_rounding_is_not_perturbed(seed):
  """Its inner product with itself is noise, and may be negative."""
  rng = np.random.default_rng(seed)
  x = rng.standard_normal((8, 3)) @ rng.standard_normal((3, 64))
  # Residuals that no column of x meets: the gradient is zero.
  null = np.linalg.svd(x)[0][:, 3:]
  residual = null @ rng.standard_normal((5, 64))
  w = jnp.asarray(rng.standard_normal((64, 64)), jnp.float32)
  x = jnp.asarray(x, jnp.float32)
  target = x @ w - jnp.asarray(residual, jnp.float32)

  def loss(w, dense, x):
    return {'a': jnp.sum((dense(x, w) - target) ** 2)}

  step = lambda rho: mtl_jax.ghost_update(
    loss, mtl_jax.linear(), ('a',), rho=rho
  )
  _, expected, _ = run(step(0.0), w, x)
  _, found, _ = run(step(0.5), w, x)
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)
  assert np.abs(found).max() < 1e-2


def _scaled(params, dense, x):
  y = dense(x, 2 * params['shared']['wide'])
  return dict.fromkeys(NAMES, jnp.sum(y))


def _twice(params, dense, x):
  w = params['shared']['wide']
  return dict.fromkeys(NAMES, jnp.sum(dense(x, w)) + jnp.sum(dense(x, w)))


def _vector(params, dense, x):
  return dict.fromkeys(NAMES, jnp.sum(dense(x, params['shared']['bias'])))


def _regularised(params, dense, x):
  losses = loss_fn(params, dense, x)
  return {**losses, 'depth': jnp.sum(params['shared']['wide'] ** 2)}


@pytest.mark.parametrize(
  ('loss', 'message'),
  [
    (_scaled, r'as it stands in params.* \(24, 32\) that is none of them'),
    (_twice, r'each once; got .* \(24, 32\) that is one again'),
    (_vector, r'dense needs w \[in, out\], got shape \(32,\)'),
    (_regularised, r"through dense alone.* \[\"\['shared'\]\['wide'\]\"\]"),
  ],
)
def test_gradient_that_would_be_lost_is_an_error(loss, message):
  step = mtl_jax.ghost_update(loss, mtl_jax.mgda(), NAMES)
  for update in (step.update, jax.jit(step.update)):
    with pytest.raises(ValueError, match=message):
      update(PARAMS, step.init(PARAMS), IMAGE)


@pytest.mark.parametrize('name', REFUSED)
def test_method_that_needs_more_than_inner_products_is_refused(name):
  with pytest.raises(ValueError, match='map from the Gram matrix'):
    mtl_jax.ghost_update(loss_fn, method_named(name), NAMES)


@pytest.mark.parametrize(
  ('option', 'message'),
  [
    ({'rho': -1.0}, r'rho must.*-1'),
    ({'rho': 0.5, 'norm': 'each'}, 'norm'),
    ({'rho': 0.5, 'eps': 0.0}, 'eps'),
    ({'head_scale': 'norm'}, 'head_scale'),
  ],
)
def test_option_out_of_range_is_an_error(option, message):
  with pytest.raises(ValueError, match=message):
    mtl_jax.ghost_update(loss_fn, mtl_jax.mgda(), NAMES, **option)


@pytest.mark.parametrize('rho', [None, 0.5])
@pytest.mark.parametrize('rows', [2, 64])
def test_operations_are_those_of_the_cheaper_way(rows, rho):
  # More rows than this are fewer operations with gradients; flat, many more.
  rows = 4 * rows if rho and rows > 2 else rows
  inputs, outputs, tasks = 64, 64, 4
  names = [f'task_{i}' for i in range(tasks)]
  targets = jnp.asarray(np.random.default_rng(0).random((tasks, rows, outputs)))

  def loss(w, dense, x):
    y = jnp.tanh(dense(x, w))
    return {t: jnp.sum(y * targets[i]) for i, t in enumerate(names)}

  step = mtl_jax.ghost_update(loss, mtl_jax.linear(), names, rho=rho)
  w, x = jnp.ones((inputs, outputs)), jnp.ones((rows, inputs))
  compiled = (
    jax.jit(step.update)
    .lower(w, step.init(w), x)
    .compile(quick_compile.DEFAULTS)
  )
  forward = 2 * rows * inputs * outputs
  # Products with the cotangents, and Gram matrices, of one or two kinds.
  kinds = 1 if rho is None else 2
  if rows == 2:
    kernel = 2 * rows**2 * (inputs + kinds * tasks * outputs)
    gram = 2 * tasks**2 * rows * outputs
    expected = forward + kernel + kinds * gram + forward
    # What no task's gradient has, no array has.
    size = w.nbytes
    assert compiled.memory_analysis().temp_size_in_bytes < size
  else:
    gram = 2 * tasks**2 * inputs * outputs
    passes = 1 if rho is None else 3
    expected = forward + passes * tasks * forward + kinds * gram
  found = compiled.cost_analysis()['flops']
  # Elementwise work; T gradients would be four times the forward pass.
  assert found == pytest.approx(expected, rel=0.4)
