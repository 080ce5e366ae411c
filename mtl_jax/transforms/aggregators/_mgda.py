"""The multiple-gradient descent algorithm."""

from collections.abc import Hashable

import jax.numpy as jnp

from mtl_jax.transforms.contract import aggregation
from mtl_jax.transforms.contract import arguments
from mtl_jax.transforms.contract import gram_based
from mtl_jax.transforms.solvers import simplex

_NORMALIZATIONS = ('none', 'l2', 'loss', 'loss+')


def mgda(
  normalization: str = 'none',
  *,
  num_tasks: int | None = None,
  axis_name: Hashable | None = None,
  reduce: str = 'mean',
  shard_axis: Hashable | None = None,
) -> aggregation.Aggregator:
  r"""Multiple-gradient descent: the least-norm convex combination.

  .. math::
    d = \sum_i w_i g_i, \qquad
    w = \arg\min_{w \in \Delta} \Big|\sum_i w_i \, g_i / n_i\Big|^2

  Scale: weights on the simplex. Degree of homogeneity: 1. A task whose gradient
  is zero makes the update zero (it is optimal, and any move may harm it); pass
  `active` if it is only absent.

  Args:
    normalization: the divisor :math:`n_i` of each task gradient in the search
      for the weights: `'none'` (1), `'l2'` (:math:`|g_i|`), `'loss'`
      (:math:`L_i`) or `'loss+'` (:math:`L_i |g_i|`). The weights apply to the
      undivided gradients, as in Sener and Koltun's code.
    num_tasks: T, to have weights, Gram matrix and residual in the state.
    axis_name: see `from_gram`.
    reduce: see `from_gram`.
    shard_axis: see `from_gram`.

  Returns:
    An aggregator. With `'loss'` and `'loss+'` its `update` needs `losses` [T].

  Raises:
    ValueError: for another normalization; at `update` without `losses` where
      they are needed.

  Examples:
    >>> import jax.numpy as jnp, mtl_jax
    >>> task_grads = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
    >>> tx = mtl_jax.mgda(num_tasks=2)
    >>> updates, state = tx.update(task_grads, tx.init(jnp.zeros(3)))
    >>> jnp.set_printoptions(precision=3, suppress=True)
    >>> print(updates + 0.0, state.task_weights)
    [0. 1. 1.] [0.6 0.4]

  References:
    Desideri, `Multiple-gradient descent algorithm (MGDA) for multiobjective
    optimization <https://doi.org/10.1016/j.crma.2012.03.014>`_, 2012

    Sener and Koltun, `Multi-Task Learning as Multi-Objective Optimization
    <https://arxiv.org/abs/1810.04650>`_, 2018, eq. 3
  """
  arguments.one_of('normalization', normalization, _NORMALIZATIONS)

  def weights_fn(gram, *, losses, active):
    scale = jnp.ones_like(gram[0])
    if normalization in ('l2', 'loss+'):
      lengths = jnp.sqrt(jnp.diagonal(gram))
      scale = jnp.where(lengths > 0, lengths, 1)
    if normalization in ('loss', 'loss+'):
      if losses is None:
        raise ValueError(
          f'mgda(normalization={normalization!r}) needs losses at update'
        )
      # A loss of zero cannot normalise its task.
      size = jnp.abs(losses).astype(gram.dtype)
      scale = scale * jnp.where(size > 0, size, 1)
    gram = gram / scale[:, None] / scale[None, :]
    return simplex.min_norm(gram, active)

  return gram_based.from_gram(
    weights_fn,
    num_tasks=num_tasks,
    axis_name=axis_name,
    reduce=reduce,
    shard_axis=shard_axis,
    residual=True,
  )
