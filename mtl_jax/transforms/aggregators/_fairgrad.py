"""Alpha-fair multi-task learning."""

from collections.abc import Hashable

from mtl_jax.transforms.contract import aggregation
from mtl_jax.transforms.contract import arguments
from mtl_jax.transforms.contract import gram_based
from mtl_jax.transforms.solvers import fair


def fairgrad(
  alpha: float = 2.0,
  *,
  scale: str = 'norm',
  num_tasks: int | None = None,
  axis_name: Hashable | None = None,
  reduce: str = 'mean',
  shard_axis: Hashable | None = None,
) -> aggregation.Aggregator:
  r"""Alpha-fair shares of the update (FairGrad).

  The direction, in a ball around no update, maximises the sum of the
  alpha-fair utilities :math:`\langle g_i, d \rangle^{1 - \alpha} / (1 -
  \alpha)` of the tasks' gains. With the Gram matrix G it is

  .. math:: d = \sum_i a_i g_i, \qquad (G a)_i = a_i^{-1 / \alpha}

  Small alpha tends to the sum of the task gradients, 1 is `nash_mtl` and large
  alpha tends to the direction along which the worst task gains most.

  Scale: a sum; for equal task gradients the update is their sum. Degree of
  homogeneity: 1, because G is divided by its Frobenius norm. This division is
  an addition here; `scale='paper'` solves for G itself, as the paper and its
  authors' code do, and its degree is :math:`(1 - \alpha) / (1 + \alpha)`. For
  alpha above 1 tasks with short gradients weigh more, and if lengths differ
  much the update is many times longer than any of them. A task with a zero
  gradient has no influence. If zero is in the convex hull of the gradients,
  there is no fair share: the update is then an arbitrary finite one, and the
  residual is large.

  The authors' code multiplies the update of the shared parameters by the number
  of tasks and then clips it at the norm 1; heads keep the gradients of their
  own losses. LibMTL does neither and weighs the losses, heads included.

  Args:
    alpha: the kind of fairness, positive. The authors run 2 in their scripts;
      the default of their code is 1.
    scale: `'norm'`, or `'paper'` for the undivided Gram matrix.
    num_tasks: T, to have weights, Gram matrix and residual in the state.
    axis_name: see `from_gram`.
    reduce: see `from_gram`.
    shard_axis: see `from_gram`.

  Returns:
    An aggregator.

  Raises:
    ValueError: for an alpha that is not positive and finite, or another scale.

  Examples:
    For perpendicular gradients the weights are :math:`|g_i|^{-4/3}`.

    >>> import jax.numpy as jnp, mtl_jax
    >>> task_grads = jnp.array([[1.0, 0.0], [0.0, 8.0]])
    >>> tx = mtl_jax.fairgrad(alpha=2.0, scale='paper')
    >>> jnp.set_printoptions(precision=3)
    >>> print(tx.update(task_grads, tx.init(jnp.zeros(2)))[0])
    [1.  0.5]

  References:
    Ban and Ji, `Fair Resource Allocation in Multi-Task Learning
    <https://arxiv.org/abs/2402.15638>`_, 2024, Algorithm 1
  """
  arguments.check_positive('alpha', alpha)
  arguments.one_of('scale', scale, fair.SCALES)

  def weights_fn(gram, *, losses, active):
    del losses
    return fair.alpha_fair(gram, active, alpha, scale)

  return gram_based.from_gram(
    weights_fn,
    num_tasks=num_tasks,
    axis_name=axis_name,
    reduce=reduce,
    shard_axis=shard_axis,
    residual=True,
  )
