"""Stochastic direction-oriented multi-objective gradient descent."""

from collections.abc import Hashable
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from mtl_jax.transforms.aggregators import _simplex_memory
from mtl_jax.transforms.contract import aggregation
from mtl_jax.transforms.contract import arguments
from mtl_jax.transforms.contract import gram_based
from mtl_jax.transforms.solvers import simplex


def sdmgrad(
  lambda_: float = 0.3,
  *,
  preference: Sequence[float] | None = None,
  sampling: str = 'independent',
  inner_steps: int = 20,
  learning_rate: float = 0.3,
  momentum: float = 0.5,
  scale: str = 'relative',
  rescale: str = 'none',
  num_tasks: int | None = None,
  axis_name: Hashable | None = None,
  reduce: str = 'mean',
  shard_axis: Hashable | None = None,
) -> aggregation.Aggregator:
  r"""Stochastic direction-oriented multi-objective descent (SDMGrad).

  The direction that improves the worst task, held near that of a preference
  :math:`\tilde w`:

  .. math::
    d = \sum_i (w_i + \lambda \tilde w_i) \, g_i, \qquad
    w \approx \arg\min_{w \in \Delta} \tfrac{1}{2}
    \Big|\sum_i (w_i + \lambda \tilde w_i) \, g_i\Big|^2

  The weights are kept from update to update and move by S projected steps with
  momentum, :math:`v \leftarrow m v + M (w + \lambda \tilde w)` and :math:`w
  \leftarrow \Pi_\Delta(w - \eta v)`. Where :math:`M_{ij} = \langle g_i(\xi),
  g_j(\xi') \rangle` comes from two further batches, the steps are unbiased.

  Scale: weights on the simplex plus :math:`\lambda` times the preference, so
  :math:`1 + \lambda` times the mean gradient's. Degree of homogeneity: 1; with
  `scale='paper'` the steps grow with the square of the gradients.

  Args:
    lambda_: :math:`\lambda`, not negative; 0 is a stochastic MGDA, and a large
      one tends to the direction of the preference.
    preference: :math:`\tilde w` [T], non-negative and not all zero, brought to
      the sum 1 over the active tasks; equal if None.
    sampling: `'independent'` (the paper: `extra_grads` holds two further
      stacks, from which the weights are found) or `'single'` (the task
      gradients themselves, as in the authors' code for reinforcement learning).
    inner_steps: S, at least 1.
    learning_rate: :math:`\eta`. The authors' 10 (LibMTL: 5) is too large to
      converge: the weights then jump between corners of the simplex and depend
      on rounding.
    momentum: m, in [0, 1). It restarts at every update, as in the authors'
      code; the paper has none.
    scale: `'relative'` (M is divided by the square of the mean root of its
      diagonal, negative entries counting as zero, as the authors' code does) or
      `'paper'`.
    rescale: `'none'` (paper), or `'1+lambda'`, a divisor of the update in the
      authors' code.
    num_tasks: T; needed at `init`, by hand or from a wrapper.
    axis_name: see `from_gram`.
    reduce: see `from_gram`.
    shard_axis: see `from_gram`.

  Returns:
    An aggregator whose memory is the weights w [T]. With
    `sampling='independent'` its `update` needs `extra_grads`.

  Raises:
    ValueError: for an argument outside its range; at `update` for another
      number of `extra_grads`.

  Examples:
    With a single batch; (0.6, 0.4) is the least-norm point.

    >>> import jax.numpy as jnp, mtl_jax
    >>> task_grads = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
    >>> tx = mtl_jax.sdmgrad(
    ...   sampling='single', rescale='1+lambda', inner_steps=60, num_tasks=2)
    >>> updates, state = tx.update(task_grads, tx.init(jnp.zeros(3)))
    >>> jnp.set_printoptions(precision=3, suppress=True)
    >>> print(abs(updates), state.task_weights)
    [0. 1. 1.] [0.6 0.4]

  References:
    Xiao, Ban and Ji, `Direction-oriented Multi-objective Learning: Simple and
    Provable Stochastic Algorithms <https://arxiv.org/abs/2305.18409>`_, 2023,
    Algorithm 1
  """
  arguments.check_not_negative('lambda_', lambda_)
  preference = arguments.as_preference(preference, num_tasks)
  arguments.one_of('sampling', sampling, ('independent', 'single'))
  arguments.check_count('inner_steps', inner_steps)
  arguments.check_positive('learning_rate', learning_rate)
  arguments.check_that('momentum', momentum, lambda x: 0 <= x < 1, 'in [0, 1)')
  arguments.one_of('scale', scale, ('relative', 'paper'))
  arguments.one_of('rescale', rescale, ('none', '1+lambda'))

  def weights_fn(gram, *, losses, active, memory, cross=None):
    del losses
    inner = gram if cross is None else cross(1, 2)
    if scale == 'relative':
      inner = _simplex_memory.relative(inner, active)
    target = jnp.ones_like(memory)
    if preference is not None:
      arguments.check_length('preference', preference, memory.shape[0])
      target = jnp.asarray(preference, memory.dtype)
    pull = lambda_ * _simplex_memory.share(target, active)

    def step(carry, _):
      w, velocity = carry
      velocity = momentum * velocity + inner @ (w + pull)
      moved = w - learning_rate * velocity
      return (simplex.project_simplex(moved, active), velocity), None

    first = (_simplex_memory.share(memory, active), jnp.zeros_like(memory))
    (w, _), _ = jax.lax.scan(step, first, None, length=inner_steps)
    weights = w + pull
    if rescale == '1+lambda':
      weights = weights / (1 + lambda_)
    return gram_based.Solution(
      weights, memory=_simplex_memory.keep(memory, w, active)
    )

  return gram_based.from_gram(
    weights_fn,
    memory=_simplex_memory.start,
    extra_batches=2 if sampling == 'independent' else 0,
    num_tasks=num_tasks,
    axis_name=axis_name,
    reduce=reduce,
    shard_axis=shard_axis,
    residual=False,
  )
