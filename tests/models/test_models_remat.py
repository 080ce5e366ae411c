"""Blocks computed again give the same numbers and keep less."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtl_jax
from mtl_jax import losses
from mtl_jax import models
from mtl_jax import types

_TASKS = tuple(
  types.Task(name, 3, losses.cross_entropy, ()) for name in ('a', 'b')
)
_NAMES = [task.name for task in _TASKS]
_TRUNKS = {
  'mlp': (models.MLP, {'widths': (8, 8), 'dropout': 0.5}),
  'resnet': (models.ResNet, {'widths': (4,), 'blocks': (2,)}),
  'vit': (
    models.ViT,
    {'patch_size': 6, 'width': 8, 'blocks': 2, 'heads': 2, 'hidden': 8},
  ),
}

# Values of an example between blocks.
_LEAVING = {'mlp': 8, 'resnet': 3 * 3 * 4, 'vit': 4 * 8}


def _batch(size):
  rng = np.random.default_rng(0)
  return {
    'image': rng.random((size, 12, 12, 1), np.float32),
    'labels': {task: rng.integers(0, 3, size) for task in _NAMES},
  }


def _setup(name, remat):
  """A model, and its losses as `(params, state, batch) -> losses, state`."""
  make, kwargs = _TRUNKS[name]
  model = models.make_model(make(**kwargs, remat=remat), _TASKS)

  def loss_fn(params, state, batch):
    predictions, after = model.apply(
      params, state, batch, train=True, key=jax.random.key(1)
    )
    return {
      task.name: task.loss(
        predictions[task.name], batch['labels'][task.name]
      ).mean()
      for task in _TASKS
    }, after

  return model, loss_fn


# Dropout and running statistics.
@pytest.mark.parametrize('name', ['mlp', 'resnet'])
def test_same_start_gradients_and_statistics(name):
  batch = _batch(4)

  def evaluate(remat):
    model, loss_fn = _setup(name, remat)
    at = mtl_jax.task_grad(loss_fn, _NAMES, has_aux=True).at

    def run(key):
      params, state = model.init(key, batch)
      return params, at(params, state, batch)

    options = {'xla_backend_optimization_level': 0}
    return jax.jit(run, compiler_options=options)(jax.random.key(0))

  (params, actual), (expected_params, expected) = map(
    evaluate, ('blocks', 'none')
  )
  jax.tree.map(np.testing.assert_array_equal, params, expected_params)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
    actual,
    expected,
  )


@pytest.mark.parametrize('name', _TRUNKS)
def test_forward_pass_keeps_less_and_each_task_computes_each_block_again(name):
  batch = _batch(512)

  def measure(remat):
    """Numbers kept beside parameters, and number of blocks computed again."""
    model, loss_fn = _setup(name, remat)
    params, state = jax.eval_shape(model.init, jax.random.key(0), batch)

    def pull(params, state):
      f = lambda p: loss_fn(p, state, batch)
      return jax.linearize(f, params, has_aux=True)[1]

    at = mtl_jax.task_grad(loss_fn, _NAMES, has_aux=True).at
    size = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    text = jax.jit(at).lower(params, state, batch).as_text()
    return (
      size(jax.eval_shape(pull, params, state)) - size(params),
      text.count('optimization_barrier'),
    )

  (kept, again), (usual, none) = measure('blocks'), measure('none')
  # Each of two blocks keeps several values for one that leaves it.
  assert usual - kept > 2 * 3 * _LEAVING[name] * 512
  assert (again, none) == (2 * 2, 0)


@pytest.mark.parametrize('name', _TRUNKS)
def test_another_word_is_an_error(name):
  make, kwargs = _TRUNKS[name]
  with pytest.raises(ValueError, match=r"remat must be one of .*, got 'all'"):
    jax.eval_shape(
      make(**kwargs, remat='all').init,
      jax.random.key(0),
      jnp.zeros((1, 12, 12, 1)),
    )
