"""Task gradients of every engine against those of `jax.grad`, task by task."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quick_compile

import mtl_jax

# Not in alphabetical order: the task axis follows the names, not a dictionary.
NAMES = ('shape', 'colour', 'depth', 'plain')
ENGINES = ('unroll', 'vmap', 'scan')
BATCH, INPUTS, HIDDEN = 8, 4, 5
# Two heads of one shape with another between them, and a task without a head.
OUTPUTS = {'depth': 2, 'shape': 2, 'colour': 3}

engines = pytest.mark.parametrize('engine', ENGINES)


def make_params(seed=0):
  """A trunk of two layers, and heads."""
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
    'plain': jnp.mean(hidden**2),
    **{
      task: head_loss(params['heads'][task], hidden, batch['labels'][task])
      for task in OUTPUTS
    },
  }


def array_loss_fn(params, batch):
  losses = loss_fn(params, batch)
  return jnp.stack([losses[task] for task in NAMES])


def aux_loss_fn(params, batch):
  hidden = features(params['shared'], batch['image'])
  return loss_fn(params, batch), {'mean': jnp.mean(hidden, axis=0), 'seen': 8}


def stacked(*trees):
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


FREEZING = {
  'shared': {'first': 'frozen', 'second': 'shared'},
  'heads': {task: task for task in OUTPUTS},
}


@functools.cache
def setting():
  """Parameters, task i's own parameters (row i of the trunks), and a batch."""
  params = make_params()
  trunks = [make_params(seed)['shared'] for seed in (5, 6, 7, 8)]
  own = {'shared': stacked(*trunks), 'heads': params['heads']}
  return params, own, make_batch()


@functools.cache
def found():
  """Everything that is asked of every engine, in one program."""

  def run(params, own, batch):
    answers = {}
    equal = {**params, 'shared': stacked(*[params['shared']] * len(NAMES))}
    half_frozen = {
      **equal,
      'shared': {**equal['shared'], 'first': params['shared']['first']},
    }
    for engine in ENGINES:
      make = functools.partial(mtl_jax.task_grad, task_names=NAMES)
      pair = make(loss_fn, engine=engine)
      of_array = make(array_loss_fn, engine=engine)
      with_aux = make(aux_loss_fn, engine=engine, has_aux=True)
      frozen = make(loss_fn, engine=engine, param_labels=FREEZING)
      answers[engine] = {
        'at': pair.at(params, batch),
        'at, array': of_array.at(params, batch),
        'at, aux': with_aux.at(params, batch),
        'at, frozen': frozen.at(params, batch),
        'at_each': pair.at_each(own, batch),
        'at_each, array': of_array.at_each(own, batch),
        'at_each, aux': with_aux.at_each(own, batch),
        'at_each, equal rows': pair.at_each(equal, batch),
        'at_each, frozen': frozen.at_each(half_frozen, batch),
      }
    return answers

  return quick_compile.jit(run)(*setting())


@functools.cache
def expected(each):
  """Losses [T] and task gradients, one `jax.grad` a task."""

  def run(params, own, batch):
    answers = []
    for i, task in enumerate(NAMES):
      trunk = jax.tree.map(lambda x, i=i: x[i], own['shared'])
      there = {**params, 'shared': trunk} if each else params
      loss = lambda p, task=task: loss_fn(p, batch)[task]
      answers.append(jax.value_and_grad(loss)(there))
    return jnp.stack([loss for loss, _ in answers]), {
      'shared': stacked(*(grads['shared'] for _, grads in answers)),
      'heads': {
        task: answers[NAMES.index(task)][1]['heads'][task] for task in OUTPUTS
      },
    }

  return quick_compile.jit(run)(*setting())


def assert_trees_close(actual, right, **tolerance):
  assert jax.tree.structure(actual) == jax.tree.structure(right)
  tolerance = tolerance or {'rtol': 1e-5, 'atol': 1e-6}
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, **tolerance), actual, right
  )


@engines
@pytest.mark.parametrize('form', ['at', 'at, array'])
def test_at_gives_the_gradient_of_each_task(form, engine):
  (losses, aux), grads = found()[engine][form]
  assert aux is None
  assert_trees_close((losses, grads), expected(False))


@engines
@pytest.mark.parametrize('form', ['at_each', 'at_each, array', 'at_each, aux'])
def test_at_each_evaluates_each_task_at_its_own_parameters(form, engine):
  assert_trees_close(found()[engine][form], expected(True))


