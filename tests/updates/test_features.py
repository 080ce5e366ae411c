"""Tasks are combined at the features, and the trunk is pulled back once."""

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
ROWS, INPUTS, WIDTH = 8, 10, 4

# Further stacks, or memory of the features' shape.
REFUSED = tuple(
  m
  for m in methods.METHODS
  if m.extra_batches or m.name.startswith(('moco', 'db_mtl', 'excess_mtl'))
)
# The update is that of a stack at the features: one of each kind will do.
KINDS = ('linear', 'mgda', 'pcgrad', 'gradnorm', 'nash_mtl')


def draw(seed, *shape):
  values = np.random.default_rng(seed).standard_normal(shape)
  return jnp.asarray(values, jnp.float32)


PARAMS = {
  'shared': draw(0, INPUTS, WIDTH),
  'heads': {task: draw(1 + i, WIDTH) for i, task in enumerate(NAMES)},
}
# Orthogonal rows: the Jacobian of the linear trunk times its transpose is 4 I.
ORTHOGONAL = 2 * jnp.linalg.qr(draw(4, INPUTS, ROWS))[0].T
IMAGE = draw(5, ROWS, INPUTS)


def batch_of(image, active=(1, 1, 1)):
  (batch,) = comparing.batches_of(NAMES, [active], image=image)
  return batch


def linear_trunk(params, batch):
  return batch['image'] @ params['shared']


def tanh_trunk(params, batch):
  # A tree of features, of which heads take different parts.
  hidden = jnp.tanh(linear_trunk(params, batch))
  return {'all': hidden, 'mean': jnp.mean(hidden, axis=0)}


def heads_loss(params, features, batch):
  del batch
  hidden = features
  if isinstance(features, dict):
    hidden = features['all'] + features['mean'][None, :] ** 2
  losses = {}
  for i, task in enumerate(NAMES):
    error = hidden @ params['heads'][task] - 3.0 * draw(6 + i, ROWS)
    losses[task] = (1 + i) * jnp.mean(error**2)
  return losses


def losses_of(trunk, heads=heads_loss, names=NAMES, **options):
  loss_fn = lambda params, batch: heads(params, trunk(params, batch), batch)
  objective = mtl_jax.Objective(loss_fn, trunk, heads)
  return mtl_jax.task_losses(objective, names, engine='unroll', **options)


def aggregator_of(name):
  (method,) = (m for m in methods.METHODS if m.name == name)
  return method.make(range(3), num_tasks=3)


def run(joint, losses, params, batch):
  """The first update, compiled."""
  return quick_compile.jit(
    lambda params, state, batch: joint.update(losses.on(batch), params, state)
  )(params, joint.init(params), batch)


def close(found, expected, tolerance=1e-5):
  size = max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(expected))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      a, b, rtol=0, atol=tolerance * size
    ),
    found,
    expected,
  )


def test_an_orthogonal_trunk_gives_what_gradients_of_parameters_give():
  losses = losses_of(linear_trunk)
  joints = {
    name: (
      mtl_jax.feature_update(aggregator_of(name), NAMES),
      mtl_jax.stack_update(mtl_jax.shared_only(aggregator_of(name), NAMES)),
    )
    for name in KINDS
  }

  @quick_compile.jit
  def both(batch):
    here = losses.on(batch)
    return {
      name: [j.update(here, PARAMS, j.init(PARAMS)) for j in pair]
      for name, pair in joints.items()
    }

  for active in ((1, 1, 1), (1, 0, 1)):
    for (found, state), (exact, right) in both(
      batch_of(ORTHOGONAL, active)
    ).values():
      close(found.grads, exact.grads, 1e-4)
      np.testing.assert_allclose(found.losses, exact.losses, rtol=1e-6)
      shown, wanted = map(mtl_jax.diagnostics, (state, right))
      np.testing.assert_allclose(
        shown['task_weights'], wanted['task_weights'], rtol=1e-3, atol=1e-4
      )
      np.testing.assert_allclose(4 * shown['gram'], wanted['gram'], rtol=1e-3)


def test_equal_weights_are_the_gradient_of_the_mean_loss():
  joint = mtl_jax.feature_update(mtl_jax.linear(), NAMES)
  batch = batch_of(IMAGE)
  for trunk in (linear_trunk, tanh_trunk):
    losses = losses_of(trunk)
    found, _ = run(joint, losses, PARAMS, batch)

    def values(params, trunk=trunk):
      return jnp.stack(
        [*heads_loss(params, trunk(params, batch), batch).values()]
      )

    mean = lambda params, values=values: (jnp.mean(values(params)),) * 2
    right = quick_compile.jit(jax.grad(mean, has_aux=True))(PARAMS)[0]
    close(found.grads, right)
    np.testing.assert_allclose(found.losses, values(PARAMS), rtol=1e-6)
    assert found.aux == mtl_jax.Aux()


