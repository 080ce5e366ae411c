"""Interception of a flax model's dense layers by a function of the caller."""

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
from typing import Any

from flax import linen as nn
import jax


@contextlib.contextmanager
def intercept_dense(
  multiply: Callable[[jax.Array, jax.Array], jax.Array], params: Any
) -> Iterator[None]:
  """Context in which flax's dense layers multiply by `multiply`.

  This applies only to `nn.Dense` with its usual product. Subclasses, and layers
  with their own `dot_general`, `precision` or `promote_dtype`, do not change.

  Args:
    multiply: `(x [..., in], kernel [in, out]) -> [..., out]`, such as the one
      that `mtl_jax.ghost_update` passes to a loss function.
    params: a tree; a layer is intercepted if its kernel is one of the tree's
      leaves, the same object. A kernel that the model computes from its
      parameters (by a cast, or in blocks of `remat`) is a different object.

  Yields:
    Nothing.

  Raises:
    ValueError: at the end, if no such layer was called.

  Examples:
    >>> from flax import linen as nn
    >>> import jax, jax.numpy as jnp
    >>> from mtl_jax import models
    >>> model, x = nn.Dense(3), jnp.ones((1, 2))
    >>> params = model.init(jax.random.key(0), x)
    >>> with models.intercept_dense(lambda x, w: 0 * (x @ w) + 20, params):
    ...   print(model.apply(params, x))
    [[20. 20. 20.]]
  """
  kernels = jax.tree.leaves(params)
  called = []

  def call(next_call, args, keywords, context):
    module = context.module
    if context.method_name != '__call__' or not _is_usual_dense(module):
      return next_call(*args, **keywords)
    own = module.variables.get('params', {})
    if not any(own.get('kernel') is leaf for leaf in kernels):
      return next_call(*args, **keywords)
    called.append(module.name)
    (x,) = (*args, *keywords.values())
    kernel, bias = own['kernel'], own.get('bias')
    x, _, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=module.dtype)
    y = multiply(x, kernel)
    return y if bias is None else y + bias.reshape((1,) * (y.ndim - 1) + (-1,))

  with nn.intercept_methods(call):
    yield
  if not called:
    raise ValueError(
      'params must hold kernels of dense layers as the model uses them; of '
      f'{len(kernels)} leaves no layer that was called uses one'
    )


def _is_usual_dense(module):
  usual = nn.Dense(1, parent=None)
  names = 'precision', 'dot_general', 'dot_general_cls', 'promote_dtype'
  return type(module) is nn.Dense and all(
    getattr(module, name) is getattr(usual, name) for name in names
  )
