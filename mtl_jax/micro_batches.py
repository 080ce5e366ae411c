"""Task gradients of a batch from slices of it, one at a time.

They are averaged by label counts before anything is made of them, which is the
only right place: methods are not linear in the gradients.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax import slices as slicing
from mtl_jax.transforms.contract import algebra
from mtl_jax.transforms.contract import labels


def accumulated(
  fns, names, param_labels, slices
) -> tuple[Callable[..., Any], Callable[..., Any]]:
  """The pair `(at, at_each)` over slices of the batch one at a time.

  Args:
    fns: `at` and `at_each` of `mtl_jax.task_grad`, for a whole batch.
    names: the tasks.
    param_labels: see `mtl_jax.shared_only`.
    slices: how many.

  Returns:
    `at` and `at_each` with the same arguments, the batch first of `*args`.
  """

  def run(fn, params, batch, args):
    """`fn` of every slice: weighted sum of its first two results, stacked aux.

    Args:
      fn: `(params, batch, *args) -> (losses, aux, task_grads)`.
    """
    partition = labels.Partition(param_labels, params, names)
    cut = slicing.cut(batch, slices)
    counts = slicing.label_counts(cut, names, slices)
    total = jnp.sum(counts, axis=0, keepdims=True)
    weights = counts / jnp.maximum(total, 1)

    def weigh(weight, grads):
      scaled = [
        g * (algebra.row(weight, g) if label == labels.SHARED else 1.0)
        if owner is None
        else g * weight[owner]
        for g, label, owner in zip(
          partition.leaves(grads),
          partition.labels,
          partition.owners,
          strict=True,
        )
      ]
      return partition.tree(
        [
          x.astype(g.dtype)
          for x, g in zip(scaled, partition.leaves(grads), strict=True)
        ]
      )

    def one(slice_and_weight):
      piece, weight = slice_and_weight
      losses, aux, grads = fn(params, piece, *args)
      return weight * losses, weigh(weight, grads), aux

    def step(total, slice_and_weight):
      losses, grads, aux = one(slice_and_weight)
      return jax.tree.map(jnp.add, total, (losses, grads)), aux

    shapes = jax.eval_shape(one, jax.tree.map(lambda x: x[0], (cut, weights)))
    start = jax.tree.map(jnp.zeros_like, shapes[:2])
    (losses, grads), aux = jax.lax.scan(step, start, (cut, weights))
    return losses, aux, grads

  def at(params, batch, *args):
    def fn(*inputs):
      (losses, aux), grads = fns[0](*inputs)
      return losses, aux, grads

    losses, aux, grads = run(fn, params, batch, args)
    return (losses, aux), grads

  def at_each(task_params, batch, *args):
    def fn(*inputs):
      losses, grads = fns[1](*inputs)
      return losses, None, grads

    losses, _, grads = run(fn, task_params, batch, args)
    return losses, grads

  return at, at_each
