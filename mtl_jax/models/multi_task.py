"""One model for several tasks, with a trunk and a linear head for each."""

from collections.abc import Sequence

from flax import errors
from flax import linen as nn
import jax
import jax.numpy as jnp

from mtl_jax import types
from mtl_jax.models import layers
from mtl_jax.models import registry


def make_model(
  trunk: nn.Module, tasks: Sequence[types.Task], *, sharing: str = 'shared'
) -> types.Model:
  """Puts a linear head for each task on a trunk.

  With `sharing='shared'` all tasks use one trunk and the parameters are
  `{'shared': trunk, 'heads': {task: head}}`. With `sharing='separate'`, the
  single-task baseline, each task has a separate trunk with different initial
  values, and the parameters are `{'shared': {}, 'heads': {task: {'trunk':
  trunk, 'head': head}}}`.

  The model's state is `{}`, or `{'batch_stats': trunk's}` when the trunk has
  BatchNorm, with one more level of tasks when the trunks are separate. In
  training BatchNorm uses the batch's statistics, and the returned state has
  moved towards them.

  Args:
    trunk: a module called as `trunk(image [B, H, W, C], train=bool)` that
      returns features [B, F], such as one from `by_name`.
    tasks: the tasks; head `i` is a dense layer with `tasks[i].num_outputs`
      outputs and PyTorch's default initialization.
    sharing: `'shared'` or `'separate'`.

  Returns:
    A `types.Model`. `init(key, batch)` uses only the shape of the images.
    `apply(params, model_state, batch, *, train, key=None)` gives predictions
    `{task: [B, num_outputs]}`; `train` is a Python bool. Dropout draws its
    masks from `key`: the same key gives the same masks, for all tasks.

  Raises:
    ValueError: if `sharing` is unknown, task names repeat or there is no task;
      from `apply`, if the trunk draws dropout masks and `key` is None.
    TypeError: from `apply`, if the images are not floating point.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> from mtl_jax import models, types
    >>> tasks = [types.Task(n, 10, None, ()) for n in ('left', 'right')]
    >>> model = models.make_model(models.by_name('lenet'), tasks)
    >>> batch = {'image': jnp.zeros((4, 36, 36, 1))}
    >>> params, state = model.init(jax.random.key(0), batch)
    >>> predictions, state = model.apply(params, state, batch, train=False)
    >>> predictions['left'].shape
    (4, 10)
  """
  names = [task.name for task in tasks]
  if not names or len(set(names)) != len(names):
    raise ValueError(
      f'tasks must have distinct names and be one at least, got {names}'
    )
  makers = {'shared': _shared, 'separate': _separate}
  return registry.get(makers, sharing, 'sharing')(trunk, tuple(tasks))


def _shared(trunk, tasks):
  def init(key, batch):
    trunk_key, head_key = jax.random.split(key)
    params, state, features = _init_trunk(trunk, trunk_key, batch)
    heads = {
      task.name: _init_head(task, jax.random.fold_in(head_key, i), features)
      for i, task in enumerate(tasks)
    }
    return {'shared': params, 'heads': heads}, state

  def features(params, model_state, batch, *, train, key=None):
    return _apply_trunk(
      trunk, params['shared'], model_state, _image(batch), train, key
    )

  def heads(params, found):
    return {
      task.name: _apply_head(task, params['heads'][task.name], found)
      for task in tasks
    }

  def apply(params, model_state, batch, *, train, key=None):
    found, state = features(params, model_state, batch, train=train, key=key)
    return heads(params, found), state

  return types.Model(init, apply, features, heads)


def _separate(trunk, tasks):
  def init(key, batch):
    heads, states = {}, {}
    for i, task in enumerate(tasks):
      trunk_key, head_key = jax.random.split(jax.random.fold_in(key, i))
      params, states[task.name], features = _init_trunk(trunk, trunk_key, batch)
      head = _init_head(task, head_key, features)
      heads[task.name] = {'trunk': params, 'head': head}
    return {'shared': {}, 'heads': heads}, _by_collection(states)

  def apply(params, model_state, batch, *, train, key=None):
    image = _image(batch)
    predictions, states = {}, {}
    for task in tasks:
      mine = params['heads'][task.name]
      features, states[task.name] = _apply_trunk(
        trunk,
        mine['trunk'],
        {name: stats[task.name] for name, stats in model_state.items()},
        image,
        train,
        key,
      )
      predictions[task.name] = _apply_head(task, mine['head'], features)
    return predictions, _by_collection(states)

  return types.Model(init, apply)


def _image(batch):
  image = batch['image']
  if not jnp.issubdtype(image.dtype, jnp.floating):
    raise TypeError(
      "batch['image'] must be floating point, which Problem.preprocess makes"
      f' it, got {image.dtype}'
    )
  return image


def _init_trunk(trunk, key, batch):
  image = jnp.zeros(jnp.shape(batch['image']), jnp.float32)
  features, variables = trunk.init_with_output(key, image, train=False)
  state = dict(variables)
  params = state.pop('params', {})
  return params, state, features


def _apply_trunk(trunk, params, state, image, train, key):
  variables = {'params': params, **state}
  if not train:
    return trunk.apply(variables, image, train=False), state
  rngs = {} if key is None else {'dropout': key}
  try:
    return trunk.apply(
      variables, image, train=True, mutable=list(state), rngs=rngs
    )
  except errors.InvalidRngError as error:
    raise ValueError('a trunk with dropout needs a key to train') from error


def _init_head(task, key, features):
  return _head(task, features).init(key, features)['params']


def _apply_head(task, params, features):
  return _head(task, features).apply({'params': params}, features)


def _head(task, features):
  return layers.dense(task.num_outputs, features.shape[-1])


def _by_collection(states):
  """Turns {task: {collection: tree}} into {collection: {task: tree}}."""
  collections = next(iter(states.values()))
  return {
    name: {task: state[name] for task, state in states.items()}
    for name in collections
  }
