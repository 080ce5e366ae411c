"""A gradient that would be lost in silence is an error that names its leaf."""

import jax
import jax.numpy as jnp
import pytest

import mtl_jax

NAMES = ('a', 'b')
SHAPES = {
  'shared': jax.ShapeDtypeStruct((3, 4), jnp.float32),
  'heads': {
    'a': jax.ShapeDtypeStruct((4, 1), jnp.float32),
    'b': {'w': jax.ShapeDtypeStruct((5, 1), jnp.float32)},
  },
}
X = jax.ShapeDtypeStruct((16, 3), jnp.float32)


def cascade(between):
  """Losses of which b's reads what head a predicts, handed on by `between`."""

  def dense_loss_fn(params, dense, x):
    features = jnp.tanh(dense(x, params['shared']))
    a = features @ params['heads']['a']
    both = jnp.concatenate([features, between(a)], axis=1)
    b = both @ params['heads']['b']['w']
    return {'a': jnp.mean((a - 1) ** 2), 'b': jnp.mean((b - 2) ** 2)}

  return mtl_jax.Objective(
    loss_fn=lambda params, x: dense_loss_fn(params, jnp.matmul, x),
    dense_loss_fn=dense_loss_fn,
  )


def askers(objective):
  """Everything that gives heads their own gradients, traced, by name."""

  def stacked(tree):
    return {**tree, 'shared': jnp.stack([tree['shared']] * 2)}

  found = {}
  for engine in ('unroll', 'vmap', 'scan'):
    pair = mtl_jax.task_grad(objective.loss_fn, NAMES, engine=engine)
    found[f'at, {engine}'] = pair.at
    found[f'at_each, {engine}'] = lambda params, x, pair=pair: pair.at_each(
      stacked(params), x
    )
  losses = mtl_jax.task_losses(objective, NAMES)
  for make in (mtl_jax.gram_update, mtl_jax.ghost_update):
    joint = make(mtl_jax.linear(), NAMES)
    found[make.__name__] = lambda params, x, joint=joint: joint.update(
      losses.on(x), params, joint.init(params)
    )
  return found


ASKERS = tuple(askers(cascade(lambda a: a)))


@pytest.mark.parametrize('name', ASKERS)
def test_a_loss_that_has_a_derivative_in_another_head_is_refused(name):
  with pytest.raises(
    ValueError, match=r"task 'b' must not .* \[\"\['heads'\]\['a'\]\"\]"
  ):
    jax.eval_shape(askers(cascade(lambda a: a))[name], SHAPES, X)
  # What is read and not differentiated loses nothing.
  detached = cascade(jax.lax.stop_gradient)
  jax.eval_shape(askers(detached)[name], SHAPES, X)
