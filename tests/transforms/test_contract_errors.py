"""What every method refuses, and what it takes without a word."""

import jax
import jax.numpy as jnp
import methods
import pytest


def _update(method, task_grads, params=None, num_tasks=None, **extra_args):
  """Traces an update: shapes are checked before anything is computed."""
  tx = method.make(range(2), num_tasks=num_tasks)
  like = params
  if params is None:
    like = jnp.zeros(3) if jax.tree.leaves(task_grads) else task_grads
  extra_args.setdefault('losses', jnp.ones(2))
  if method.extra_batches:
    extra_args['extra_grads'] = (task_grads,) * method.extra_batches
  return jax.eval_shape(
    lambda g: tx.update(g, tx.init(like), params, **extra_args), task_grads
  )


# Task gradients, parameters, `num_tasks`, and what the message says.
WRONG_SHAPES = {
  'scalar': (jnp.zeros(()), None, None, 'the root is a scalar'),
  'one scalar': (
    {'w': jnp.zeros((2, 3)), 'b': jnp.zeros(())},
    None,
    None,
    r"\['b'\]",
  ),
  'no task axis': (
    jnp.zeros(3),
    jnp.zeros(3),
    None,
    r'\(3,\), expected \([23], 3\)',
  ),
  'no task axis, matrix': (
    jnp.zeros((2, 3)),
    jnp.zeros((2, 3)),
    None,
    r'expected \(2, 2, 3\)',
  ),
  'broadcastable': (
    jnp.zeros((2, 1)),
    jnp.zeros(3),
    None,
    r'\(2, 1\), expected \(2, 3\)',
  ),
  'two numbers of tasks': (
    [jnp.zeros((2, 3)), jnp.zeros((3, 3))],
    None,
    None,
    r'\[1\].*\(3, 3\)',
  ),
  'another number of tasks': (jnp.zeros((3, 3)), None, 2, 'with 2 tasks'),
  'other names': (
    {'w': jnp.zeros((2, 3))},
    {'v': jnp.zeros(3)},
    None,
    'structure',
  ),
  'other structure': (
    {'w': jnp.zeros((2, 3))},
    jnp.zeros(3),
    None,
    'structure',
  ),
  'empty': ({}, None, None, 'no leaf'),
}
# A map from the Gram matrix, and one that draws; on coordinates, and with
# draws; with memory, and of tracked gradients; with further batches; a loss
# weighting. All of them are lifted by one function, which checks the shapes.
KIND_NAMES = (
  'mgda',
  'pcgrad',
  'trimmed_mean',
  'graddrop',
  'gradvac',
  'moco',
  'modo',
  'weighted_dwa',
)
KINDS = methods.params(m for m in methods.METHODS if m.name in KIND_NAMES)


@pytest.mark.parametrize('method', KINDS)
def test_wrong_shapes_raise_in_every_kind_of_rule(method):
  assert len(KINDS) == len(KIND_NAMES)
  for name, (task_grads, params, num_tasks, message) in WRONG_SHAPES.items():
    if method.needs_tasks and name == 'empty':
      # Where T is known, nothing is wrong with no parameters.
      assert _update(method, task_grads, params)[0] == {}
      continue
    with pytest.raises(ValueError, match=message):
      _update(method, task_grads, params, num_tasks)
      pytest.fail(f'{name} is taken')


@pytest.mark.parametrize('method', methods.ALL)
def test_gradients_losses_and_active_of_wrong_shapes_raise(method):
  task_grads, params, num_tasks, message = WRONG_SHAPES['broadcastable']
  with pytest.raises(ValueError, match=message):
    _update(method, task_grads, params, num_tasks)
  shapes = [(), (1,), (3,), (2, 1)] if method.name in KIND_NAMES else [(1,)]
  for argument in ('losses', 'active'):
    message = rf'{argument} must have shape \(2,\)'
    for shape in shapes:
      with pytest.raises(ValueError, match=message):
        _update(method, jnp.zeros((2, 3)), **{argument: jnp.ones(shape)})
        pytest.fail(f'{argument} of shape {shape} are taken')


def test_unknown_extra_arguments_are_swallowed():
  unknown = {'value': 1.0, 'grad_fn': lambda x: x, 'extra_grads': ()}
  for method in methods.METHODS:
    update, _ = _update(method, jnp.zeros((2, 3)), **unknown)
    assert update.shape == (3,), method.name


@pytest.mark.parametrize('method', methods.NEEDS_LOSSES)
def test_losses_that_are_needed_are_asked_for(method):
  with pytest.raises(ValueError, match='losses'):
    _update(method, jnp.zeros((2, 3)), losses=None)


def test_losses_are_optional_where_they_are_not_needed():
  for method in methods.METHODS:
    if not method.needs_losses:
      update, _ = _update(method, jnp.zeros((2, 3)), losses=None)
      assert update.shape == (3,), method.name


@pytest.mark.parametrize('method', methods.ALL)
def test_factory_names_argument_and_value_it_refuses(method):
  of_all = (('num_tasks', 0), ('num_tasks', -1), ('reduce', 'max'))
  for argument, value in (*of_all, *method.wrong):
    with pytest.raises((ValueError, TypeError)) as error:
      method.factory(**{**method.arguments, argument: value})
      pytest.fail(f'{argument}={value!r} is taken')
    message = str(error.value)
    assert argument in message, (argument, value)
    assert repr(value) in message or str(value) in message, (argument, value)


def test_replicas_and_shards_must_be_different_axes():
  for method in methods.METHODS:
    with pytest.raises(ValueError, match=r"axis_name and shard_axis.*'i'"):
      method.make(range(2), axis_name='i', shard_axis='i')
      pytest.fail(f'{method.name} takes them')
