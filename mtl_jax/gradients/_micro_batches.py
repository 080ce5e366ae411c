"""Task gradients of a batch, computed from one slice at a time.

They are averaged by label counts before a method combines them. This order is
necessary because methods are not linear in the gradients.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax.gradients import slices
from mtl_jax.transforms.contract import algebra
from mtl_jax.transforms.contract import labels


def accumulated(
  fn: Callable[..., Any],
  names: tuple[str, ...],
  param_labels: labels.ParamLabels,
  number: int,
  weigh: bool = True,
) -> Callable[..., Any]:
  """Turns a function of a batch into one that takes a slice at a time.

  Args:
    fn: `(params, batch, *args) -> (losses [T], aux, task_grads)`.
    names: the tasks.
    param_labels: see `mtl_jax.shared_only`.
    number: the number of slices.
    weigh: see `slices.shares`.

  Returns:
    The same function: losses and task gradients are sums weighted by the shares
    of labels, leaves of aux have a leading axis [number].
  """

  def run(params, batch, *args):
    partition = labels.Partition(param_labels, params, names)
    pieces = slices.cut(batch, number)
    shares = slices.shares(pieces, names, weigh)

    def scaled(share, leaf, label, owner):
      if label == labels.FROZEN:
        return ()  # Zero, and perhaps nothing that can be added up.
      share = algebra.row(share, leaf) if owner is None else share[owner]
      # The loss of a task without labels in this slice may be anything.
      wide = leaf.astype(algebra.wide(leaf.dtype))
      return jnp.where(share > 0, share * wide, 0)

    def one(piece, share):
      losses, aux, grads = fn(params, piece, *args)
      leaves = [
        scaled(share, *leaf)
        for leaf in zip(
          partition.leaves(grads),
          partition.labels,
          partition.owners,
          strict=True,
        )
      ]
      return (jnp.where(share > 0, share * losses, 0), leaves), aux

    def step(total, piece_and_share):
      more, aux = one(*piece_and_share)
      return jax.tree.map(jnp.add, total, more), aux

    first = jax.tree.map(lambda x: x[0], (pieces, shares))
    start = jax.tree.map(jnp.zeros_like, jax.eval_shape(one, *first)[0])
    (losses, leaves), aux = jax.lax.scan(step, start, (pieces, shares))
    # Sums of many numbers in half precision would lose the last ones.
    grads = partition.tree(
      [
        jnp.zeros_like(p) if isinstance(x, tuple) else x.astype(p.dtype)
        for x, p in zip(leaves, partition.leaves(params), strict=True)
      ]
    )
    return losses, aux, grads

  return run
