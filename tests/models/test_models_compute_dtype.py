"""In bfloat16 the model's passes are, and nothing else is."""

import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtl_jax
from mtl_jax import losses
from mtl_jax import models
from mtl_jax import types
from mtl_jax.train import objective as objectives
from mtl_jax.train import step as steps

# Compiled for a single use.
_jit = functools.partial(
  jax.jit, compiler_options={'xla_backend_optimization_level': 0}
)
_TASKS = tuple(
  types.Task(name, 3, losses.cross_entropy, ()) for name in ('a', 'b')
)
_PROBLEM = types.Problem(
  'small', _TASKS, (24, 24, 1), load=lambda split: split, preprocess=dict
)
_NAMES = _PROBLEM.task_names
_BFLOAT16, _FLOAT32 = jnp.dtype('bfloat16'), jnp.dtype('float32')


@functools.cache
def _setup():
  trunk = models.ResNet(widths=(8,), blocks=(1,), features=6)
  model = models.make_model(trunk, _TASKS)
  rng = np.random.default_rng(0)
  batch = {
    'image': rng.random((16, 24, 24, 1), np.float32),
    'labels': {task: rng.integers(0, 3, 16) for task in _NAMES},
    'mask': {task: np.ones(16, np.float32) for task in _NAMES},
  }
  params, state = _jit(model.init)(jax.random.key(0), batch)
  return model, params, state, batch


def _equations(jaxpr):
  """All equations of a jaxpr, those inside of others too."""
  for equation in jaxpr.eqns:
    yield equation
    for inner in jax.extend.core.jaxprs_in_params(equation.params):
      yield from _equations(inner)


def _dtypes(jaxpr, *names, of='outvars'):
  """Dtypes of the results, or operands, of equations of these names."""
  return {
    value.aval.dtype
    for equation in _equations(jaxpr)
    if equation.primitive.name in names
    for value in getattr(equation, of)
  }


def test_products_of_the_model_are_bfloat16_and_what_comes_out_is_float32():
  model, params, state, batch = _setup()
  half = models.in_dtype(model, 'bfloat16')
  for train in (False, True):
    jaxpr, (predictions, after) = jax.make_jaxpr(
      lambda *args, train=train: half.apply(*args, train=train),
      return_shape=True,
    )(params, state, batch)
    products = ('dot_general', 'conv_general_dilated')
    # Their results may be wider, to be added up.
    assert _dtypes(jaxpr.jaxpr, *products, of='invars') == {_BFLOAT16}
    # The statistics of BatchNorm.
    assert _dtypes(jaxpr.jaxpr, 'rsqrt') == {_FLOAT32}
    leaves = jax.tree.leaves((predictions, after))
    assert {leaf.dtype for leaf in leaves} == {_FLOAT32}


def test_the_rest_of_a_step_is_float32():
  model, *_, batch = _setup()
  joint = mtl_jax.stack_update(
    mtl_jax.flat_minima(mtl_jax.nash_mtl(num_tasks=2), _NAMES, 0.1)
  )
  tx = optax.adam(1e-3)
  half = models.in_dtype(model, 'bfloat16')
  task_losses = mtl_jax.task_losses(
    objectives.objective(_PROBLEM, half), _NAMES
  )
  step = steps.make_train_step(_PROBLEM, task_losses, joint, tx)
  state = jax.eval_shape(
    lambda: steps.init_state(_PROBLEM, half, joint, tx, seed=0, batch=batch)
  )
  jaxpr, (after, metrics) = jax.make_jaxpr(step, return_shape=True)(
    state, batch
  )
  dtypes = jax.tree.map(lambda x: x.dtype, state)
  assert jax.tree.map(lambda x: x.dtype, after) == dtypes
  assert _BFLOAT16 not in jax.tree.leaves(dtypes)
  assert {x.dtype for x in metrics.values()} == {_FLOAT32}
  # Losses, norms and solvers.
  found = _dtypes(jaxpr.jaxpr, 'exp', 'log', 'sqrt', 'div', 'scan', 'while')
  assert _FLOAT32 in found
  assert _BFLOAT16 not in found
  grams = {
    equation.outvars[0].aval.dtype
    for equation in _equations(jaxpr.jaxpr)
    if equation.primitive.name == 'dot_general'
    and equation.outvars[0].aval.shape == (2, 2)
  }
  assert grams == {_FLOAT32}


def test_gradients_and_statistics_are_close_to_those_of_float32():
  model, params, state, batch = _setup()

  def evaluate(model):
    def loss_fn(params, batch):
      predictions, after = model.apply(params, state, batch, train=True)
      return objectives.task_losses(_PROBLEM, predictions, batch), after

    at, _ = mtl_jax.task_grad(loss_fn, _NAMES, has_aux=True)
    return _jit(at)(params, batch)

  (_, expected_state), expected = evaluate(model)
  (_, actual_state), actual = evaluate(models.in_dtype(model, 'bfloat16'))
  assert {x.dtype for x in jax.tree.leaves(actual)} == {_FLOAT32}
  a, b = (
    np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])
    for tree in (actual, expected)
  )
  cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
  assert 0.99 < cosine < 1 - 1e-6
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=0.02, atol=0.005),
    actual_state,
    expected_state,
  )


def test_float32_is_the_model_itself_and_no_other_kind_is_taken():
  model, *_ = _setup()
  assert models.in_dtype(model, 'float32') is model
  with pytest.raises(ValueError, match=r"dtype must be .*, got 'int8'"):
    models.in_dtype(model, 'int8')
