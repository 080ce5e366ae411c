"""Task gradients through control flow, custom gradients and randomness."""

import cProfile
import pstats

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick_compile

import mtl_jax

ENGINES = ('unroll', 'vmap', 'scan')
NAMES = ('b', 'a')


def assert_per_task_gradients(loss_fn, params, *args):
  """Compares both functions of every engine with `jax.grad`, in one program.

  Returns:
    The gradients of `at`, of the last engine.
  """

  @quick_compile.jit
  def run(params, *args):
    half = jax.tree.map(lambda x: 0.5 * x, params['shared'])
    own = jax.tree.map(lambda *x: jnp.stack(x), params['shared'], half)
    answers = []
    for engine in ENGINES:
      at, at_each = mtl_jax.task_grad(loss_fn, NAMES, engine=engine)
      own_params = {**params, 'shared': own}
      answers += [(at(params, *args)[1], 1), (at_each(own_params, *args)[1], 2)]

    def right(task, shared):
      return jax.grad(lambda p: loss_fn(p, *args)[task])(
        {**params, 'shared': shared}
      )

    whole = params['shared']
    return answers, {
      1: [right('b', whole), right('a', whole)],
      2: [right('b', whole), right('a', half)],
    }

  answers, right = run(params, *args)
  for grads, kind in answers:
    for i, task in enumerate(NAMES):
      own = right[int(kind)][i]
      jax.tree.map(
        lambda g, r, i=i: np.testing.assert_allclose(g[i], r, rtol=1e-5),
        grads['shared'],
        own['shared'],
      )
      np.testing.assert_allclose(
        grads['heads'][task], own['heads'][task], rtol=1e-5
      )
  return answers[-2][0]


def test_layers_in_a_scan_are_differentiated():
  rng = np.random.default_rng(0)
  params = {
    'shared': jnp.asarray(rng.standard_normal((6, 3, 3)), jnp.float32),
    'heads': {'a': jnp.arange(1.0, 4.0), 'b': jnp.array([0.5, -1.0, 2.0])},
  }

  def loss_fn(params, x):
    layer = lambda x, kernel: (jnp.tanh(kernel @ x), None)
    x, _ = jax.lax.scan(layer, x, params['shared'])
    return {task: head @ x for task, head in params['heads'].items()}

  assert_per_task_gradients(loss_fn, params, jnp.ones(3))


@jax.custom_vjp
def reversed_gradient(x):
  return x


reversed_gradient.defvjp(lambda x: (x, None), lambda _, g: (-3.0 * g,))


def two_heads():
  return {
    'shared': jnp.array([1.0, 2.0]),
    'heads': {'a': jnp.array([3.0, 4.0]), 'b': jnp.array([5.0, 6.0])},
  }


def test_a_custom_gradient_is_used():
  def loss_fn(params):
    hidden = reversed_gradient(params['shared'])
    return {task: head @ hidden for task, head in params['heads'].items()}

  grads = assert_per_task_gradients(loss_fn, two_heads())
  np.testing.assert_allclose(grads['shared'], [[-15.0, -18.0], [-9.0, -12.0]])


def test_a_custom_gradient_inside_a_head_is_used():
  def loss_fn(params):
    return {
      task: reversed_gradient(head) @ params['shared']
      for task, head in params['heads'].items()
    }

  grads = assert_per_task_gradients(loss_fn, two_heads())
  np.testing.assert_allclose(grads['heads']['a'], [-3.0, -6.0])


def test_branches_checkpoints_and_compiled_functions_are_differentiated():
  def loss_fn(params, flag):
    hidden = jax.checkpoint(jnp.sin)(params['shared'])
    hidden = jax.lax.cond(flag, jnp.exp, jnp.cos, hidden)
    compiled = jax.jit(lambda heads: {t: h @ hidden for t, h in heads.items()})
    return compiled(params['heads'])

  for flag in (True, False):
    assert_per_task_gradients(loss_fn, two_heads(), jnp.array(flag))


def test_dropout_draws_one_mask_for_all_tasks_and_both_passes():
  """Losses are linear, so that a gradient is the mask it was drawn with."""
  width = 64

  def loss_fn(params, key):
    mask = jax.random.bernoulli(key, 0.5, (width,)).astype(jnp.float32)
    total = jnp.sum(mask * params['shared'])
    return {'a': 2 * total, 'b': 3 * total}

  @quick_compile.jit
  def draws(key):
    """All the masks that were drawn with a key."""
    params = {'shared': jnp.ones(width), 'heads': {}}
    own = {'shared': jnp.stack([jnp.ones(width), 5 * jnp.ones(width)])}
    masks = []
    for engine in ENGINES:
      at, at_each = mtl_jax.task_grad(loss_fn, NAMES, engine=engine)
      for _, grads in (at(params, key), at_each({**own, 'heads': {}}, key)):
        masks += [grads['shared'][0] / 3, grads['shared'][1] / 2]
    return jnp.stack(masks)

  first, other = draws(jax.random.key(0)), draws(jax.random.key(1))
  for masks in (first, other):
    np.testing.assert_allclose(masks, masks[:1].repeat(12, axis=0), rtol=1e-6)
  assert 16 < np.sum(first[0]) < 48
  # Another key is another mask.
  assert np.any(first[0] != other[0])


def _calls_of_tracing(size, each, engine):
  """Calls of Python functions until a program of `size` heads is lowered."""
  names = tuple(f'task_{i}' for i in range(size))

  def loss_fn(params, x):
    features = jnp.tanh(x @ params['shared'])
    return {
      task: jnp.mean((features @ params['heads'][task] - i) ** 2)
      for i, task in enumerate(names)
    }

  pair = mtl_jax.task_grad(loss_fn, names, engine=engine)
  shape = lambda *numbers: jax.ShapeDtypeStruct(numbers, jnp.float32)
  params = {
    'shared': shape(size, 4, 4) if each else shape(4, 4),
    'heads': {task: shape(4) for task in names},
  }
  profile = cProfile.Profile()
  fn = pair.at_each if each else pair.at
  profile.runcall(jax.jit(fn).lower, params, shape(2, 4))
  return pstats.Stats(profile).total_calls


@pytest.mark.parametrize('each', [False, True], ids=['at', 'at_each'])
@pytest.mark.parametrize('engine', ['scan', 'unroll'])
def test_the_work_of_tracing_grows_as_the_number_of_tasks(engine, each):
  # What JAX traces once and for all is traced before anything is counted.
  _calls_of_tracing(2, each, engine)
  few, many = (_calls_of_tracing(size, each, engine) for size in (6, 18))
  # As the square it would be nine times as much.
  assert many < 3.5 * few
