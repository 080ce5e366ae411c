"""Task gradients of every engine against those of `jax.grad`, task by task."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtl_jax

# Not in alphabetical order: the task axis follows the names, not a dictionary.
NAMES = ('shape', 'colour', 'depth')
ENGINES = ('unroll', 'vmap', 'scan')
BATCH, INPUTS, HIDDEN = 8, 4, 5
OUTPUTS = {'shape': 2, 'colour': 3, 'depth': 1}

engines = pytest.mark.parametrize('engine', ENGINES)


def make_params(seed=0):
  """A trunk of two layers and heads of unlike shapes."""
  rng = np.random.default_rng(seed)
  draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
  return {
    'shared': {
      'first': draw(INPUTS, HIDDEN),
      'second': {'kernel': draw(HIDDEN, HIDDEN), 'bias': draw(1, HIDDEN)},
    },
    'heads': {
      task: {'kernel': draw(HIDDEN, size), 'bias': draw(1, size)}
      for task, size in OUTPUTS.items()
    },
  }


def make_batch(seed=1):
  rng = np.random.default_rng(seed)
  draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
  return {
    'image': draw(BATCH, INPUTS),
    'labels': {task: draw(BATCH, size) for task, size in OUTPUTS.items()},
  }


PARAMS = make_params()
BATCH_OF_EIGHT = make_batch()


def features(shared, image):
  hidden = jnp.tanh(image @ shared['first'])
  return jnp.tanh(
    hidden @ shared['second']['kernel'] + shared['second']['bias']
  )


def head_loss(head, hidden, label):
  prediction = hidden @ head['kernel'] + head['bias']
  return jnp.mean((prediction - label) ** 2)


def loss_fn(params, batch):
  hidden = features(params['shared'], batch['image'])
  # In another order than NAMES.
  return {
    task: head_loss(params['heads'][task], hidden, batch['labels'][task])
    for task in OUTPUTS
  }


def array_loss_fn(params, batch):
  losses = loss_fn(params, batch)
  return jnp.stack([losses[task] for task in NAMES])


def aux_loss_fn(params, batch):
  hidden = features(params['shared'], batch['image'])
  return loss_fn(params, batch), {'mean': jnp.mean(hidden, axis=0), 'seen': 8}


@functools.cache
def jitted(fn, engine, each, has_aux=False):
  pair = mtl_jax.task_grad(fn, NAMES, engine=engine, has_aux=has_aux)
  return jax.jit(pair.at_each if each else pair.at)


def stacked(*trees):
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


# Task i's own parameters: row i of the trunks, and the heads.
TRUNKS = [make_params(seed)['shared'] for seed in (5, 6, 7)]
TASK_PARAMS = {'shared': stacked(*TRUNKS), 'heads': PARAMS['heads']}


@functools.cache
def expected(each):
  """Losses [T] and task gradients, one `jax.grad` a task."""
  found = [
    jax.value_and_grad(lambda p, task=task: loss_fn(p, BATCH_OF_EIGHT)[task])(
      {**PARAMS, 'shared': trunk} if each else PARAMS
    )
    for task, trunk in zip(NAMES, TRUNKS, strict=True)
  ]
  return jnp.stack([loss for loss, _ in found]), {
    'shared': stacked(*(grads['shared'] for _, grads in found)),
    'heads': {
      task: grads['heads'][task]
      for task, (_, grads) in zip(NAMES, found, strict=True)
    },
  }


def assert_trees_close(actual, right, **tolerance):
  assert jax.tree.structure(actual) == jax.tree.structure(right)
  tolerance = tolerance or {'rtol': 1e-5, 'atol': 1e-6}
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, **tolerance), actual, right
  )


@engines
@pytest.mark.parametrize('fn', [loss_fn, array_loss_fn])
def test_at_gives_the_gradient_of_each_task(fn, engine):
  (losses, aux), grads = jitted(fn, engine, False)(PARAMS, BATCH_OF_EIGHT)
  assert aux is None
  assert_trees_close((losses, grads), expected(False))


@engines
@pytest.mark.parametrize('fn', [loss_fn, array_loss_fn])
def test_at_each_evaluates_each_task_at_its_own_parameters(fn, engine):
  found = jitted(fn, engine, True)(TASK_PARAMS, BATCH_OF_EIGHT)
  assert_trees_close(found, expected(True))


@engines
def test_at_each_with_equal_rows_is_at(engine):
  (losses, _), grads = jitted(loss_fn, engine, False)(PARAMS, BATCH_OF_EIGHT)
  shared = stacked(*[PARAMS['shared']] * len(NAMES))
  found = jitted(loss_fn, engine, True)(
    {**PARAMS, 'shared': shared}, BATCH_OF_EIGHT
  )
  assert_trees_close(found, (losses, grads))


@engines
def test_all_parameters_shared_is_the_jacobian(engine):
  def losses_of(theta, scale):
    return jnp.stack([jnp.sum(theta**2), jnp.prod(theta), scale * theta[0]])

  theta = jnp.array([1.0, -2.0, 3.0])
  names = ('a', 'b', 'c')
  at, at_each = mtl_jax.task_grad(losses_of, names, engine=engine)
  (losses, _), grads = at(theta, 2.0)
  np.testing.assert_allclose(losses, losses_of(theta, 2.0), rtol=1e-6)
  np.testing.assert_allclose(
    grads, jax.jacrev(losses_of)(theta, 2.0), rtol=1e-6
  )
  rows = jnp.array([[1.0, 1.0, 1.0], [2.0, 3.0, 4.0], [5.0, 6.0, 7.0]])
  losses, grads = at_each(rows, 2.0)
  np.testing.assert_allclose(losses, [3.0, 24.0, 10.0], rtol=1e-6)
  np.testing.assert_allclose(
    grads, [[2.0, 2.0, 2.0], [12.0, 8.0, 6.0], [2.0, 0.0, 0.0]], rtol=1e-6
  )


@engines
def test_nothing_shared_leaves_the_gradients_of_the_heads(engine):
  def losses_of(params):
    return {task: jnp.sum(head**2) for task, head in params['heads'].items()}

  params = {
    'shared': {},
    'heads': {'a': jnp.array([1.0, 2.0]), 'b': jnp.array([3.0])},
  }
  at, at_each = mtl_jax.task_grad(losses_of, ('b', 'a'), engine=engine)
  right = {
    'shared': {},
    'heads': {'a': jnp.array([2.0, 4.0]), 'b': jnp.array([6.0])},
  }
  (losses, _), grads = at(params)
  assert_trees_close((losses, grads), (jnp.array([9.0, 5.0]), right))
  assert_trees_close(at_each(params), (jnp.array([9.0, 5.0]), right))


@engines
def test_a_task_without_a_head_of_its_own_has_a_shared_gradient(engine):
  def losses_of(params):
    own = params['heads']['a'] * params['shared']
    return {'a': jnp.sum(own), 'b': jnp.sum(params['shared'] ** 2)}

  params = {'shared': jnp.array([1.0, 2.0]), 'heads': {'a': jnp.ones(2)}}
  at, _ = mtl_jax.task_grad(losses_of, ('a', 'b'), engine=engine)
  _, grads = at(params)
  np.testing.assert_allclose(grads['shared'], [[1.0, 1.0], [2.0, 4.0]])
  np.testing.assert_allclose(grads['heads']['a'], [1.0, 2.0])


@engines
@pytest.mark.parametrize('each', [False, True], ids=['at', 'at_each'])
def test_frozen_leaves_have_no_gradient_and_no_task_axis(engine, each):
  labels = {
    'shared': {'first': 'frozen', 'second': 'shared'},
    'heads': {task: task for task in NAMES},
  }
  at, at_each = mtl_jax.task_grad(
    loss_fn, NAMES, engine=engine, param_labels=labels
  )
  losses, right = expected(False)
  if each:
    second = stacked(*[PARAMS['shared']['second']] * 3)
    params = {**PARAMS, 'shared': {**PARAMS['shared'], 'second': second}}
    found, grads = at_each(params, BATCH_OF_EIGHT)
  else:
    (found, _), grads = at(PARAMS, BATCH_OF_EIGHT)
  zero = jnp.zeros((INPUTS, HIDDEN))
  right = {**right, 'shared': {**right['shared'], 'first': zero}}
  assert_trees_close((found, grads), (losses, right))


@engines
def test_labels_may_follow_another_layout_of_the_parameters(engine):
  def losses_of(params):
    trunk, left, right = params
    return {'l': jnp.sum(trunk * left), 'r': jnp.sum(trunk**2 * right)}

  params = (jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0]), jnp.array([5.0, 6.0]))
  at, _ = mtl_jax.task_grad(
    losses_of,
    ('l', 'r'),
    engine=engine,
    param_labels=lambda params: ('shared', 'l', 'r'),
  )
  _, (trunk, left, right) = at(params)
  np.testing.assert_allclose(trunk, [[3.0, 4.0], [10.0, 24.0]])
  np.testing.assert_allclose(left, [1.0, 2.0])
  np.testing.assert_allclose(right, [1.0, 4.0])


@engines
def test_aux_is_that_of_the_loss_function_at_the_parameters(engine):
  at = jitted(aux_loss_fn, engine, False, has_aux=True)
  (losses, aux), grads = at(PARAMS, BATCH_OF_EIGHT)
  _, right = aux_loss_fn(PARAMS, BATCH_OF_EIGHT)
  assert_trees_close(aux, jax.tree.map(jnp.asarray, right))
  assert_trees_close((losses, grads), expected(False))


@engines
def test_statistics_come_from_the_unperturbed_pass_alone(engine):
  """What moves running statistics is the aux of `at`; `at_each` has none."""
  at, at_each = mtl_jax.task_grad(
    aux_loss_fn, NAMES, engine=engine, has_aux=True
  )
  _, right = aux_loss_fn(PARAMS, BATCH_OF_EIGHT)
  seen = []

  def grad_fn(task_params):
    losses, grads = at_each(task_params, BATCH_OF_EIGHT)
    seen.append((task_params, losses))
    return grads

  (losses, aux), grads = at(PARAMS, BATCH_OF_EIGHT)
  tx = mtl_jax.flat_minima(mtl_jax.linear(), NAMES, rho=0.5)
  tx.update(grads, tx.init(PARAMS), PARAMS, grad_fn=grad_fn)
  np.testing.assert_allclose(aux['mean'], right['mean'], rtol=1e-6)
  ((task_params, perturbed_losses),) = seen
  # The perturbed pass saw other features and higher losses.
  moved = features(
    jax.tree.map(lambda x: x[0], task_params['shared']),
    BATCH_OF_EIGHT['image'],
  )
  assert np.max(np.abs(jnp.mean(moved, axis=0) - aux['mean'])) > 1e-2
  assert np.all(perturbed_losses > losses)
  right_losses, _ = expected(False)
  np.testing.assert_allclose(losses, right_losses, rtol=1e-6)
