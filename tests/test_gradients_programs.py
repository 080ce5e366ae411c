"""Task gradients through control flow, custom gradients and randomness."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtl_jax

ENGINES = ('unroll', 'vmap', 'scan')
NAMES = ('b', 'a')

engines = pytest.mark.parametrize('engine', ENGINES)


def assert_per_task_gradients(loss_fn, params, engine, *args):
  """Compares both functions with `jax.grad`, all under `jit`."""

  @jax.jit
  def run(params, *args):
    at, at_each = mtl_jax.task_grad(loss_fn, NAMES, engine=engine)
    shared = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x]), params['shared'])
    return at(params, *args)[1], at_each({**params, 'shared': shared}, *args)[1]

  def right(task, scale):
    scaled = jax.tree.map(lambda x: scale * x, params['shared'])
    return jax.grad(lambda p: loss_fn(p, *args)[task])(
      {**params, 'shared': scaled}
    )

  for grads, scales in zip(run(params, *args), [(1, 1), (1, 0.5)], strict=True):
    for i, (task, scale) in enumerate(zip(NAMES, scales, strict=True)):
      own = right(task, scale)
      jax.tree.map(
        lambda g, r, i=i: np.testing.assert_allclose(g[i], r, rtol=1e-5),
        grads['shared'],
        own['shared'],
      )
      np.testing.assert_allclose(
        grads['heads'][task], own['heads'][task], rtol=1e-5
      )


@engines
def test_layers_in_a_scan_are_differentiated(engine):
  rng = np.random.default_rng(0)
  params = {
    'shared': jnp.asarray(rng.standard_normal((6, 3, 3)), jnp.float32),
    'heads': {'a': jnp.arange(1.0, 4.0), 'b': jnp.array([0.5, -1.0, 2.0])},
  }

  def loss_fn(params, x):
    layer = lambda x, kernel: (jnp.tanh(kernel @ x), None)
    x, _ = jax.lax.scan(layer, x, params['shared'])
    return {task: head @ x for task, head in params['heads'].items()}

  assert_per_task_gradients(loss_fn, params, engine, jnp.ones(3))


@jax.custom_vjp
def reversed_gradient(x):
  return x


reversed_gradient.defvjp(lambda x: (x, None), lambda _, g: (-3.0 * g,))


@engines
def test_a_custom_gradient_is_used(engine):
  params = {
    'shared': jnp.array([1.0, 2.0]),
    'heads': {'a': jnp.array([3.0, 4.0]), 'b': jnp.array([5.0, 6.0])},
  }

  def loss_fn(params):
    hidden = reversed_gradient(params['shared'])
    return {task: head @ hidden for task, head in params['heads'].items()}

  assert_per_task_gradients(loss_fn, params, engine)
  _, grads = mtl_jax.task_grad(loss_fn, NAMES, engine=engine).at(params)
  np.testing.assert_allclose(grads['shared'], [[-15.0, -18.0], [-9.0, -12.0]])


@engines
def test_a_custom_gradient_inside_a_head_is_used(engine):
  params = {
    'shared': jnp.array([1.0, 2.0]),
    'heads': {'a': jnp.array([3.0, 4.0]), 'b': jnp.array([5.0, 6.0])},
  }

  def loss_fn(params):
    return {
      task: reversed_gradient(head) @ params['shared']
      for task, head in params['heads'].items()
    }

  assert_per_task_gradients(loss_fn, params, engine)
  _, grads = mtl_jax.task_grad(loss_fn, NAMES, engine=engine).at(params)
  np.testing.assert_allclose(grads['heads']['a'], [-3.0, -6.0])


@engines
def test_branches_and_checkpoints_are_differentiated(engine):
  params = {
    'shared': jnp.array([1.0, -2.0]),
    'heads': {'a': jnp.array([3.0, 4.0]), 'b': jnp.array([5.0, 6.0])},
  }

  def loss_fn(params, flag):
    hidden = jax.checkpoint(jnp.sin)(params['shared'])
    hidden = jax.lax.cond(flag, jnp.exp, jnp.cos, hidden)
    return {task: head @ hidden for task, head in params['heads'].items()}

  for flag in (True, False):
    assert_per_task_gradients(loss_fn, params, engine, jnp.array(flag))


@engines
def test_dropout_draws_one_mask_for_all_tasks_and_both_passes(engine):
  """Losses are linear, so that a gradient is the mask it was drawn with."""
  width = 64

  def loss_fn(params, key):
    mask = jax.random.bernoulli(key, 0.5, (width,)).astype(jnp.float32)
    total = jnp.sum(mask * params['shared'])
    return {'a': 2 * total, 'b': 3 * total}

  at, at_each = mtl_jax.task_grad(loss_fn, NAMES, engine=engine)
  at, at_each = jax.jit(at), jax.jit(at_each)
  params = {'shared': jnp.ones(width), 'heads': {}}
  own = {'shared': jnp.stack([params['shared'], 5 * params['shared']])}
  masks = []
  for seed in (0, 1):
    key = jax.random.key(seed)
    _, first = at(params, key)
    _, second = at_each({**own, 'heads': {}}, key)
    for grads in (first['shared'], second['shared']):
      masks.extend([grads[0] / 3, grads[1] / 2])
    for mask in masks[-4:]:
      np.testing.assert_allclose(mask, masks[-1], rtol=1e-6)
  assert 16 < np.sum(masks[0]) < 48
  # Another key is another mask.
  assert np.any(masks[0] != masks[-1])


@engines
def test_gradients_keep_the_dtype_of_the_parameters(engine):
  params = {
    'shared': jnp.ones(2, jnp.bfloat16),
    'heads': {'a': jnp.ones(2, jnp.bfloat16), 'b': jnp.ones(2, jnp.float32)},
  }

  def loss_fn(params):
    hidden = params['shared'].astype(jnp.float32)
    return {
      task: jnp.sum(hidden * head.astype(jnp.float32))
      for task, head in params['heads'].items()
    }

  at, at_each = mtl_jax.task_grad(loss_fn, NAMES, engine=engine)
  (first, _), of_first = at(params)
  own = {**params, 'shared': jnp.stack([params['shared']] * 2)}
  for losses, grads in ((first, of_first), at_each(own)):
    assert losses.dtype == jnp.float32
    assert grads['shared'].dtype == jnp.bfloat16
    assert grads['heads']['a'].dtype == jnp.bfloat16
    assert grads['heads']['b'].dtype == jnp.float32


@engines
def test_losses_of_unlike_dtypes_are_promoted(engine):
  def loss_fn(params):
    return {
      'a': jnp.sum(params['shared']),
      'b': jnp.sum(2 * params['shared']).astype(jnp.bfloat16),
    }

  at, at_each = mtl_jax.task_grad(loss_fn, NAMES, engine=engine)
  (losses, _), grads = at({'shared': jnp.ones(2), 'heads': {}})
  np.testing.assert_allclose(losses, [4.0, 2.0])
  np.testing.assert_allclose(grads['shared'], [[2.0, 2.0], [1.0, 1.0]])
  losses, grads = at_each({'shared': jnp.ones((2, 2)), 'heads': {}})
  np.testing.assert_allclose(losses, [4.0, 2.0])
  np.testing.assert_allclose(grads['shared'], [[2.0, 2.0], [1.0, 1.0]])


PARAMS = {'shared': jnp.ones(2), 'heads': {'a': jnp.ones(2), 'b': jnp.ones(2)}}
OWN = {**PARAMS, 'shared': jnp.ones((2, 2))}
BOTH = pytest.mark.parametrize('each', [False, True], ids=['at', 'at_each'])


def call(loss_fn, each, engine='unroll'):
  at, at_each = mtl_jax.task_grad(loss_fn, NAMES, engine=engine)
  return at_each(OWN) if each else at(PARAMS)


@BOTH
@engines
def test_a_task_without_a_loss_is_refused(engine, each):
  with pytest.raises(ValueError, match=r"a loss for each of .*, got \('a',\)"):
    call(lambda params: {'a': jnp.sum(params['shared'])}, each, engine)


@BOTH
def test_a_loss_of_no_task_is_refused(each):
  fn = lambda params: dict.fromkeys('abc', jnp.sum(params['shared']))
  with pytest.raises(ValueError, match=r"got \('a', 'b', 'c'\)"):
    call(fn, each)


@BOTH
@engines
def test_a_loss_that_is_no_scalar_is_refused(engine, each):
  fn = lambda params: {'a': params['shared'], 'b': jnp.sum(params['shared'])}
  with pytest.raises(ValueError, match=r"task 'a' must be a scalar.*\(2,\)"):
    call(fn, each, engine)


@BOTH
@pytest.mark.parametrize('shape', [(), (1,), (3,), (2, 1)])
def test_an_array_of_another_length_is_refused(shape, each):
  fn = lambda params: jnp.broadcast_to(jnp.sum(params['shared']), shape)
  with pytest.raises(ValueError, match=r'losses of shape \(2,\)'):
    call(fn, each)


def test_wrong_arguments_are_named_with_their_value():
  loss_fn = lambda params: {}
  with pytest.raises(ValueError, match=r"engine must be one of .* got 'map'"):
    mtl_jax.task_grad(loss_fn, NAMES, engine='map')
  with pytest.raises(ValueError, match=r'micro_batches must be .* got 0'):
    mtl_jax.task_grad(loss_fn, NAMES, micro_batches=0)
  with pytest.raises(ValueError, match='task_names must be distinct'):
    mtl_jax.task_grad(loss_fn, ('a', 'a'))
  with pytest.raises(TypeError, match="got the string 'ab'"):
    mtl_jax.task_grad(loss_fn, 'ab')