@engines
def test_at_each_with_equal_rows_is_at(engine):
  (losses, _), grads = found()[engine]['at']
  assert_trees_close(found()[engine]['at_each, equal rows'], (losses, grads))


@engines
def test_frozen_leaves_have_no_gradient_and_no_task_axis(engine):
  losses, right = expected(False)
  zero = jnp.zeros((INPUTS, HIDDEN))
  right = {**right, 'shared': {**right['shared'], 'first': zero}}
  (values, _), grads = found()[engine]['at, frozen']
  assert_trees_close((values, grads), (losses, right))
  assert_trees_close(found()[engine]['at_each, frozen'], (losses, right))


@engines
def test_aux_is_that_of_the_loss_function_at_the_parameters(engine):
  (losses, aux), grads = found()[engine]['at, aux']
  params, _, batch = setting()
  right = jnp.mean(features(params['shared'], batch['image']), axis=0)
  np.testing.assert_allclose(aux['mean'], right, rtol=1e-5)
  assert aux['seen'] == 8
  assert_trees_close((losses, grads), expected(False))


def in_every_engine(fn, names, *args, each=(), **options):
  """Jitted `at` of the arguments, and `at_each` of others, by engine."""

  def run(args, each):
    answers = {}
    for engine in ENGINES:
      pair = mtl_jax.task_grad(fn, names, engine=engine, **options)
      answers[engine] = pair.at(*args), pair.at_each(*each) if each else None
    return answers

  return quick_compile.jit(run)(args, each).values()


def test_all_parameters_shared_is_the_jacobian():
  def losses_of(theta, scale):
    return jnp.stack([jnp.sum(theta**2), jnp.prod(theta), scale * theta[0]])

  theta = jnp.array([1.0, -2.0, 3.0])
  rows = jnp.array([[1.0, 1.0, 1.0], [2.0, 3.0, 4.0], [5.0, 6.0, 7.0]])
  for ((losses, _), grads), each in in_every_engine(
    losses_of, ('a', 'b', 'c'), theta, 2.0, each=(rows, 2.0)
  ):
    np.testing.assert_allclose(losses, [14.0, -6.0, 2.0], rtol=1e-6)
    jacobian = [[2.0, -4.0, 6.0], [-6.0, 3.0, -2.0], [2.0, 0.0, 0.0]]
    np.testing.assert_allclose(grads, jacobian, rtol=1e-6)
    np.testing.assert_allclose(each[0], [3.0, 24.0, 10.0], rtol=1e-6)
    jacobian = [[2.0, 2.0, 2.0], [12.0, 8.0, 6.0], [2.0, 0.0, 0.0]]
    np.testing.assert_allclose(each[1], jacobian, rtol=1e-6)


def test_nothing_shared_leaves_the_gradients_of_the_heads():
  def losses_of(params):
    return {task: jnp.sum(head**2) for task, head in params['heads'].items()}

  params = {
    'shared': {},
    'heads': {'a': jnp.array([1.0, 2.0]), 'b': jnp.array([3.0])},
  }
  right = {
    'shared': {},
    'heads': {'a': jnp.array([2.0, 4.0]), 'b': jnp.array([6.0])},
  }
  for ((losses, _), grads), each in in_every_engine(
    losses_of, ('b', 'a'), params, each=(params,)
  ):
    assert_trees_close((losses, grads), (jnp.array([9.0, 5.0]), right))
    assert_trees_close(each, (jnp.array([9.0, 5.0]), right))


def test_labels_may_follow_another_layout_of_the_parameters():
  def losses_of(params):
    trunk, left, right = params
    return {'l': jnp.sum(trunk * left), 'r': jnp.sum(trunk**2 * right)}

  params = (jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0]), jnp.array([5.0, 6.0]))
  for (_, (trunk, left, right)), _ in in_every_engine(
    losses_of,
    ('l', 'r'),
    params,
    param_labels=lambda params: ('shared', 'l', 'r'),
  ):
    np.testing.assert_allclose(trunk, [[3.0, 4.0], [10.0, 24.0]])
    np.testing.assert_allclose(left, [1.0, 2.0])
    np.testing.assert_allclose(right, [1.0, 4.0])