def one_line(trunk, rows):
  """Losses of two tasks that are `rows` times the features."""
  return losses_of(trunk, lambda w, z, x: rows @ z, ('a', 'b'))


def test_gradients_of_different_examples_never_meet():
  # Of the parameter the gradients are -1 and 2, in conflict: MGDA would give 0.
  # Of the features they are (1, -2) and (3, -1), with the inner product 5: the
  # first is the shortest of their hull, and its sum is -1.
  losses = one_line(lambda w, x: w * x, jnp.array([[1.0, -2.0], [3.0, -1.0]]))
  joint = mtl_jax.feature_update(mtl_jax.mgda(), ('a', 'b'))
  found, state = run(joint, losses, jnp.array(1.0), jnp.ones(2))
  np.testing.assert_allclose(found.grads, -1.0, rtol=1e-6)
  shown = mtl_jax.diagnostics(state)
  np.testing.assert_allclose(shown['gram'], [[5.0, 5.0], [5.0, 10.0]])


def test_graddrop_picks_a_sign_for_every_feature_of_every_example():
  rows = jnp.array([[1.0, 2.0, 4.0, 8.0], [-1.0, -2.0, -4.0, -8.0]])
  losses = one_line(lambda w, x: w + x, rows)
  joint = mtl_jax.feature_update(mtl_jax.graddrop(), ('a', 'b'))
  w = jnp.array(0.0)

  @quick_compile.jit
  def many(state):
    def step(state, _):
      found, state = joint.update(losses.on(jnp.zeros(4)), w, state)
      return state, found.grads

    return jax.lax.scan(step, state, length=40)[1]

  seen = set(map(float, many(joint.init(w))))
  # Sums of 1, 2, 4 and 8 with signs: the picked ones can be read off.
  assert seen <= set(np.arange(-15.0, 16.0, 2.0))
  assert len(seen) > 8


def test_a_head_has_its_own_gradient_times_its_weight_if_asked():
  losses, active = losses_of(tanh_trunk), (1, 1, 0)
  joints = {
    scale: mtl_jax.feature_update(mtl_jax.mgda(), NAMES, head_scale=scale)
    for scale in ('none', 'weights')
  }

  @quick_compile.jit
  def all_of_them(params, batch):
    here = losses.on(batch)
    found = {
      scale: joint.update(here, params, joint.init(params))
      for scale, joint in joints.items()
    }
    own = {
      task: jax.grad(
        lambda p, t=task: heads_loss(p, tanh_trunk(p, batch), batch)[t]
      )(params)['heads'][task]
      for task in NAMES
    }
    return found, own

  found, own = all_of_them(PARAMS, batch_of(IMAGE, active))
  for scale, (update, state) in found.items():
    weights = mtl_jax.diagnostics(state)['task_weights']
    for i, task in enumerate(NAMES):
      factor = weights[i] if scale == 'weights' else 1.0
      expected = active[i] * factor * own[task]
      np.testing.assert_allclose(
        update.grads['heads'][task], expected, rtol=1e-5
      )


def test_a_gradient_that_is_not_finite_reaches_the_update_if_present():
  losses = losses_of(linear_trunk)
  joints = [
    mtl_jax.feature_update(getattr(mtl_jax, name)(), NAMES)
    for name in ('mgda', 'graddrop')
  ]
  params = {
    **PARAMS,
    'heads': {**PARAMS['heads'], 'colour': jnp.full(4, jnp.nan)},
  }

  @quick_compile.jit
  def run(batch):
    here = losses.on(batch)
    return [j.update(here, params, j.init(params))[0].grads for j in joints]

  for grads in run(batch_of(IMAGE)):
    assert not np.any(np.isfinite(grads['shared']))
  for grads in run(batch_of(IMAGE, (1, 0, 1))):
    assert np.all(np.isfinite(grads['shared']))
    np.testing.assert_array_equal(grads['heads']['colour'], 0)
  for leaf in jax.tree.leaves(run(batch_of(IMAGE, (0, 0, 0)))):
    np.testing.assert_array_equal(leaf, 0)


def test_zero_gradients_give_a_zero_update():
  heads = lambda params, z, batch: 0 * jnp.sum(z) * jnp.ones(3)
  joint = mtl_jax.feature_update(mtl_jax.mgda(), NAMES)
  found, _ = run(joint, losses_of(linear_trunk, heads), PARAMS, batch_of(IMAGE))
  for leaf in jax.tree.leaves(found.grads):
    np.testing.assert_array_equal(leaf, 0)


