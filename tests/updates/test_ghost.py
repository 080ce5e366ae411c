"""Gram matrices from inputs and cotangents are those of the gradients."""

import functools

import comparing
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import methods
import numpy as np
import pytest
import quick_compile

import mtl_jax

NAMES = ('shape', 'colour', 'depth')
ROWS, POSITIONS, INPUTS, WIDTH = 2, 3, 24, 32

# The aggregator sees the same Gram matrix: one of each kind will do.
KINDS = ('linear', 'mgda', 'pcgrad', 'gradnorm')
ACTIVES = ([1, 1, 1], [1, 0, 1], [0, 0, 0])


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
IMAGE = 5 * draw(6, ROWS, POSITIONS, INPUTS)


def batches(actives=ACTIVES):
  return comparing.batches_of(NAMES, actives, image=IMAGE)


def of_head(params, hidden, i, task):
  error = hidden @ params['heads'][task] - 2.0 * i
  return (1 + i) * jnp.mean(error**2)


def dense_loss(params, dense, batch):
  shared, image = params['shared'], batch['image']
  hidden = jnp.tanh(dense(image, shared['wide']) + shared['bias'][None, None])
  hidden = jnp.sum(dense(hidden, shared['narrow']), axis=1)
  return {t: of_head(params, hidden, i, t) for i, t in enumerate(NAMES)}


def losses_of(dense_loss_fn, names=NAMES):
  """The losses with a dense form, evaluated in the quickest way to compile."""
  loss_fn = lambda params, *args: dense_loss_fn(params, jnp.matmul, *args)
  objective = mtl_jax.Objective(loss_fn, dense_loss_fn=dense_loss_fn)
  return mtl_jax.task_losses(objective, names, engine='unroll')


def aggregator_of(name):
  (method,) = (m for m in methods.METHODS if m.name == name)
  return method.make(range(3), num_tasks=3)


def run(joint, losses, params, batch, state=None):
  """The first update, compiled, without aux."""
  state = joint.init(params) if state is None else state

  @quick_compile.jit
  def update(params, state, batch):
    found, state = joint.update(losses.on(batch), params, state)
    return found.grads, state

  return update(params, state, batch)


def pair(name, flat=None, **options):
  """The update without task gradients, and the one with them."""
  joint = mtl_jax.ghost_update(
    aggregator_of(name),
    NAMES,
    flat=None if flat is None else mtl_jax.Perturbation(**flat),
    **options,
  )
  if flat is None:
    tx = mtl_jax.shared_only(aggregator_of(name), NAMES, **options)
  else:
    tx = mtl_jax.flat_minima(aggregator_of(name), NAMES, **flat, **options)
  return joint, mtl_jax.stack_update(tx)


def test_update_is_that_of_task_gradients():
  pairs = {name: pair(name, head_scale='none') for name in KINDS} | {
    'heads by weights': pair('mgda', head_scale='weights')
  }
  comparing.assert_same_updates(losses_of(dense_loss), pairs, PARAMS, batches())


def through_features(features):
  """A second wide layer after the first, and a first one of its own.

  Args:
    features: what the second one is given of the first one's outputs.
  """

  def loss_fn(params, dense, batch):
    shared, image = params['shared'], batch['image']
    first = jnp.tanh(dense(image, shared['wide']) + shared['bias'][None, None])
    hidden = (
      first
      + dense(features(first), shared['second'])
      + jnp.sin(dense(image, shared['beside']))
    )
    return {t: of_head(params, hidden, i, t) for i, t in enumerate(NAMES)}

  return losses_of(loss_fn)


DEEP = {
  'shared': {
    'wide': draw(0, INPUTS, WIDTH),
    'bias': draw(1, WIDTH),
    'second': draw(11, WIDTH, WIDTH),
    'beside': draw(12, INPUTS, WIDTH),
  },
  'heads': {task: draw(13 + i, WIDTH) for i, task in enumerate(NAMES)},
}
RADII = {'rho': 0.5, 'rho_heads': 0.3}


def test_flat_update_is_that_of_flat_minima():
  schedule = {'rho': lambda count: 0.5 * (count + 1), 'norm': 'joint'}
  pairs = {
    'pcgrad': pair('pcgrad', RADII),
    'gradnorm': pair('gradnorm', RADII),
    'one norm, a schedule, heads by weights': pair(
      'mgda', schedule, head_scale='weights'
    ),
  }
  comparing.assert_same_updates(
    through_features(lambda x: x), pairs, DEEP, batches()
  )


def test_inputs_that_depend_on_parameters_without_a_derivative_are_seen():
  losses = through_features(lambda x: jax.lax.stop_gradient(jnp.round(3 * x)))
  pairs = {'mgda': pair('mgda', RADII)}
  comparing.assert_same_updates(losses, pairs, DEEP, batches(ACTIVES[:1]))


