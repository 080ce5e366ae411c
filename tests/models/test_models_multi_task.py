"""Heads on a shared trunk, and one network a task."""

import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtl_jax import models
from mtl_jax import types

_TASKS = [
  types.Task('left', 3, None, ()),
  types.Task('right', 4, None, ()),
]
_SHARINGS = ['shared', 'separate']


class _Normed(nn.Module):
  """The smallest trunk with statistics."""

  @nn.compact
  def __call__(self, image, *, train):
    x = nn.Dense(5)(image.reshape(image.shape[0], -1))
    return nn.relu(nn.BatchNorm(use_running_average=not train)(x))


def _batch(seed=0, size=16):
  rng = np.random.default_rng(seed)
  return {'image': jnp.asarray(rng.random((size, 12, 12, 1)), jnp.float32)}


@functools.cache
def _make(trunk, sharing):
  """A model whose functions are compiled once for all tests."""
  model = models.make_model(trunk, _TASKS, sharing=sharing)
  apply = jax.jit(model.apply, static_argnames='train')
  params, state = jax.jit(model.init)(jax.random.key(0), _batch())
  return params, state, apply


_MAKERS = {
  'mlp': functools.partial(_make, models.MLP(widths=(6, 5))),
  'dropout': functools.partial(_make, models.MLP(widths=(64,), dropout=0.5)),
  'normed': functools.partial(_make, _Normed()),
  'resnet': functools.partial(
    _make, models.ResNet(widths=(4, 6), blocks=(1, 1), features=5)
  ),
}


def _squares(predictions):
  return {task: jnp.square(x).sum() for task, x in predictions.items()}


def _equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize('sharing', _SHARINGS)
@pytest.mark.parametrize('name', ['mlp', 'normed'])
def test_each_task_gets_predictions_as_wide_as_its_head(name, sharing):
  params, state, apply = _MAKERS[name](sharing)
  predictions, _ = apply(params, state, _batch(size=3), train=False)
  assert {k: v.shape for k, v in predictions.items()} == {
    'left': (3, 3),
    'right': (3, 4),
  }


def test_shared_predictions_are_heads_on_the_trunks_features():
  trunk = models.MLP(widths=(6, 5))
  params, state, apply = _MAKERS['mlp']('shared')
  assert set(params) == {'shared', 'heads'}
  features = trunk.apply({'params': params['shared']}, _batch()['image'])
  predictions, _ = apply(params, state, _batch(), train=False)
  for task, head in params['heads'].items():
    expected = np.float64(features) @ np.float64(head['kernel'])
    np.testing.assert_allclose(
      predictions[task], expected + np.float64(head['bias']), atol=1e-5
    )


def test_separate_parameters_are_all_in_heads_a_trunk_and_a_head_each():
  params, _, _ = _MAKERS['mlp']('separate')
  assert params['shared'] == {}
  assert {k: set(v) for k, v in params['heads'].items()} == {
    'left': {'trunk', 'head'},
    'right': {'trunk', 'head'},
  }


@pytest.mark.parametrize('name', ['mlp', 'normed'])
def test_separate_networks_are_shared_models_of_one_task(name):
  params, state, apply = _MAKERS[name]('separate')
  trunk = {'mlp': models.MLP(widths=(6, 5)), 'normed': _Normed()}[name]
  together, moved = apply(params, state, _batch(), train=True)
  for task in _TASKS:
    alone = models.make_model(trunk, [task])
    mine = params['heads'][task.name]
    predictions, alone_moved = jax.jit(alone.apply, static_argnames='train')(
      {'shared': mine['trunk'], 'heads': {task.name: mine['head']}},
      {collection: tree[task.name] for collection, tree in state.items()},
      _batch(),
      train=True,
    )
    # Compiled on its own, a network may be rounded in another order.
    np.testing.assert_allclose(
      together[task.name], predictions[task.name], rtol=1e-4, atol=1e-5
    )
    for collection, tree in alone_moved.items():
      jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6),
        moved[collection][task.name],
        tree,
      )