def test_bfloat16_features_have_a_float32_gram_matrix():
  losses = losses_of(
    lambda w, x: (w * x).astype(jnp.bfloat16),
    lambda w, z, x: {'a': jnp.sum(z), 'b': -jnp.sum(z)},
    ('a', 'b'),
  )
  joint = mtl_jax.feature_update(mtl_jax.linear(), ('a', 'b'))
  found, state = run(joint, losses, jnp.ones(()), jnp.ones(4096))
  # In bfloat16 a sum of ones stops at 256.
  expected = 4096 * np.array([[1.0, -1.0], [-1.0, 1.0]])
  np.testing.assert_array_equal(mtl_jax.diagnostics(state)['gram'], expected)
  assert found.grads.dtype == jnp.float32


def test_frozen_leaves_serve_both_functions_and_have_no_gradient():
  labels = {'in': 'shared', 'scale': 'frozen', 'a': 'a', 'b': 'b'}
  params = {'in': 2.0, 'scale': 3.0, 'a': 5.0, 'b': 7.0}
  params = jax.tree.map(jnp.asarray, params)
  losses = losses_of(
    lambda p, x: p['scale'] * p['in'] * x,
    lambda p, z, x: {t: p['scale'] * p[t] * z for t in ('a', 'b')},
    ('a', 'b'),
    param_labels=labels,
  )
  joint = mtl_jax.feature_update(
    mtl_jax.linear(), ('a', 'b'), param_labels=labels
  )
  found, _ = run(joint, losses, params, jnp.array(1.0))
  # The mean of 9 in a and 9 in b.
  expected = {'in': 54.0, 'scale': 0.0, 'a': 9.0, 'b': 9.0}
  assert jax.tree.map(float, found.grads) == expected


def test_aux_is_that_of_both_functions():
  features = lambda w, x: (w * x, mtl_jax.Aux(mean=jnp.sum(x)))
  heads = lambda w, z, x: ({'a': jnp.sum(z)}, mtl_jax.Aux(sum=2 * x))
  joint = mtl_jax.feature_update(mtl_jax.linear(), ('a',))
  objective = mtl_jax.Objective(lambda w, x: {'a': w @ x}, features, heads)
  losses = mtl_jax.task_losses(objective, ('a',))
  w, x = jnp.ones(2), jnp.array([1.0, 2.0])
  found, _ = run(joint, losses, w, x)
  assert found.aux.mean == 3
  np.testing.assert_array_equal(found.aux.sum, [2.0, 4.0])
  np.testing.assert_array_equal(found.grads, x)
  # Nobody could tell whose it is.
  twice = objective._replace(
    head_loss_fn=lambda w, z, x: ({'a': jnp.sum(z)}, mtl_jax.Aux(mean=x))
  )
  with pytest.raises(ValueError, match=r'both return Aux\.mean'):
    run(joint, mtl_jax.task_losses(twice, ('a',)), w, x)


def test_a_method_that_keeps_gradients_or_needs_more_of_them_is_refused():
  for method in REFUSED:
    with pytest.raises(ValueError, match=r'extra_grads|shape of the features'):
      mtl_jax.feature_update(aggregator_of(method.name), NAMES).init(PARAMS)


def test_second_step_and_a_smaller_batch_fit_the_same_state():
  traces = []

  def trunk(params, batch):
    traces.append(batch['image'].shape)
    return linear_trunk(params, batch)

  def heads(params, z, batch):
    return {t: jnp.mean((z @ params['heads'][t]) ** 2) for t in NAMES}

  joint = mtl_jax.feature_update(mtl_jax.gradvac(), NAMES)
  losses, state = losses_of(trunk, heads), joint.init(PARAMS)
  update = quick_compile.jit(
    lambda state, batch: joint.update(losses.on(batch), PARAMS, state)
  )
  before = methods.structure(state)
  _, state = update(state, batch_of(IMAGE))
  once = len(traces)
  _, state = update(state, batch_of(IMAGE))
  assert len(traces) == once
  _, state = update(state, batch_of(IMAGE[:3]))
  assert methods.structure(state) == before


def test_eight_devices_give_what_one_gives():
  def heads(params, z, batch):
    return {
      t: jnp.mean((z @ params['heads'][t] - batch['y'] * i) ** 2)
      for i, t in enumerate(NAMES)
    }

  trunk = lambda params, batch: jnp.tanh(batch['x'] @ params['shared'])
  losses = losses_of(trunk, heads)
  joints = [
    mtl_jax.feature_update(getattr(mtl_jax, name)(), NAMES)
    for name in ('mgda', 'graddrop')
  ]
  update = quick_compile.jit(
    lambda params, batch: [
      joint.update(losses.on(batch), params, joint.init(params))[0].grads
      for joint in joints
    ]
  )
  batch = {'x': draw(7, 32, INPUTS), 'y': draw(8, 32)}
  mesh = jax.make_mesh(
    (8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,)
  )
  place = lambda spec: functools.partial(
    jax.device_put, device=jax.sharding.NamedSharding(mesh, spec)
  )
  found = update(place(P())(PARAMS), place(P('data'))(batch))
  close(found, update(PARAMS, batch))


