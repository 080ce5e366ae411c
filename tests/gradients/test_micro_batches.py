"""Gradient accumulation gives the gradients of the whole batch."""

import functools
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick_compile

import mtl_jax

NAMES = ('shape', 'colour', 'depth')
BATCH = 12
ENGINES = ('unroll', 'vmap', 'scan')


def make(seed=0):
  rng = np.random.default_rng(seed)
  draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
  params = {
    'shared': {'kernel': draw(4, 5), 'unused': draw(2)},
    'heads': {task: draw(5) for task in NAMES},
  }
  batch = {
    'image': draw(BATCH, 4),
    'labels': {task: draw(BATCH) for task in NAMES},
    'row': np.arange(BATCH),
  }
  return params, batch


PARAMS, UNMASKED = make()
OWN = {
  **PARAMS,
  'shared': jax.tree.map(
    lambda x: np.stack([x, 0.5 * x, -2 * x]), PARAMS['shared']
  ),
}

# Uneven over any cut into slices: 'shape' has all its labels in rows 0 and 4,
# 'colour' all but one, and 'depth' none at all.
MASK = {
  'shape': np.isin(np.arange(BATCH), (0, 4)).astype(np.float32),
  'colour': (np.arange(BATCH) != 7).astype(np.float32),
  'depth': np.zeros(BATCH, np.float32),
}


class Batch(NamedTuple):
  """A batch that is no dictionary."""

  image: Any
  labels: Any
  row: Any
  mask: Any


BATCHES = {
  'masks': {**UNMASKED, 'mask': MASK},
  'no masks': UNMASKED,
  'a mask of None': {**UNMASKED, 'mask': None},
  'one mask for padding': {**UNMASKED, 'mask': np.ones((BATCH, 3))},
  'masks of some tasks': {**UNMASKED, 'mask': {'shape': MASK['shape']}},
  'a NamedTuple': Batch(**UNMASKED, mask=MASK),
  'integer masks': {
    **UNMASKED,
    'mask': {task: mask.astype(np.uint8) for task, mask in MASK.items()},
  },
  'boolean masks': {
    **UNMASKED,
    'mask': {task: mask.astype(bool) for task, mask in MASK.items()},
  },
}


def loss_fn(params, batch, scale=1.0):
  """Masked means over the batch, or plain ones without masks."""
  if isinstance(batch, Batch):
    batch = batch._asdict()
  masks = batch.get('mask')
  masks = masks if isinstance(masks, dict) else {}
  hidden = jnp.tanh(batch['image'] @ params['shared']['kernel'])
  losses = {}
  for task in NAMES:
    errors = (hidden @ params['heads'][task] - batch['labels'][task]) ** 2
    mask = masks.get(task, jnp.ones_like(errors))
    losses[task] = (
      scale * jnp.sum(errors * mask) / jnp.maximum(jnp.sum(mask), 1)
    )
  return losses


def aux_loss_fn(params, batch, scale=1.0):
  rows = batch.row if isinstance(batch, Batch) else batch['row']
  return loss_fn(params, batch, scale), {'rows': rows}


FROZEN = {
  'shared': {'kernel': 'shared', 'unused': 'frozen'},
  'heads': {task: task for task in NAMES},
}


@functools.cache
def answers():
  """Of the whole batch and of slices, `{batch: ...}`, in one program."""

  def run(params, own, batches):
    found = {}
    for name, batch in batches.items():
      whole = mtl_jax.task_grad(aux_loss_fn, NAMES, has_aux=True)
      at, at_each = {'whole': whole.at(params, batch, 3.0)}, {}
      at_each['whole'] = whole.at_each(own, batch, 3.0)
      # The slices know nothing of the engine.
      for engine in ENGINES if name == 'masks' else ('unroll',):
        sliced = mtl_jax.task_grad(
          aux_loss_fn, NAMES, engine=engine, micro_batches=3, has_aux=True
        )
        at[engine] = sliced.at(params, batch, 3.0)
        at_each[engine] = sliced.at_each(own, batch, 3.0)
      found[name] = at, at_each
    frozen = mtl_jax.task_grad(
      loss_fn, NAMES, micro_batches=3, param_labels=FROZEN
    )
    found['frozen'] = frozen.at(params, batches['masks'])
    return found

  return quick_compile.jit(run)(PARAMS, OWN, BATCHES)


def assert_trees_close(actual, expected):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
    actual,
    expected,
  )


@pytest.mark.parametrize('name', BATCHES)
def test_slices_add_up_to_the_gradients_of_the_whole_batch(name):
  at, at_each = answers()[name]
  (losses, _), grads = at.pop('whole')
  whole_each = at_each.pop('whole')
  for (values, _), of_values in at.values():
    assert_trees_close((values, of_values), (losses, grads))
  for found in at_each.values():
    assert_trees_close(found, whole_each)
  # Masks were read at all: with them some labels are missing.
  masked = name not in ('no masks', 'a mask of None', 'one mask for padding')
  none = losses[NAMES.index('depth')] == 0
  assert none == (masked and name != 'masks of some tasks')


