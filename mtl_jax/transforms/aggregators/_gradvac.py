"""Gradient vaccine."""

from collections.abc import Hashable

import jax
import jax.numpy as jnp

from mtl_jax.transforms.contract import aggregation
from mtl_jax.transforms.contract import arguments
from mtl_jax.transforms.contract import gram_based
from mtl_jax.transforms.solvers import simplex

# Turning a gradient into another's direction takes an infinite multiple of the
# latter; this cosine takes some 70 times its length.
_LARGEST_TARGET = 0.9999
# A sum of gradients that is shorter relative to its terms is rounding and has
# no direction.
_SHORTEST = 1e-3


def gradvac(
  beta: float = 0.01,
  *,
  seed: int | jax.Array = 0,
  num_tasks: int | None = None,
  axis_name: Hashable | None = None,
  reduce: str = 'mean',
  shard_axis: Hashable | None = None,
) -> aggregation.Aggregator:
  r"""Gradient vaccine (GradVac).

  Each task gradient meets the others, one after the other in random order.
  Where its cosine :math:`\phi_{ij}` with :math:`g_j` is below a target, a
  multiple of :math:`g_j` is added that brings the cosine to the target. The
  target is a moving average of the cosines that were met:

  .. math::
    p_i \leftarrow p_i + |p_i| \,
      \frac{\hat\phi_{ij} \sqrt{1 - \phi_{ij}^2}
            - \phi_{ij} \sqrt{1 - \hat\phi_{ij}^2}}
           {|g_j| \sqrt{1 - \hat\phi_{ij}^2}} \, g_j
    \quad \text{if } \phi_{ij} < \hat\phi_{ij}

    \hat\phi_{ij} \leftarrow (1 - \beta) \hat\phi_{ij} + \beta \phi_{ij},
    \qquad d = \sum_i p_i

  The targets begin at 0, so that the first update is PCGrad's.

  Scale: the sum over tasks, as in the paper's Algorithm 1. Degree of
  homogeneity: 1. Pairs with an absent task or a zero gradient do not meet and
  keep their target. A target above 0.9999 counts as 0.9999.

  Args:
    beta: share of the last cosine in the moving average, from 0 to 1.
    seed: an int or a key; the order is drawn for every task at every update.
      With two tasks there is nothing to draw.
    num_tasks: T; needed at `init`, since the state keeps the targets [T, T].
    axis_name: see `from_gram`.
    reduce: see `from_gram`.
    shard_axis: see `from_gram`.

  Returns:
    An aggregator with a random state.

  Raises:
    ValueError: for a beta outside [0, 1].
    TypeError: for a seed that is neither an integer nor a key.

  Examples:
    >>> import jax.numpy as jnp, mtl_jax
    >>> task_grads = jnp.array([[1.0, 0.0], [-1.0, 1.0]])
    >>> tx = mtl_jax.gradvac(beta=0.5, num_tasks=2)
    >>> updates, state = tx.update(task_grads, tx.init(jnp.zeros(2)))
    >>> jnp.set_printoptions(precision=3)
    >>> print(updates, state.memory[0])
    [0.5 1.5] [ 0.    -0.354]

  References:
    Wang et al., `Gradient Vaccine: Investigating and Improving Multi-task
    Optimization in Massively Multilingual Models
    <https://arxiv.org/abs/2010.05874>`_, 2021, Algorithm 1
  """
  arguments.check_that('beta', beta, lambda x: 0 <= x <= 1, 'from 0 to 1')
  arguments.check_seed(seed)

  def weights_fn(gram, *, losses, active, key, memory):
    del losses
    size = gram.shape[0]
    lengths, cos, usable = simplex.cosines(gram, active)

    def vaccinate(task, key, targets):
      order = jax.random.permutation(key, size)

      def meet(k, carry):
        # p_i in units of |g_i|, as coefficients of the unit gradients.
        mix, targets = carry
        other = order[k]
        inner = mix @ cos[other]
        length = jnp.sqrt(jnp.maximum(mix @ cos @ mix, 0))
        meets = (other != task) & usable[other] & usable[task]
        meets = meets & (length > _SHORTEST * jnp.sum(jnp.abs(mix)))
        phi = jnp.clip(inner / jnp.where(meets, length, 1), -1, 1)
        old = targets[other]
        target = jnp.minimum(old, _LARGEST_TARGET)
        sine = lambda x: jnp.sqrt((1 - x) * (1 + x))
        added = length * (target * sine(phi) / sine(target) - phi)
        mix = mix.at[other].add(jnp.where(meets & (phi < target), added, 0))
        new = jnp.where(meets, (1 - beta) * old + beta * phi, old)
        return mix, targets.at[other].set(new)

      alone = jax.nn.one_hot(task, size, dtype=gram.dtype)
      return jax.lax.fori_loop(0, size, meet, (alone, targets))

    keys = jax.random.split(key, size)
    mixes, targets = jax.vmap(vaccinate)(jnp.arange(size), keys, memory)
    mixes = jnp.where(active[:, None], mixes, 0)
    weights = jnp.sum(mixes * (lengths[:, None] / lengths[None, :]), axis=0)
    return gram_based.Solution(weights, memory=targets)

  return gram_based.from_gram(
    weights_fn,
    memory=lambda size, dtype: jnp.zeros((size, size), dtype),
    num_tasks=num_tasks,
    seed=seed,
    axis_name=axis_name,
    reduce=reduce,
    shard_axis=shard_axis,
    residual=False,
  )