def _regularised(params, z, batch):
  losses = heads_loss(params, z, batch)
  return {**losses, 'depth': losses['depth'] + jnp.sum(params['shared'] ** 2)}


def _looks_at_a_constant(params, z, batch):
  size = jax.lax.stop_gradient(jnp.sum(params['shared'] ** 2))
  return jax.checkpoint(heads_loss)(params, z / size, batch)


def _mixed_trunk(params, batch):
  return linear_trunk(params, batch) * params['heads']['colour'][None, :]


@pytest.mark.parametrize(
  ('trunk', 'heads', 'message'),
  [
    (linear_trunk, _regularised, r"losses must .* \[\"\['shared'\]\"\]"),
    (
      _mixed_trunk,
      heads_loss,
      r"features_fn must not .* \[\"\['heads'\]\['colour'\]\"\]",
    ),
    (
      lambda params, batch: {'z': batch['image'].astype(int)},
      heads_loss,
      r"floating-point, got int.* at \['z'\]",
    ),
  ],
)
def test_a_gradient_that_would_be_lost_is_an_error(trunk, heads, message):
  joint = mtl_jax.feature_update(mtl_jax.mgda(), NAMES)
  losses = losses_of(trunk, heads)

  def update(params, batch):
    return joint.update(losses.on(batch), params, joint.init(params))

  with pytest.raises(ValueError, match=message):
    jax.eval_shape(update, PARAMS, batch_of(IMAGE))


def test_shared_parameters_without_a_gradient_in_the_losses_are_no_error():
  joint = mtl_jax.feature_update(mtl_jax.linear(), NAMES)
  losses, batch = losses_of(linear_trunk, _looks_at_a_constant), batch_of(IMAGE)
  found, _ = run(joint, losses, PARAMS, batch)

  def mean(params):
    z = linear_trunk(params, batch)
    return sum(_looks_at_a_constant(params, z, batch).values()) / 3

  close(found.grads, quick_compile.jit(jax.grad(mean))(PARAMS))


def test_arguments_that_do_not_fit_are_named():
  make = functools.partial(mtl_jax.feature_update, task_names=NAMES)
  with pytest.raises(ValueError, match='must have no axes'):
    make(mtl_jax.mgda(axis_name='i'))
  with pytest.raises(ValueError, match=r"head_scale must be .*got 'half'"):
    make(mtl_jax.mgda(), head_scale='half')
  with pytest.raises(ValueError, match="'weights' needs an aggregator"):
    make(mtl_jax.graddrop(), head_scale='weights').init(PARAMS)


@pytest.mark.parametrize('tasks', [1, 8])
def test_the_trunk_is_pulled_back_once_whatever_the_number_of_tasks(tasks):
  rows, inputs, hidden, outputs = 16, 32, 128, 8
  names = tuple(f'task_{i}' for i in range(tasks))
  shape = lambda *numbers: jax.ShapeDtypeStruct(numbers, jnp.float32)
  params = {
    'shared': (shape(inputs, hidden), shape(hidden, hidden)),
    'heads': {task: shape(hidden, outputs) for task in names},
  }

  def trunk(params, image):
    first, second = params['shared']
    return jnp.tanh(jnp.tanh(image @ first) @ second)

  def heads(params, z, image):
    return {t: jnp.mean((z @ params['heads'][t]) ** 2) for t in names}

  joint = mtl_jax.feature_update(mtl_jax.linear(), names)
  losses = losses_of(trunk, heads, names)

  def update(params, state, image):
    found, state = joint.update(losses.on(image), params, state)
    return found.grads, state

  state = jax.eval_shape(joint.init, params)
  lowered = jax.jit(update).lower(params, state, shape(rows, inputs))
  first, second = 2 * rows * inputs * hidden, 2 * rows * hidden * hidden
  head, gram = 3 * 2 * rows * hidden * outputs, 2 * tasks**2 * rows * hidden
  # Matrix products alone.
  expected = 2 * first + 3 * second + tasks * head + gram
  compiled = lowered.compile(quick_compile.DEFAULTS)
  # Elementwise work; one pull-back of the trunk more would be 40 per cent.
  assert compiled.cost_analysis()['flops'] == pytest.approx(expected, rel=0.12)
