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


@pytest.mark.parametrize('method', methods.ALL)
@pytest.mark.parametrize(
  ('task_grads', 'params', 'num_tasks', 'message'),
  [
    (jnp.zeros(()), None, None, 'the root is a scalar'),
    ({'w': jnp.zeros((2, 3)), 'b': jnp.zeros(())}, None, None, r"\['b'\]"),
    (jnp.zeros(3), jnp.zeros(3), None, r'\(3,\), expected \([23], 3\)'),
    (jnp.zeros((2, 3)), jnp.zeros((2, 3)), None, r'expected \(2, 2, 3\)'),
    (jnp.zeros((2, 1)), jnp.zeros(3), None, r'\(2, 1\), expected \(2, 3\)'),
    ([jnp.zeros((2, 3)), jnp.zeros((3, 3))], None, None, r'\[1\].*\(3, 3\)'),
    (jnp.zeros((3, 3)), None, 2, 'with 2 tasks'),
    ({'w': jnp.zeros((2, 3))}, {'v': jnp.zeros(3)}, None, 'structure'),
    ({'w': jnp.zeros((2, 3))}, jnp.zeros(3), None, 'structure'),
    ({}, None, None, 'no leaf'),
  ],
  ids=[
    'scalar',
    'one scalar',
    'no task axis',
    'no task axis, matrix',
    'broadcastable',
    'two numbers of tasks',
    'another number of tasks',
    'other names',
    'other structure',
    'empty',
  ],
)
def test_wrong_shapes_raise(method, task_grads, params, num_tasks, message):
  if method.needs_tasks and not jax.tree.leaves(task_grads):
    # Where T is known, nothing is wrong with no parameters.
    assert _update(method, task_grads, params)[0] == {}
    return
  with pytest.raises(ValueError, match=message):
    _update(method, task_grads, params, num_tasks)


@pytest.mark.parametrize('method', methods.ALL)
@pytest.mark.parametrize('argument', ['losses', 'active'])
def test_losses_and_active_must_have_one_entry_a_task(method, argument):
  for value in (jnp.ones(()), jnp.ones(1), jnp.ones(3), jnp.ones((2, 1))):
    with pytest.raises(ValueError, match=rf'{argument} must have shape \(2,\)'):
      _update(method, jnp.zeros((2, 3)), **{argument: value})


@pytest.mark.parametrize('method', methods.ALL)
def test_unknown_extra_arguments_are_swallowed(method):
  update, _ = _update(
    method, jnp.zeros((2, 3)), value=1.0, grad_fn=lambda x: x, extra_grads=()
  )
  assert update.shape == (3,)


@pytest.mark.parametrize('method', methods.ALL)
def test_losses_are_optional_unless_needed(method):
  if not method.needs_losses:
    assert _update(method, jnp.zeros((2, 3)), losses=None)[0].shape == (3,)
    return
  with pytest.raises(ValueError, match='losses'):
    _update(method, jnp.zeros((2, 3)), losses=None)


WRONG = [
  pytest.param(m, argument, value, id=f'{m.name}-{argument}-{index}')
  for m in methods.METHODS
  # A value may print its address, which differs from worker to worker.
  for index, (argument, value) in enumerate(
    (('num_tasks', 0), ('num_tasks', -1), ('reduce', 'max'), *m.wrong)
  )
]


@pytest.mark.parametrize(('method', 'argument', 'value'), WRONG)
def test_factory_names_argument_and_value_it_refuses(method, argument, value):
  with pytest.raises((ValueError, TypeError)) as error:
    method.factory(**{**method.arguments, argument: value})
  message = str(error.value)
  assert argument in message
  assert repr(value) in message or str(value) in message


@pytest.mark.parametrize('method', methods.ALL)
def test_replicas_and_shards_must_be_different_axes(method):
  with pytest.raises(ValueError, match=r"axis_name and shard_axis.*'i'"):
    method.make(range(2), axis_name='i', shard_axis='i')