@pytest.mark.parametrize('name', ['mlp', 'normed'])
def test_loss_of_a_separate_task_has_no_gradient_in_the_other_network(name):
  params, state, apply = _MAKERS[name]('separate')
  gradients = jax.jit(
    jax.grad(
      lambda params: _squares(apply(params, state, _batch(), train=True)[0])[
        'left'
      ]
    )
  )(params)['heads']
  left, right = (
    [np.asarray(x) for x in jax.tree.leaves(gradients[task])]
    for task in ('left', 'right')
  )
  assert all((leaf == 0).all() for leaf in right)
  largest = max(np.abs(leaf).max() for leaf in left)
  assert largest > 0


def test_separate_networks_start_from_independent_values():
  params, _, _ = _MAKERS['normed']('separate')
  left, right = (params['heads'][task]['trunk'] for task in ('left', 'right'))
  a, b = (np.ravel(tree['Dense_0']['kernel']) for tree in (left, right))
  assert (a != b).all()
  # 720 values: five standard errors of a correlation.
  assert abs(np.corrcoef(a, b)[0, 1]) < 5 / 720**0.5


def test_heads_of_one_width_start_from_different_values():
  tasks = [types.Task(name, 4, None, ()) for name in ('a', 'b')]
  model = models.make_model(models.MLP(widths=(6,)), tasks)
  params, _ = jax.jit(model.init)(jax.random.key(0), _batch())
  heads = params['heads']
  assert (heads['a']['kernel'] != heads['b']['kernel']).all()


@pytest.mark.parametrize('sharing', _SHARINGS)
def test_initial_values_depend_on_the_key_and_not_on_the_images(sharing):
  model = models.make_model(models.MLP(widths=(6,)), _TASKS, sharing=sharing)
  init = jax.jit(model.init)
  params, _ = init(jax.random.key(0), _batch(seed=0))
  _equal(params, init(jax.random.key(0), _batch(seed=1))[0])
  other, _ = init(jax.random.key(1), _batch(seed=0))
  for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(other), strict=True):
    assert (a != b).all()


@pytest.mark.parametrize('sharing', _SHARINGS)
def test_statistics_move_in_training_only(sharing):
  params, state, apply = _MAKERS['normed'](sharing)
  assert set(state) == {'batch_stats'}
  _, kept = apply(params, state, _batch(), train=False)
  _equal(kept, state)
  _, moved = apply(params, state, _batch(), train=True)
  assert jax.tree.structure(moved) == jax.tree.structure(state)
  for new, old in zip(
    jax.tree.leaves(moved), jax.tree.leaves(state), strict=True
  ):
    assert (new != old).any()


@pytest.mark.parametrize('sharing', _SHARINGS)
def test_predictions_use_running_statistics_outside_of_training_only(sharing):
  params, state, apply = _MAKERS['normed'](sharing)
  other = jax.tree.map(lambda x: x + 1.0, state)
  for train in (True, False):
    a, _ = apply(params, state, _batch(), train=train)
    b, _ = apply(params, other, _batch(), train=train)
    same = [bool((a[task] == b[task]).all()) for task in a]
    assert same == [train, train]


@pytest.mark.parametrize('sharing', _SHARINGS)
def test_model_without_statistics_has_an_empty_state(sharing):
  params, state, apply = _MAKERS['mlp'](sharing)
  assert state == {}
  for train in (True, False):
    assert apply(params, state, _batch(), train=train)[1] == {}


@pytest.mark.parametrize('sharing', _SHARINGS)
def test_dropout_draws_the_same_masks_from_the_same_key(sharing):
  params, state, apply = _MAKERS['dropout'](sharing)
  run = lambda seed, train=True: apply(
    params, state, _batch(), train=train, key=jax.random.key(seed)
  )[0]
  _equal(run(0), run(0))

  def loss(params):
    predictions, _ = apply(
      params, state, _batch(), train=True, key=jax.random.key(0)
    )
    return sum(_squares(predictions).values()), predictions

  # Compiled anew, and differentiated.
  _, predictions = jax.jit(jax.grad(loss, has_aux=True))(params)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, atol=1e-5),
    predictions,
    run(0),
  )
  assert (run(0)['left'] != run(1)['left']).any()
  _equal(run(0, train=False), run(1, train=False))


