"""Weights learned together with the parameters."""

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtl_jax.transforms.contract import arguments
from mtl_jax.transforms.contract import loss_weighting
from mtl_jax.transforms.weightings import task_optimizer

# The factor of exp(-s) L in the negative log likelihood.
_LIKELIHOODS = {'gaussian': 0.5, 'softmax': 1.0}


class UncertaintyState(NamedTuple):
  """State of `uncertainty`.

  Attributes:
    log_variances: [T].
    optimizer: its state, one a task.
  """

  log_variances: jax.Array
  optimizer: Any


class ImtlLState(NamedTuple):
  """State of `imtl_l`.

  Attributes:
    log_scales: [T].
    optimizer: its state, one a task.
  """

  log_scales: jax.Array
  optimizer: Any


def _exp(x: jax.Array) -> jax.Array:
  """The exponential, finite for any x.

  A task whose loss stays 0 has no equilibrium: x grows in every update. A
  finite weight times its zero gradient is still zero; an infinite one is not.
  """
  return jnp.exp(jnp.minimum(x, 0.99 * jnp.log(jnp.finfo(x.dtype).max)))


def uncertainty(
  learning_rate: optax.ScalarOrSchedule = 1e-3,
  *,
  optimizer: Callable[..., optax.GradientTransformation] = optax.adam,
  likelihood: str | Sequence[str] = 'gaussian',
  regularizer: str = 'log',
  initial: float = 0.0,
) -> loss_weighting.LossWeighting:
  r"""Uncertainty weighting: learned variances of the tasks.

  With the learned :math:`s_i = \log \sigma_i^2`

  .. math::
    \min \sum_i c_i e^{-s_i} L_i + \tfrac{1}{2} s_i, \qquad w_i = c_i e^{-s_i}

  where :math:`c_i` is 1/2 for a `'gaussian'` likelihood (regression) and 1 for
  a `'softmax'` one (classification). :math:`s_i` takes a step of its own
  optimizer in every update, with the losses of that update.

  Scale: as the equation says; constant losses end at :math:`w_i = 1 / (2 L_i)`.
  Losses should be positive: for others :math:`s_i` falls without end.

  Args:
    learning_rate: of the optimizer, a number or a schedule.
    optimizer: a function from the learning rate to an optax optimizer.
    likelihood: `'gaussian'` or `'softmax'`, one for all tasks or one each. The
      authors' equation has both; public code has 1/2 for all.
    regularizer: `'log'` is :math:`\frac{1}{2} s_i = \log \sigma_i`; `'log1p'`
      is :math:`\log(1 + \sigma_i^2)`, never negative, from Liebel and Körner.
    initial: value of all :math:`s_i` at `init`.

  Returns:
    A `LossWeighting` with an `UncertaintyState`.

  Raises:
    ValueError: for another likelihood or regularizer, a learning rate that is
      not positive or an initial value that is not finite; at `init` for
      another number of tasks.

  Examples:
    >>> import jax.numpy as jnp, mtl_jax, optax
    >>> weighting = mtl_jax.uncertainty(1.0, optimizer=optax.sgd)
    >>> losses, state = jnp.array([1.0, 2.0]), weighting.init(2)
    >>> weights, state = weighting.update(losses, state)
    >>> print(weights, state.log_variances)
    [0.5 0.5] [0.  0.5]

  References:
    Kendall et al., `Multi-Task Learning Using Uncertainty to Weigh Losses for
    Scene Geometry and Semantics <https://arxiv.org/abs/1705.07115>`_, 2018

    Liebel and Körner, `Auxiliary Tasks in Multi-task Learning
    <https://arxiv.org/abs/1805.06334>`_, 2018
  """
  tx = task_optimizer.make(learning_rate, optimizer)
  one = isinstance(likelihood, str)
  if not one and (not isinstance(likelihood, Sequence) or not likelihood):
    raise ValueError(
      f'likelihood must be a name or one a task, got {likelihood!r}'
    )
  names: tuple[Any, ...] = (likelihood,) if one else tuple(likelihood)
  for name in names:
    arguments.one_of('likelihood', name, tuple(_LIKELIHOODS))
  factors = tuple(_LIKELIHOODS[name] for name in names)
  arguments.one_of('regularizer', regularizer, ('log', 'log1p'))
  start = arguments.as_numbers('initial', initial)
  if isinstance(start, tuple):
    raise ValueError(f'initial must be one number, got {initial!r}')

  def init(num_tasks):
    if not one:
      arguments.check_length('likelihood', names, num_tasks)
    log_variances = jnp.full(num_tasks, start, jnp.result_type(float))
    return UncertaintyState(
      log_variances, task_optimizer.init(tx, log_variances)
    )

  def update(losses, state, active):
    s = state.log_variances
    weights = jnp.asarray(factors[0] if one else factors, s.dtype) * _exp(-s)
    pull = 0.5 if regularizer == 'log' else jax.nn.sigmoid(s)
    moved = task_optimizer.step(
      tx, pull - weights * losses, state.optimizer, s, active
    )
    return weights, UncertaintyState(*moved)

  return loss_weighting.loss_weighting(init, update)


def imtl_l(
  learning_rate: optax.ScalarOrSchedule = 1e-3,
  *,
  optimizer: Callable[..., optax.GradientTransformation] = optax.adam,
) -> loss_weighting.LossWeighting:
  r"""Impartial multi-task learning, the loss-weighting part (IMTL-L).

  With learned :math:`s_i`, which start at 0

  .. math:: \min \sum_i e^{s_i} L_i - s_i, \qquad w_i = e^{s_i}

  which is twice `uncertainty` with :math:`-s_i`. :math:`s_i` takes a step of
  its own optimizer in every update, with the losses of that update.

  Scale: as the equation says; constant losses end at :math:`w_i = 1 / L_i`.
  Losses should be positive: for others :math:`s_i` grows without end.

  Args:
    learning_rate: of the optimizer, a number or a schedule.
    optimizer: a function from the learning rate to an optax optimizer.

  Returns:
    A `LossWeighting` with an `ImtlLState`.

  Raises:
    ValueError: for a learning rate that is not positive.

  Examples:
    >>> import jax.numpy as jnp, mtl_jax, optax
    >>> weighting = mtl_jax.imtl_l(1.0, optimizer=optax.sgd)
    >>> losses, state = jnp.array([1.0, 2.0]), weighting.init(2)
    >>> weights, state = weighting.update(losses, state)
    >>> print(weights, state.log_scales)
    [1. 1.] [ 0. -1.]

  References:
    Liu et al., `Towards Impartial Multi-task Learning
    <https://openreview.net/forum?id=IMPnRXEWpvr>`_, 2021
  """
  tx = task_optimizer.make(learning_rate, optimizer)

  def init(num_tasks):
    log_scales = jnp.zeros(num_tasks)
    return ImtlLState(log_scales, task_optimizer.init(tx, log_scales))

  def update(losses, state, active):
    s = state.log_scales
    weights = _exp(s)
    moved = task_optimizer.step(
      tx, weights * losses - 1, state.optimizer, s, active
    )
    return weights, ImtlLState(*moved)

  return loss_weighting.loss_weighting(init, update)
