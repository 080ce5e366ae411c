"""Blocks that recompute their inner values instead of keeping them."""

from typing import Any

from flax import linen as nn

_CHOICES = ('none', 'blocks')


def of_block(block: Any, remat: str) -> Any:
  """Wraps a block in `jax.checkpoint` if `remat` is `'blocks'`.

  The forward pass then keeps only the input of each block, and the backward
  pass computes the rest again. Parameters and numbers do not change. With T
  tasks the pull-backs of `mtl_jax.task_grad` at common parameters share one
  forward pass, but each computes the blocks again. This adds T forward passes,
  and one for each task that is evaluated at its own parameters.

  On CPUs XLA's compiler merges both computations and keeps the values after
  all, so nothing is saved there.

  Args:
    block: a class of modules called as `block(x, train)`, or a function
      called as `block(module, x, train)`; `train` is a Python bool.
    remat: `'none'` or `'blocks'`.

  Returns:
    The class or function; parameter names do not change.

  Raises:
    ValueError: if `remat` is neither.
  """
  if remat not in _CHOICES:
    raise ValueError(f'remat must be one of {_CHOICES}, got {remat!r}')
  if remat == 'none':
    return block
  # Number 0 is the module, 2 is `train`.
  return nn.remat(block, static_argnums=(2,))
