"""A task without labels, whose loss may be NaN, is as if it were not there."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick_compile

import mtl_jax

NAMES = ('depth', 'normals', 'plain')
ROWS = 8


def make():
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
  params = {
    'shared': 0.3 * draw(3, 4),
    'heads': {task: draw(4) for task in NAMES},
  }
  mask = {task: np.ones(ROWS, np.float32) for task in NAMES}
  # Of 'depth' there is no label, and of 'normals' none in every second row.
  mask['depth'] = np.zeros(ROWS, np.float32)
  mask['normals'][::2] = 0
  return params, {'x': draw(ROWS, 3), 'mask': mask}


def loss_fn(params, batch):
  """Plain means over the labels: 0 / 0 where there is none."""
  features = jnp.tanh(batch['x'] @ params['shared'])
  found = {}
  for task in NAMES:
    if task in params['heads']:
      errors = (features @ params['heads'][task] - 1) ** 2
      mask = batch['mask'][task]
      found[task] = jnp.sum(errors * mask) / jnp.sum(mask)
  return found


def as_array(params, batch):
  losses = loss_fn(params, batch)
  return jnp.stack([losses[task] for task in NAMES if task in losses])


FORMS = {
  'dictionary': loss_fn,
  'array': as_array,
  'compiled': jax.jit(loss_fn),
}


def answers(fn, names, params, batch):
  """The gradient of everything that takes one of a weighted loss."""
  active = jnp.array([task != 'depth' for task in names])
  losses = mtl_jax.task_losses(fn, names)
  weighting = mtl_jax.si()
  weigh = lambda values: weighting.update(
    values, weighting.init(len(names)), active=active
  )

  def joint(made, losses=losses):
    return made.update(losses.on(batch), params, made.init(params))[0].grads

  def total(params):
    return jnp.sum(jnp.where(active, losses.on(batch).values(params), 0))

  sliced = mtl_jax.task_losses(fn, names, micro_batches=2)
  return {
    'weighted_update': joint(mtl_jax.weighted_update(weighting, names)),
    'weighted_update, slices': joint(
      mtl_jax.weighted_update(weighting, names), sliced
    ),
    'bilevel_update': joint(
      # It takes the gradient of the losses themselves.
      mtl_jax.bilevel_update(mtl_jax.auto_lambda(), names, lookahead=0.1)
    ),
    'weighted_grad': mtl_jax.weighted_grad(fn, names).at(weigh, params, batch)[
      1
    ],
    'weighted_grad, slices': mtl_jax.weighted_grad(
      fn, names, micro_batches=2
    ).at(weigh, params, batch)[1],
    'values': jax.grad(total)(params),
  }


def without_depth(tree):
  heads = {task: x for task, x in tree['heads'].items() if task != 'depth'}
  return {**tree, 'heads': heads}


@functools.cache
def found():
  def run(params, batch):
    with_it = {
      form: answers(fn, NAMES, params, batch) for form, fn in FORMS.items()
    }
    alone = without_depth(params)
    return with_it, answers(loss_fn, NAMES[1:], alone, batch)

  return quick_compile.jit(run)(*make())


@pytest.mark.parametrize('form', FORMS)
def test_gradient_of_a_weighted_loss_is_that_without_an_absent_task(form):
  with_it, right = found()
  for asker, grads in with_it[form].items():
    np.testing.assert_array_equal(grads['heads']['depth'], 0, asker)
    jax.tree.map(
      lambda a, b, asker=asker: np.testing.assert_allclose(
        a, b, rtol=1e-5, atol=1e-7, err_msg=asker
      ),
      without_depth(grads),
      right[asker],
    )
    assert np.all(np.isfinite(grads['shared'])), asker
    assert np.any(grads['shared'] != 0), asker
