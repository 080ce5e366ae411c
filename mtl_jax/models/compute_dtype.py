"""A model whose passes run in another dtype than its parameters."""

import jax
import jax.numpy as jnp

from mtl_jax import types


def in_dtype(model: types.Model, dtype: str) -> types.Model:
  """The model with its forward and backward passes in `dtype`.

  Parameters and images are cast on the way in, predictions are cast back on the
  way out. So parameters, what gradients they get, predictions, losses and the
  model's state (BatchNorm computes its statistics in float32 whatever comes)
  keep their dtypes, and with them all that is made of them: norms, Gram
  matrices, solvers, the optimizer. With `'float32'` it is the model itself.

  What of a flat gradient is rounding of `dtype` is not told from the rest:
  `flat_minima` knows the gradients' dtype alone. The radius has to be large
  enough.

  Args:
    model: a model of float32 parameters.
    dtype: name of a floating-point dtype, such as `'bfloat16'`.

  Returns:
    The model; its `init` is that of `model`.

  Raises:
    ValueError: if `dtype` is no floating-point dtype.

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
    """`apply` or `features`; what it returns keeps its dtype."""

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
