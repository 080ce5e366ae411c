"""Gradient surgery."""

from collections.abc import Hashable

import jax
import jax.numpy as jnp

from mtl_jax.transforms.contract import aggregation
from mtl_jax.transforms.contract import arguments
from mtl_jax.transforms.contract import gram_based


def pcgrad(
  *,
  reduction: str = 'sum',
  seed: int | jax.Array = 0,
  num_tasks: int | None = None,
  axis_name: Hashable | None = None,
  reduce: str = 'mean',
  shard_axis: Hashable | None = None,
) -> aggregation.Aggregator:
  r"""Projecting conflicting gradients (PCGrad).

  Each task gradient is projected, one other task j after the other in random
  order, onto the normal plane of :math:`g_j` wherever it conflicts with it:

  .. math::
    p_i \leftarrow p_i - \frac{\min(\langle p_i, g_j \rangle, 0)}{|g_j|^2} g_j,
    \qquad d = \sum_i p_i

  Scale: the sum over tasks, as in the paper's Algorithm 1; `reduction='mean'`
  divides by their number. Degree of homogeneity: 1.

  Args:
    reduction: `'sum'` or `'mean'` over tasks.
    seed: an int or a key; the order of projections is drawn for every task at
      every update. With two tasks there is nothing to draw.
    num_tasks: T, to have weights and Gram matrix in the state.
    axis_name: see `from_gram`.
    reduce: see `from_gram`.
    shard_axis: see `from_gram`.

  Returns:
    An aggregator with a random state.

  Raises:
    ValueError: for another reduction.
    TypeError: for a seed that is neither an integer nor a key.

  Examples:
    >>> import jax.numpy as jnp, mtl_jax
    >>> task_grads = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
    >>> tx = mtl_jax.pcgrad()
    >>> jnp.set_printoptions(precision=3)
    >>> print(tx.update(task_grads, tx.init(jnp.zeros(3)))[0])
    [0.585 3.801 3.801]

  References:
    Yu et al., `Gradient Surgery for Multi-Task Learning
    <https://arxiv.org/abs/2001.06782>`_, 2020, Algorithm 1
  """
  arguments.one_of('reduction', reduction, ('sum', 'mean'))
  arguments.check_seed(seed)

  def weights_fn(gram, *, losses, active, key):
    del losses
    size = gram.shape[0]
    squares = jnp.diagonal(gram)
    usable = active & (squares > 0)
    divisors = jnp.where(usable, squares, 1)

    def project(task, key):
      order = jax.random.permutation(key, size)

      def against(k, coefficients):
        other = order[k]
        inner = coefficients @ gram[other]
        conflict = (inner < 0) & usable[other] & (other != task)
        moved = jnp.where(conflict, -inner / divisors[other], 0)
        return coefficients.at[other].add(moved)

      return jax.lax.fori_loop(
        0, size, against, jax.nn.one_hot(task, size, dtype=gram.dtype)
      )

    # Row i holds the coefficients of p_i in terms of the task gradients.
    keys = jax.random.split(key, size)
    projected = jax.vmap(project)(jnp.arange(size), keys)
    weights = jnp.sum(jnp.where(active[:, None], projected, 0), axis=0)
    if reduction == 'mean':
      weights = weights / jnp.maximum(jnp.sum(active), 1)
    return weights

  return gram_based.from_gram(
    weights_fn,
    num_tasks=num_tasks,
    seed=seed,
    axis_name=axis_name,
    reduce=reduce,
    shard_axis=shard_axis,
    residual=False,
  )
