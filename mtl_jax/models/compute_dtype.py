"""A model whose passes run in a different dtype than its parameters."""

import jax
import jax.numpy as jnp

from mtl_jax import types


def in_dtype(model: types.Model, dtype: str) -> types.Model:
  """The model with its forward and backward passes in `dtype`.

  Parameters and images are cast on the way in, predictions are cast back on the
  way out. Parameters, gradients, predictions, losses and the model's state
  (BatchNorm always computes its statistics in float32) therefore keep their
  dtypes. So do norms, Gram matrices, solvers and the optimizer. `'float32'`
  returns the model itself.

  `flat_minima` sees only the gradients' dtype, so it cannot detect flat
  gradients that are rounding errors of `dtype`. Choose a radius that `dtype`
  resolves.

  Args:
    model: a model with float32 parameters.
    dtype: name of a floating-point dtype, such as `'bfloat16'`.

  Returns:
    The model; its `init` is `model.init`.

  Raises:
    ValueError: if `dtype` is not a floating-point dtype.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> from mtl_jax import models, types
    >>> model = models.make_model(
    ...   models.by_name('mlp'), [types.Task('a', 10, None, ())])
    >>> half = models.in_dtype(model, 'bfloat16')
    >>> batch = {'image': jnp.zeros((4, 8, 8, 1))}
    >>> params, state = half.init(jax.random.key(0), batch)
    >>> predictions, _ = half.apply(params, state, batch, train=False)
    >>> params['heads']['a']['kernel'].dtype, predictions['a'].dtype
    (dtype('float32'), dtype('float32'))
  """
  wanted = jnp.dtype(dtype)
  if not jnp.issubdtype(wanted, jnp.floating):
    raise ValueError(f'dtype must be a floating-point dtype, got {dtype!r}')
  if wanted == jnp.float32:
    return model

  def lowered(fn):
    """`apply` or `features`; its results keep their dtypes."""

    def run(params, model_state, batch, **options):
      batch = {**batch, 'image': _cast(batch['image'], wanted)}
      return fn(_cast(params, wanted), model_state, batch, **options)

    return run

  def apply(params, model_state, batch, **options):
    predictions, model_state = lowered(model.apply)(
      params, model_state, batch, **options
    )
    return _cast(predictions, jnp.float32), model_state

  def heads(params, features):
    return _cast(model.heads(_cast(params, wanted), features), jnp.float32)

  if model.features is None:
    return types.Model(model.init, apply)
  return types.Model(model.init, apply, lowered(model.features), heads)


def _cast(tree, dtype):
  """The tree with its floating-point leaves in `dtype`."""
  return jax.tree.map(
    lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x,
    tree,
  )
