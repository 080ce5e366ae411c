"""Multi-task learning as a bargaining game."""

from collections.abc import Hashable

from mtl_jax.transforms.contract import aggregation
from mtl_jax.transforms.contract import arguments
from mtl_jax.transforms.contract import gram_based
from mtl_jax.transforms.solvers import fair


def nash_mtl(
  scale: str = 'norm',
  *,
  num_tasks: int | None = None,
  axis_name: Hashable | None = None,
  reduce: str = 'mean',
  shard_axis: Hashable | None = None,
) -> aggregation.Aggregator:
  r"""Nash bargaining over the direction of the update (Nash-MTL).

  The direction on which the tasks agree, in a ball around zero, maximises the
  sum of the logarithms of their gains :math:`\langle g_i, d \rangle`. With the
  Gram matrix G it is

  .. math:: d = \sum_i a_i g_i, \qquad (G a)_i = 1 / a_i

  Scale: a sum; for equal task gradients the update is their sum. Degree of
  homogeneity: 1, because G is divided by its Frobenius norm. This division is
  an addition here. `scale='paper'` solves for G itself, as the paper does: the
  degree is 0 and the update has the length :math:`\sqrt{T}` for any gradients.
  The authors' code does the same, because the norm by which it divides G
  appears again in its constraints. The direction is the same for both scales
  and does not depend on the lengths of the gradients. A task with a zero
  gradient has no influence. If zero is in the convex hull of the gradients,
  there is no agreement: the update is then an arbitrary finite one, and the
  residual is large.

  The authors' code weighs the losses, which scales heads by the weights
  (`shared_only(..., head_scale='weights')`). It then clips the gradient of the
  shared parameters at the norm 1, which always acts because :math:`\sqrt{T}` is
  longer, and it can keep the weights for some steps (`every`).

  Args:
    scale: `'norm'`, or `'paper'` for the undivided Gram matrix. Do not use a
      method of degree 0 in `flat_minima`.
    num_tasks: T, to have weights, Gram matrix and residual in the state.
    axis_name: see `from_gram`.
    reduce: see `from_gram`.
    shard_axis: see `from_gram`.

  Returns:
    An aggregator.

  Raises:
    ValueError: for another scale.

  Examples:
    Perpendicular gradients have equal parts; the norm of G is 5 here.

    >>> import jax.numpy as jnp, mtl_jax
    >>> task_grads = jnp.array([[3.0**0.5, 0.0], [0.0, 2.0]])
    >>> tx = mtl_jax.nash_mtl()
    >>> jnp.set_printoptions(precision=3)
    >>> print(tx.update(task_grads, tx.init(jnp.zeros(2)))[0] / 5**0.5)
    [1. 1.]
    >>> tx = mtl_jax.nash_mtl(scale='paper')
    >>> print(tx.update(task_grads, tx.init(jnp.zeros(2)))[0])
    [1. 1.]

  References:
    Navon et al., `Multi-Task Learning as a Bargaining Game
    <https://arxiv.org/abs/2202.01017>`_, 2022, Claim 3.1
  """
  arguments.one_of('scale', scale, fair.SCALES)

  def weights_fn(gram, *, losses, active):
    del losses
    return fair.alpha_fair(gram, active, 1.0, scale)

  return gram_based.from_gram(
    weights_fn,
    num_tasks=num_tasks,
    axis_name=axis_name,
    reduce=reduce,
    shard_axis=shard_axis,
    residual=True,
  )
