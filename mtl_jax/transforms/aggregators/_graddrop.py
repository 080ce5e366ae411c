"""Gradient sign dropout."""

from collections.abc import Hashable
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax.transforms.contract import aggregation
from mtl_jax.transforms.contract import algebra
from mtl_jax.transforms.contract import arguments
from mtl_jax.transforms.contract import lifting


def graddrop(
  leak: float | Sequence[float] = 0.0,
  *,
  seed: int | jax.Array = 0,
  num_tasks: int | None = None,
  axis_name: Hashable | None = None,
  reduce: str = 'mean',
  shard_axis: Hashable | None = None,
) -> aggregation.Aggregator:
  r"""Gradient sign dropout (GradDrop).

  Every coordinate draws a sign, and values of the other sign are dropped. The
  positive sign has the probability

  .. math::
    P = \frac{1}{2} \Big(1 + \frac{\sum_i g_i}{\sum_i |g_i|}\Big), \qquad
    d = \sum_i (\ell_i + (1 - \ell_i) M_i) \, g_i

  where :math:`M_i` is 1 where :math:`g_i` has the drawn sign and 0 elsewhere,
  and :math:`\ell_i` is the leak.

  Scale: a sum. Degree of homogeneity: 1. It has no task weights, because they
  differ by coordinate. The paper uses gradients with respect to features; this
  takes any gradients.

  Args:
    leak: the fraction of a dropped value that stays, from 0 to 1; one number or
      one a task [T].
    seed: an int or a key. Leaf k of the gradients draws from
      `jax.random.fold_in(key, k)` with a fresh key at every update; under
      `shard_axis` the shard's index is also folded in.
    num_tasks: T, to have the Gram matrix in the state.
    axis_name: see `from_gram`.
    reduce: see `from_gram`.
    shard_axis: see `from_gram`.

  Returns:
    An aggregator with a random state.

  Raises:
    ValueError: for a leak outside [0, 1] or of another length than the tasks.
    TypeError: for a seed that is neither an integer nor a key.

  Examples:
    >>> import jax.numpy as jnp, mtl_jax
    >>> task_grads = jnp.array([[1.0, -2.0], [3.0, -2.0]])
    >>> tx = mtl_jax.graddrop()
    >>> print(tx.update(task_grads, tx.init(jnp.zeros(2)))[0])
    [ 4. -4.]

  References:
    Chen et al., `Just Pick a Sign: Optimizing Deep Multitask Models with
    Gradient Sign Dropout <https://arxiv.org/abs/2010.06808>`_, 2020,
    Algorithm 1
  """
  arguments.check_seed(seed)
  leaks = arguments.as_numbers('leak', leak)
  if not all(0 <= x <= 1 for x in arguments.known(leaks)):
    raise ValueError(f'leak must be from 0 to 1, got {leak}')
  arguments.check_length('leak', leaks, num_tasks)

  def combine(given: lifting.Given) -> lifting.Combined:
    size = given.active.shape[0]
    arguments.check_length('leak', leaks, size)
    key: Any = given.key
    if given.axes.shard_axis is not None:
      # Shards hold different coordinates.
      key = jax.random.fold_in(key, jax.lax.axis_index(given.axes.shard_axis))

    def of_leaf(number, leaf):
      wide = leaf.astype(algebra.wide(leaf.dtype))
      positive = jnp.sum(jnp.maximum(wide, 0), axis=0)
      negative = jnp.sum(jnp.maximum(-wide, 0), axis=0)
      total = positive + negative
      purity = positive / jnp.where(total > 0, total, 1)
      draws = jax.random.uniform(
        jax.random.fold_in(key, number), purity.shape, wide.dtype
      )
      # Draws lie in [0, 1): a sign that no task has is never drawn.
      same = jnp.where(draws < purity, wide > 0, wide < 0)
      leaked = jnp.broadcast_to(jnp.asarray(leaks, wide.dtype), size)
      kept = jnp.where(same, 1, algebra.row(leaked, leaf))
      return jnp.sum(kept * wide, axis=0).astype(leaf.dtype)

    leaves, structure = jax.tree.flatten(given.task_grads)
    updates = [of_leaf(i, leaf) for i, leaf in enumerate(leaves)]
    return lifting.Combined(jax.tree.unflatten(structure, updates))

  return lifting.lift(
    combine,
    num_tasks=num_tasks,
    seed=seed,
    axes=aggregation.Axes(axis_name, reduce, shard_axis),
    weights='none',
  )