def test_gram_matrix_is_that_of_the_gradients_in_float64():
  rng = np.random.default_rng(0)
  x, w = rng.standard_normal((4, 16)), rng.standard_normal((16, 12))
  D = rng.standard_normal((2, 4, 12))

  def loss(w, dense, x):
    y = dense(x, w)
    return jnp.stack([jnp.sum(y * d) for d in jnp.asarray(D, jnp.float32)])

  joint = mtl_jax.ghost_update(mtl_jax.linear(), ('a', 'b'))
  w, x32 = (jnp.asarray(a, jnp.float32) for a in (w, x))
  grad, state = run(joint, losses_of(loss, ('a', 'b')), w, x32)
  rows = np.einsum('ni,tno->tio', x, D)
  np.testing.assert_allclose(grad, rows.mean(axis=0), rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(
    mtl_jax.diagnostics(state)['gram'],
    np.einsum('tio,sio->ts', rows, rows),
    rtol=1e-5,
  )


@pytest.mark.parametrize('rho', [None, 0.5])
def test_a_gradient_that_is_not_finite_reaches_the_update_if_present(rho):
  flat = None if rho is None else mtl_jax.Perturbation(rho)
  joint = mtl_jax.ghost_update(mtl_jax.mgda(), NAMES, flat=flat)
  params = jax.tree.map(lambda x: x, PARAMS)
  params['heads']['colour'] *= jnp.nan
  losses, state = losses_of(dense_loss), joint.init(params)
  update = quick_compile.jit(
    lambda batch: joint.update(losses.on(batch), params, state)[0].grads
  )
  present, absent = map(update, batches(([1, 1, 1], [1, 0, 1])))
  for leaf in jax.tree.leaves(present['shared']):
    assert not np.any(np.isfinite(leaf))
  for leaf in jax.tree.leaves(absent):
    assert np.all(np.isfinite(leaf))
  np.testing.assert_array_equal(absent['heads']['colour'], 0)


def test_dense_computes_in_the_dtype_of_its_input():
  def loss(w, dense, x):
    y = dense(x, w)
    assert y.dtype == jnp.bfloat16
    return {'a': jnp.sum(y), 'b': -jnp.sum(y)}

  joint = mtl_jax.ghost_update(mtl_jax.linear(weights=(3, 1)), ('a', 'b'))
  w, x = jnp.ones((4096, 8)), jnp.ones((1, 4096), jnp.bfloat16)
  grad, state = run(joint, losses_of(loss, ('a', 'b')), w, x)
  assert grad.dtype == jnp.float32
  np.testing.assert_array_equal(grad, 2.0)
  # In bfloat16 a sum of ones stops at 256.
  np.testing.assert_allclose(
    mtl_jax.diagnostics(state)['gram'],
    4096 * 8 * np.array([[1, -1], [-1, 1]]),
    rtol=1e-5,
  )


def test_eight_devices_give_what_one_gives():
  names = NAMES[:2]

  def loss(params, dense, x):
    y = jnp.tanh(dense(x, params['shared']))
    return {t: jnp.mean((y @ params['heads'][t]) ** 2) for t in names}

  params = {
    'shared': draw(7, 40, 48),
    'heads': {t: draw(8 + i, 48) for i, t in enumerate(names)},
  }
  x = 4 * draw(10, 16, 40)
  losses = losses_of(loss, names)
  joints = [
    mtl_jax.ghost_update(mtl_jax.mgda(), names, flat=flat)
    for flat in (None, mtl_jax.Perturbation(0.5))
  ]
  update = quick_compile.jit(
    lambda params, x: [
      joint.update(losses.on(x), params, joint.init(params))[0].grads
      for joint in joints
    ]
  )
  mesh = jax.make_mesh(
    (8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,)
  )
  put = lambda tree, *spec: jax.device_put(
    tree, jax.sharding.NamedSharding(mesh, P(*spec))
  )
  expected, found = update(params, x), update(put(params), put(x, 'data'))
  size = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(found))
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, atol=1e-5 * size),
    found,
    expected,
  )


def test_aux_is_that_of_the_loss_function():
  def loss(w, dense, x):
    aux = mtl_jax.Aux(mean=3 * x, sum={'rows': len(x)})
    return {'a': jnp.sum(dense(x, w))}, aux

  joint = mtl_jax.ghost_update(mtl_jax.linear(), ('a',))
  w, x = jnp.ones((2, 2)), jnp.ones((1, 2))
  losses = losses_of(loss, ('a',))
  update = lambda w, x: joint.update(losses.on(x), w, joint.init(w))
  found, _ = quick_compile.jit(update)(w, x)
  np.testing.assert_array_equal(found.aux.mean, 3 * x)
  assert found.aux.sum == {'rows': 1}
  np.testing.assert_array_equal(found.grads, 1.0)


