"""Blocks whose inner values are computed again instead of kept."""

from typing import Any

from flax import linen as nn

_CHOICES = ('none', 'blocks')


def of_block(block: Any, remat: str) -> Any:
  """A block with `jax.checkpoint` around it, if `remat` says so.

  The forward pass then keeps the input of each block alone, and the backward
  pass computes the rest again. Parameters and numbers are the same. With T
  tasks the pull-backs of `mtl_jax.task_grad` at common parameters share one
  forward pass, but each computes the blocks again: T forward passes more, and
  one for each task where they are evaluated at parameters of their own.

  XLA's compiler for CPUs finds that both computations are one, and keeps its
  values after all: nothing is saved there.

  Args:
    block: a class of modules called as `block(x, train)`, or a function
      called as `block(module, x, train)`; `train` is a Python bool.
    remat: `'none'` or `'blocks'`.

  Returns:
    The class or function; what it names keeps its name.

  Raises:
    ValueError: if `remat` is neither.
  """
  if remat not in _CHOICES:
    raise ValueError(f'remat must be one of {_CHOICES}, got {remat!r}')
  if remat == 'none':
    return block
  # Number 0 is the module, 2 is `train`.
  return nn.remat(block, static_argnums=(2,))
