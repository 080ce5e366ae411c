"""Random weights of the task gradients."""

from collections.abc import Hashable

import jax
import jax.numpy as jnp

from mtl_jax.transforms.contract import aggregation
from mtl_jax.transforms.contract import arguments
from mtl_jax.transforms.contract import gram_based


def random_weights(
  *,
  seed: int | jax.Array = 0,
  num_tasks: int | None = None,
  axis_name: Hashable | None = None,
  reduce: str = 'mean',
  shard_axis: Hashable | None = None,
) -> aggregation.Aggregator:
  r"""Random gradient weighting (RGW).

  .. math::
    d = \sum_i w_i g_i, \qquad w = \mathrm{softmax}(z), \quad
    z_i \sim \mathcal{N}(0, 1)

  drawn at every update; the mean gradient in expectation.

  Scale: weights on the simplex. Degree of homogeneity: 1.

  Args:
    seed: an int or a key.
    num_tasks: T, to have weights and Gram matrix in the state.
    axis_name: see `from_gram`.
    reduce: see `from_gram`.
    shard_axis: see `from_gram`.

  Returns:
    An aggregator with a random state.

  Raises:
    TypeError: for a seed that is neither an integer nor a key.

  Examples:
    >>> import jax.numpy as jnp, mtl_jax
    >>> task_grads = jnp.array([[1.0, 2.0], [3.0, 2.0]])
    >>> tx = mtl_jax.random_weights()
    >>> updates, _ = tx.update(task_grads, tx.init(jnp.zeros(2)))
    >>> print(bool(1 < updates[0] < 3), updates[1])
    True 2.0

  References:
    Lin et al., `Reasonable Effectiveness of Random Weighting: A Litmus Test for
    Multi-Task Learning <https://arxiv.org/abs/2111.10603>`_, 2022
  """
  arguments.check_seed(seed)

  def weights_fn(gram, *, losses, active, key):
    del losses
    # The first active task has the first draw, and so on: absent tasks change
    # nothing for the others.
    place = jnp.maximum(jnp.cumsum(active) - 1, 0)
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(place)
    draws = jax.vmap(lambda k: jax.random.normal(k, dtype=gram.dtype))(keys)
    return jax.nn.softmax(draws, where=active)

  return gram_based.from_gram(
    weights_fn,
    num_tasks=num_tasks,
    seed=seed,
    axis_name=axis_name,
    reduce=reduce,
    shard_axis=shard_axis,
    residual=False,
  )