def test_a_gradient_that_cancels_to_rounding_is_not_perturbed():
  """Its inner product with itself is noise, and may be negative."""
  radii = (0.0, 0.5)
  joints = [
    mtl_jax.ghost_update(mtl_jax.linear(), ('a',), flat=mtl_jax.Perturbation(r))
    for r in radii
  ]

  def loss(w, dense, batch):
    x, target = batch
    return {'a': jnp.sum((dense(x, w) - target) ** 2)}

  @quick_compile.jit
  def run(w, x, target):
    here = losses_of(loss, ('a',)).on((x, target))
    return [j.update(here, w, j.init(w))[0].grads for j in joints]

  for seed in range(4):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((8, 3)) @ rng.standard_normal((3, 64))
    # Residuals that no column of x meets: the gradient is zero.
    null = np.linalg.svd(x)[0][:, 3:]
    residual = null @ rng.standard_normal((5, 64))
    w = jnp.asarray(rng.standard_normal((64, 64)), jnp.float32)
    x = jnp.asarray(x, jnp.float32)
    target = x @ w - jnp.asarray(residual, jnp.float32)
    expected, found = run(w, x, target)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)
    assert np.abs(found).max() < 1e-2


def _scaled(params, dense, batch):
  y = dense(batch['image'], 2 * params['shared']['wide'])
  return dict.fromkeys(NAMES, jnp.sum(y))


def _twice(params, dense, batch):
  y = lambda: jnp.sum(dense(batch['image'], params['shared']['wide']))
  return dict.fromkeys(NAMES, y() + y())


def _vector(params, dense, batch):
  y = dense(batch['image'], params['shared']['bias'])
  return dict.fromkeys(NAMES, jnp.sum(y))


def _regularised(params, dense, batch):
  losses = dense_loss(params, dense, batch)
  return {**losses, 'depth': jnp.sum(params['shared']['wide'] ** 2)}


@pytest.mark.parametrize(
  ('loss', 'message'),
  [
    (_scaled, r'as it stands in params.* \(24, 32\) that is none of them'),
    (_twice, r'each once; got .* \(24, 32\) that is one again'),
    (_vector, r'dense needs w \[in, out\], got shape \(32,\)'),
    (_regularised, r"only through dense.* \[\"\['shared'\]\['wide'\]\"\]"),
  ],
)
def test_a_gradient_that_would_be_lost_is_an_error(loss, message):
  joint, losses = mtl_jax.ghost_update(mtl_jax.mgda(), NAMES), losses_of(loss)

  def update(params, batch):
    return joint.update(losses.on(batch), params, joint.init(params))

  (batch,) = batches(ACTIVES[:1])
  for fn in (update, functools.partial(jax.eval_shape, update)):
    with pytest.raises(ValueError, match=message):
      fn(PARAMS, batch)


def test_an_adaptive_perturbation_is_refused():
  with pytest.raises(ValueError, match=r'flat\.adaptive must be'):
    mtl_jax.ghost_update(
      mtl_jax.mgda(), NAMES, flat=mtl_jax.Perturbation(adaptive=True)
    )


@pytest.mark.parametrize('rho', [None, 0.5])
@pytest.mark.parametrize('rows', [2, 64])
def test_operations_are_those_of_the_cheaper_way(rows, rho):
  # More rows than this are fewer operations with gradients; flat, many more.
  rows = 4 * rows if rho and rows > 2 else rows
  inputs, outputs, tasks = 64, 64, 4
  names = tuple(f'task_{i}' for i in range(tasks))
  targets = jnp.asarray(np.random.default_rng(0).random((tasks, rows, outputs)))

  def loss(w, dense, x):
    y = jnp.tanh(dense(x, w))
    return {t: jnp.sum(y * targets[i]) for i, t in enumerate(names)}

  flat = None if rho is None else mtl_jax.Perturbation(rho)
  joint = mtl_jax.ghost_update(mtl_jax.linear(), names, flat=flat)
  losses = losses_of(loss, names)

  def update(w, state, x):
    found, state = joint.update(losses.on(x), w, state)
    return found.grads, state

  w, x = jnp.ones((inputs, outputs)), jnp.ones((rows, inputs))
  compiled = (
    jax.jit(update).lower(w, joint.init(w), x).compile(quick_compile.DEFAULTS)
  )
  forward = 2 * rows * inputs * outputs
  # Products with the cotangents, and Gram matrices, of one or two kinds.
  kinds = 1 if rho is None else 2
  if rows == 2:
    kernel = 2 * rows**2 * (inputs + kinds * tasks * outputs)
    gram = 2 * tasks**2 * rows * outputs
    expected = forward + kernel + kinds * gram + forward
    # What no task's gradient has, no array has.
    assert compiled.memory_analysis().temp_size_in_bytes < w.nbytes
  else:
    gram = 2 * tasks**2 * inputs * outputs
    passes = 1 if rho is None else 3
    expected = forward + passes * tasks * forward + kinds * gram
  found = compiled.cost_analysis()['flops']
  # Elementwise work; T gradients would be four times the forward pass.
  assert found == pytest.approx(expected, rel=0.4)
