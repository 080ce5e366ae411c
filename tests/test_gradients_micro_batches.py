"""Gradient accumulation gives the gradients of the whole batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtl_jax

NAMES = ('shape', 'colour', 'depth')
BATCH = 12
ENGINES = ('unroll', 'vmap', 'scan')


def make(seed=0):
  rng = np.random.default_rng(seed)
  draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
  params = {
    'shared': {'kernel': draw(4, 5), 'unused': draw(2)},
    'heads': {task: draw(5) for task in NAMES},
  }
  batch = {
    'image': draw(BATCH, 4),
    'labels': {task: draw(BATCH) for task in NAMES},
  }
  return params, batch


PARAMS, UNMASKED = make()

# Uneven over any cut into slices: 'shape' has all its labels in rows 0 and 4,
# 'colour' all but one, and 'depth' none at all.
MASK = {
  'shape': jnp.zeros(BATCH).at[jnp.array([0, 4])].set(1),
  'colour': jnp.ones(BATCH).at[7].set(0),
  'depth': jnp.zeros(BATCH),
}
MASKED = {**UNMASKED, 'mask': MASK}


def loss_fn(params, batch, scale=1.0):
  """Masked means over the batch, or plain ones without masks."""
  hidden = jnp.tanh(batch['image'] @ params['shared']['kernel'])
  losses = {}
  for task in NAMES:
    errors = (hidden @ params['heads'][task] - batch['labels'][task]) ** 2
    mask = batch.get('mask', {}).get(task, jnp.ones_like(errors))
    losses[task] = (
      scale * jnp.sum(errors * mask) / jnp.maximum(jnp.sum(mask), 1)
    )
  return losses


def own_parameters(params):
  rows = lambda x: jnp.stack([x, 0.5 * x, -2 * x])
  return {**params, 'shared': jax.tree.map(rows, params['shared'])}


def assert_trees_close(actual, expected):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
    actual,
    expected,
  )


@pytest.mark.parametrize('engine', ENGINES)
@pytest.mark.parametrize('batch', [MASKED, UNMASKED], ids=['masks', 'no masks'])
def test_slices_add_up_to_the_gradients_of_the_whole_batch(batch, engine):
  pair = mtl_jax.task_grad(loss_fn, NAMES, engine=engine, micro_batches=4)
  whole = mtl_jax.task_grad(loss_fn, NAMES)
  own = own_parameters(PARAMS)
  assert_trees_close(
    jax.jit(pair.at)(PARAMS, batch, 3.0), whole.at(PARAMS, batch, 3.0)
  )
  assert_trees_close(
    jax.jit(pair.at_each)(own, batch, 3.0), whole.at_each(own, batch, 3.0)
  )


def test_a_task_without_labels_has_zero_loss_and_gradient():
  pair = mtl_jax.task_grad(loss_fn, NAMES, micro_batches=3)
  (losses, _), grads = pair.at(PARAMS, MASKED)
  task = NAMES.index('depth')
  assert losses[task] == 0
  assert np.all(grads['shared']['kernel'][task] == 0)
  assert np.all(grads['heads']['depth'] == 0)


def test_masks_of_some_tasks_alone_are_counted():
  pair = mtl_jax.task_grad(loss_fn, NAMES, micro_batches=6)
  batch = {**UNMASKED, 'mask': {'shape': MASK['shape']}}
  whole = mtl_jax.task_grad(loss_fn, NAMES)
  assert_trees_close(pair.at(PARAMS, batch), whole.at(PARAMS, batch))


def test_masks_of_pixels_are_counted():
  rng = np.random.default_rng(3)
  mask = jnp.asarray(rng.random((BATCH, 3, 2)) < 0.3, jnp.float32)
  batch = {
    'image': jnp.asarray(rng.standard_normal((BATCH, 3, 2)), jnp.float32),
    'mask': {'a': mask},
  }

  def pixel_loss(params, batch):
    errors = (params['shared'] * batch['image'] - 1) ** 2
    mask = batch['mask']['a']
    return {'a': jnp.sum(errors * mask) / jnp.maximum(jnp.sum(mask), 1)}

  params = {'shared': jnp.array(2.0), 'heads': {}}
  pair = mtl_jax.task_grad(pixel_loss, ('a',), micro_batches=4)
  whole = mtl_jax.task_grad(pixel_loss, ('a',))
  assert_trees_close(pair.at(params, batch), whole.at(params, batch))


def test_integer_and_boolean_masks_are_counted():
  pair = mtl_jax.task_grad(loss_fn, NAMES, micro_batches=4)
  for dtype in (bool, 'int32', 'uint8'):
    mask = jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), MASK)
    assert_trees_close(
      pair.at(PARAMS, {**MASKED, 'mask': mask}), pair.at(PARAMS, MASKED)
    )


@pytest.mark.parametrize('engine', ENGINES)
def test_aux_of_every_slice_comes_back_in_order(engine):
  def with_aux(params, batch, scale=1.0):
    return loss_fn(params, batch, scale), {'rows': batch['row']}

  pair = mtl_jax.task_grad(
    with_aux, NAMES, engine=engine, micro_batches=3, has_aux=True
  )
  batch = {**MASKED, 'row': jnp.arange(BATCH)}
  (_, aux), _ = pair.at(PARAMS, batch)
  # Row r goes to slice r mod 3.
  np.testing.assert_array_equal(
    aux['rows'], [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]
  )
  losses, _ = pair.at_each(own_parameters(PARAMS), batch)
  assert losses.shape == (3,)


def test_other_arguments_reach_each_slice_as_they_are():
  key = jax.random.key(0)

  def noisy(params, batch, key):
    noise = jax.random.normal(key, (4,))
    return {'a': jnp.sum(params['shared'] * noise) + 0 * jnp.sum(batch)}

  params = {'shared': jnp.ones(4), 'heads': {}}
  pair = mtl_jax.task_grad(noisy, ('a',), micro_batches=5)
  _, grads = pair.at(params, jnp.ones(10), key)
  np.testing.assert_allclose(
    grads['shared'][0], jax.random.normal(key, (4,)), rtol=1e-6
  )


def test_micro_batches_inside_flat_minima_are_the_whole_batch():
  whole = mtl_jax.task_grad(loss_fn, NAMES)
  sliced = mtl_jax.task_grad(loss_fn, NAMES, micro_batches=4)
  active = jnp.array([True, True, False])
  tx = mtl_jax.flat_minima(mtl_jax.pcgrad(), NAMES, rho=0.5)
  results = []
  for pair in (whole, sliced):
    (_, _), grads = pair.at(PARAMS, MASKED)
    grad_fn = lambda p, pair=pair: pair.at_each(p, MASKED)[1]
    updates, _ = tx.update(
      grads, tx.init(PARAMS), PARAMS, grad_fn=grad_fn, active=active
    )
    results.append(updates)
  assert_trees_close(*results)


@pytest.mark.parametrize('slices', [5, 24])
@pytest.mark.parametrize('each', [False, True], ids=['at', 'at_each'])
def test_a_batch_that_slices_do_not_divide_is_refused(slices, each):
  pair = mtl_jax.task_grad(loss_fn, NAMES, micro_batches=slices)
  with pytest.raises(ValueError, match=rf'micro_batches={slices} must divide'):
    if each:
      pair.at_each(own_parameters(PARAMS), MASKED)
    else:
      pair.at(PARAMS, MASKED)


def test_a_leaf_of_the_batch_without_a_batch_axis_is_refused():
  pair = mtl_jax.task_grad(loss_fn, NAMES, micro_batches=2)
  with pytest.raises(ValueError, match=r'must divide .* got shape \(\)'):
    pair.at(PARAMS, {**MASKED, 'step': jnp.array(3)})


def test_frozen_leaves_have_a_zero_gradient():
  labels = {
    'shared': {'kernel': 'shared', 'unused': 'frozen'},
    'heads': {task: task for task in NAMES},
  }
  pair = mtl_jax.task_grad(loss_fn, NAMES, micro_batches=3, param_labels=labels)
  _, grads = pair.at(PARAMS, MASKED)
  np.testing.assert_array_equal(grads['shared']['unused'], np.zeros(2))


@pytest.mark.parametrize('engine', ENGINES)
def test_gradients_keep_the_dtype_of_the_parameters(engine):
  cast = lambda tree: jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)
  pair = mtl_jax.task_grad(loss_fn, NAMES, engine=engine, micro_batches=3)
  (losses, _), grads = pair.at(cast(PARAMS), cast(MASKED))
  for leaf in jax.tree.leaves(grads):
    assert leaf.dtype == jnp.bfloat16
  whole, _ = mtl_jax.task_grad(loss_fn, NAMES).at(PARAMS, MASKED)
  np.testing.assert_allclose(losses, whole[0], rtol=0.05)