def test_statistics_come_from_the_unperturbed_pass_alone():
  """What moves running statistics is the aux of `at`; `at_each` has none."""
  params, _, batch = setting()

  @quick_compile.jit
  def run(params, batch):
    at, at_each = mtl_jax.task_grad(aux_loss_fn, NAMES, has_aux=True)
    seen = []

    def grad_fn(task_params):
      losses, grads = at_each(task_params, batch)
      seen.append((task_params, losses))
      return grads

    (losses, aux), grads = at(params, batch)
    tx = mtl_jax.flat_minima(mtl_jax.linear(), NAMES, rho=0.5)
    tx.update(grads, tx.init(params), params, grad_fn=grad_fn)
    ((task_params, perturbed),) = seen
    first = jax.tree.map(lambda x: x[0], task_params['shared'])
    moved = jnp.mean(features(first, batch['image']), axis=0)
    return losses, aux['mean'], perturbed, moved

  losses, mean, perturbed, moved = run(params, batch)
  right = jnp.mean(features(params['shared'], batch['image']), axis=0)
  np.testing.assert_allclose(mean, right, rtol=1e-5)
  # The perturbed pass saw other features and higher losses.
  assert np.max(np.abs(moved - mean)) > 1e-2
  assert np.all(perturbed > losses)
  np.testing.assert_allclose(losses, expected(False)[0], rtol=1e-5)


def test_gradients_keep_the_dtype_of_the_parameters():
  params = {
    'shared': jnp.ones(2, jnp.bfloat16),
    'heads': {'a': jnp.ones(2, jnp.bfloat16), 'b': jnp.ones(2, jnp.float32)},
  }

  def losses_of(params):
    hidden = params['shared'].astype(jnp.float32)
    return {
      task: jnp.sum(hidden * head.astype(jnp.float32))
      for task, head in params['heads'].items()
    }

  own = {**params, 'shared': jnp.stack([params['shared']] * 2)}
  for ((losses, _), grads), each in in_every_engine(
    losses_of, ('b', 'a'), params, each=(own,)
  ):
    for values, of_values in ((losses, grads), each):
      assert values.dtype == jnp.float32
      assert of_values['shared'].dtype == jnp.bfloat16
      assert of_values['heads']['a'].dtype == jnp.bfloat16
      assert of_values['heads']['b'].dtype == jnp.float32


def test_losses_of_unlike_dtypes_are_promoted():
  def losses_of(params):
    return {
      'a': jnp.sum(params['shared']),
      'b': jnp.sum(2 * params['shared']).astype(jnp.bfloat16),
    }

  params = {'shared': jnp.ones(2), 'heads': {}}
  own = {'shared': jnp.ones((2, 2)), 'heads': {}}
  for ((losses, _), grads), each in in_every_engine(
    losses_of, ('b', 'a'), params, each=(own,)
  ):
    for values, of_values in ((losses, grads), each):
      np.testing.assert_allclose(values, [4.0, 2.0])
      np.testing.assert_allclose(of_values['shared'], [[2.0, 2.0], [1.0, 1.0]])


PARAMS = {'shared': np.ones(2, np.float32), 'heads': {}}
OWN = {'shared': np.ones((2, 2), np.float32), 'heads': {}}


@engines
def test_losses_that_are_not_one_scalar_a_task_are_refused(engine):
  total = lambda params: jnp.sum(params['shared'])
  of_shape = lambda shape: lambda p: jnp.broadcast_to(total(p), shape)
  for fn, message in (
    (lambda p: {'a': total(p)}, r"a loss for each of .*, got \('a',\)"),
    (lambda p: dict.fromkeys('abc', total(p)), r"got \('a', 'b', 'c'\)"),
    (
      lambda p: {'a': p['shared'], 'b': total(p)},
      r"task 'a' must be a scalar.*\(2,\)",
    ),
    *(
      (of_shape(shape), r'losses of shape \(2,\)')
      for shape in ((), (1,), (3,), (2, 1))
    ),
  ):
    pair = mtl_jax.task_grad(fn, ('b', 'a'), engine=engine)
    with pytest.raises(ValueError, match=message):
      jax.eval_shape(pair.at, PARAMS)
    with pytest.raises(ValueError, match=message):
      jax.eval_shape(pair.at_each, OWN)


def test_wrong_arguments_are_named_with_their_value():
  make = functools.partial(mtl_jax.task_grad, lambda params: {})
  losses = functools.partial(mtl_jax.task_losses, lambda params, batch: {})
  for factory in (make, losses):
    with pytest.raises(ValueError, match=r"engine must be one of .* got 'map'"):
      factory(('a', 'b'), engine='map')
    with pytest.raises(ValueError, match=r'micro_batches must be .* got 0'):
      factory(('a', 'b'), micro_batches=0)
    with pytest.raises(ValueError, match='task_names must be distinct'):
      factory(('a', 'a'))
    with pytest.raises(TypeError, match="got the string 'ab'"):
      factory('ab')