def test_dropout_draws_the_same_masks_for_all_separate_networks():
  params, state, apply = _MAKERS['dropout']('separate')
  left = params['heads']['left']
  columns = jnp.array([0, 1, 2, 0])
  head = jax.tree.map(lambda x: x[..., columns], left['head'])
  right = {'trunk': left['trunk'], 'head': head}
  params = {'shared': {}, 'heads': {'left': left, 'right': right}}
  predictions, _ = apply(
    params, state, _batch(), train=True, key=jax.random.key(0)
  )
  np.testing.assert_allclose(
    predictions['left'], predictions['right'][:, :3], atol=1e-6
  )


def test_dropout_without_a_key_is_an_error():
  params, state, apply = _MAKERS['dropout']('shared')
  with pytest.raises(ValueError, match='key'):
    apply(params, state, _batch(), train=True)


@pytest.mark.parametrize(
  ('name', 'sharing'), [('resnet', 'shared'), ('normed', 'separate')]
)
def test_batch_over_eight_devices_gives_the_numbers_of_one(name, sharing):
  params, state, apply = _MAKERS[name](sharing)

  @jax.jit
  def run(params, state, batch):
    def loss(params):
      predictions, moved = apply(params, state, batch, train=True)
      return sum(_squares(predictions).values()), (predictions, moved)

    return jax.value_and_grad(loss, has_aux=True)(params)

  mesh = jax.make_mesh(
    (8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,)
  )
  over = lambda *names: jax.sharding.NamedSharding(
    mesh, jax.sharding.PartitionSpec(*names)
  )
  expected = run(params, state, _batch())
  actual = run(
    *jax.device_put((params, state), over()),
    jax.device_put(_batch(), over('data')),
  )
  predictions = actual[0][1][0]
  assert len(predictions['left'].sharding.device_set) == 8
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4),
    actual,
    expected,
  )


@pytest.mark.parametrize('sharing', _SHARINGS)
def test_images_of_bytes_are_an_error(sharing):
  params, state, _ = _MAKERS['mlp'](sharing)
  model = models.make_model(models.MLP(widths=(6, 5)), _TASKS, sharing=sharing)
  batch = {'image': jnp.zeros((2, 12, 12, 1), jnp.uint8)}
  with pytest.raises(TypeError, match=r'image.*uint8'):
    model.apply(params, state, batch, train=False)


@pytest.mark.parametrize('names', [[], ['a', 'a']])
def test_tasks_without_distinct_names_are_an_error(names):
  tasks = [types.Task(name, 2, None, ()) for name in names]
  with pytest.raises(ValueError, match='tasks'):
    models.make_model(models.MLP(), tasks)


def test_unknown_names_are_errors_that_tell_the_nearest():
  with pytest.raises(ValueError, match=r"'resnet81'.*did you mean 'resnet18'"):
    models.by_name('resnet81')
  with pytest.raises(ValueError, match=r"'seperate'.*did you mean 'separate'"):
    models.make_model(models.MLP(), _TASKS, sharing='seperate')


def test_names_of_configs_are_trunks_with_the_given_attributes():
  assert models.by_name('lenet') == models.LeNet()
  assert models.by_name('resnet18', features=7) == models.ResNet(features=7)
  assert models.by_name('mlp', widths=(3,)) == models.MLP(widths=(3,))


@pytest.mark.parametrize(
  ('name', 'kwargs', 'message'),
  [
    ('lenet', {'widths': (8,)}, r"kwargs.widths .* 'lenet', .* \['features'\]"),
    (
      'resnet18',
      {'dropout': 0.0},
      "kwargs.dropout is no argument of 'resnet18'",
    ),
    ('mlp', {'name': 'x'}, 'kwargs.name is no argument'),
    ('mlp', {'widths': (8.5, 8)}, r'tuple of integers, got \(8.5, 8\)'),
    ('mlp', {'widths': 8}, 'tuple of integers, got 8'),
    ('mlp', {'widths': (8, 0)}, r'widths of .* 1 or more, got \(8, 0\)'),
    ('mlp', {'dropout': '0'}, "a number, got '0'"),
    ('resnet18', {'blocks': (1, -1)}, r'blocks of .* 0 or more, got \(1, -1\)'),
    ('vit_s', {'hidden': True}, 'an integer, got True'),
  ],
)
def test_argument_that_a_trunk_does_not_take_is_named(name, kwargs, message):
  with pytest.raises(ValueError, match=message):
    models.by_name(name, **kwargs)