def test_a_task_without_labels_has_zero_loss_and_gradient():
  for (losses, _), grads in answers()['masks'][0].values():
    task = NAMES.index('depth')
    assert losses[task] == 0
    assert np.all(grads['shared']['kernel'][task] == 0)
    assert np.all(grads['heads']['depth'] == 0)


def test_aux_of_every_slice_comes_back_in_order():
  for engine in ENGINES:
    (_, aux), _ = answers()['masks'][0][engine]
    # Row r goes to slice r mod 3.
    np.testing.assert_array_equal(
      aux['rows'], [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]
    )


def test_frozen_leaves_have_a_zero_gradient():
  _, grads = answers()['frozen']
  np.testing.assert_array_equal(grads['shared']['unused'], np.zeros(2))


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

  @quick_compile.jit
  def run(batch):
    params = {'shared': jnp.array(2.0), 'heads': {}}
    return [
      mtl_jax.task_grad(pixel_loss, ('a',), micro_batches=n).at(params, batch)
      for n in (1, 4)
    ]

  assert_trees_close(*run(batch))


def test_other_arguments_reach_each_slice_as_they_are():
  def noisy(params, batch, key):
    noise = jax.random.normal(key, (4,))
    return {'a': jnp.sum(params['shared'] * noise) + 0 * jnp.sum(batch)}

  @quick_compile.jit
  def run(key):
    params = {'shared': jnp.ones(4), 'heads': {}}
    pair = mtl_jax.task_grad(noisy, ('a',), micro_batches=5)
    _, grads = pair.at(params, jnp.ones(10), key)
    return grads['shared'][0], jax.random.normal(key, (4,))

  found, expected = run(jax.random.key(0))
  np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_micro_batches_inside_flat_minima_are_the_whole_batch():
  tx = mtl_jax.flat_minima(mtl_jax.pcgrad(), NAMES, rho=0.5)

  @quick_compile.jit
  def run(params, batch):
    results = []
    for number in (1, 4):
      pair = mtl_jax.task_grad(loss_fn, NAMES, micro_batches=number)
      (_, _), grads = pair.at(params, batch)
      updates, _ = tx.update(
        grads,
        tx.init(params),
        params,
        grad_fn=lambda own, pair=pair: pair.at_each(own, batch)[1],
        active=jnp.array([True, True, False]),
      )
      results.append(updates)
    return results

  assert_trees_close(*run(PARAMS, BATCHES['masks']))


def test_gradients_in_half_precision_are_added_up_in_single():
  names, slices = ('a', 'b'), 256
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.standard_normal((512, 16)), jnp.float32)
  w = jnp.asarray(0.3 * rng.standard_normal((16, 8)), jnp.bfloat16)

  def losses_of(w, x):
    y = jnp.tanh(x.astype(w.dtype) @ w).astype(jnp.float32)
    return {t: jnp.mean((y - i - 1) ** 2) for i, t in enumerate(names)}

  @quick_compile.jit
  def run(w, x):
    at = mtl_jax.task_grad(losses_of, names).at
    pieces = jax.lax.map(
      lambda piece: at(w, piece)[1],
      jnp.swapaxes(x.reshape(-1, slices, x.shape[1]), 0, 1),
    )
    sliced = mtl_jax.task_grad(losses_of, names, micro_batches=slices)
    weigh = lambda losses: (jnp.array([1.0, 0.0]), None)
    weighted = mtl_jax.weighted_grad(losses_of, names, micro_batches=slices)
    return {
      'in float32': at(w.astype(jnp.float32), x)[1],
      'in slices': sliced.at(w, x)[1],
      'each in its own': sliced.at_each(jnp.stack([w, w]), x)[1],
      'weighted': weighted.at(weigh, w, x)[1],
      # The mean of the slices' bfloat16 gradients, taken in float32.
      'possible': jnp.mean(pieces.astype(jnp.float32), axis=0),
    }

  found = run(w, x)
  right = found.pop('in float32')
  possible = found.pop('possible')
  for name, grads in found.items():
    assert grads.dtype == jnp.bfloat16, name
    exact, best = right, possible
    if name == 'weighted':
      exact, best = right[0], possible[0]
    far = lambda g, exact=exact: float(
      jnp.linalg.norm(g.astype(jnp.float32) - exact)
    )
    assert far(grads) < 2 * far(best), name


def test_a_batch_that_cannot_be_cut_is_refused():
  masked = BATCHES['masks']
  for slices in (5, 24):
    pair = mtl_jax.task_grad(loss_fn, NAMES, micro_batches=slices)
    for fn, params in ((pair.at, PARAMS), (pair.at_each, OWN)):
      with pytest.raises(
        ValueError, match=rf'micro_batches={slices} must divide'
      ):
        jax.eval_shape(fn, params, masked)
  pair = mtl_jax.task_grad(loss_fn, NAMES, micro_batches=2)
  with pytest.raises(ValueError, match=r'must divide .* got shape \(\)'):
    jax.eval_shape(pair.at, PARAMS, {**masked, 'step': jnp.array(3)})
