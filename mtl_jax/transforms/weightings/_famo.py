"""Fast adaptive multitask optimization."""

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


class FamoState(NamedTuple):
  """State of `famo`.

  Attributes:
    logits: [T].
    optimizer: the optimizer's state, one a task.
    losses: [T], of the last update.
    present: bool [T], the tasks of the last update.
  """

  logits: jax.Array
  optimizer: Any
  losses: jax.Array
  present: jax.Array


def famo(
  gamma: float = 1e-3,
  learning_rate: optax.ScalarOrSchedule = 0.025,
  *,
  min_losses: float | Sequence[float] = 0.0,
  optimizer: Callable[..., optax.GradientTransformation] = optax.adam,
) -> loss_weighting.LossWeighting:
  r"""Fast adaptive multitask optimization (FAMO).

  With :math:`z = \mathrm{softmax}(\xi)` of learned logits :math:`\xi`, which
  start at 0, and lower bounds :math:`b_i` of the losses

  .. math::
    w_i = c\, \frac{z_i}{L_i - b_i}, \qquad
    c = \Big(\sum_j \frac{z_j}{L_j - b_j}\Big)^{-1}

  After the step, with the losses :math:`L'` of the same batch at the new
  parameters, `after_step` moves the logits away from the tasks that gained
  most, along the gradient in :math:`\xi` of

  .. math:: \sum_i z_i \log \frac{L_i - b_i}{L'_i - b_i} + \frac{\gamma}{2}
    |\xi|^2

  The weights keep their initial values if `after_step` is never called.

  Scale: weights sum to 1. Losses must not lie below `min_losses`, otherwise
  the weights are NaN; a task at its bound is solved and counts as absent. A
  task whose old or new loss has no logarithm in `after_step` counts as absent
  there: its logit stays.

  Args:
    gamma: decay of the logits, not negative; inside the optimizer's gradient.
    learning_rate: of the optimizer, a number or a schedule.
    min_losses: lower bound, one for all tasks or one each.
    optimizer: a function from the learning rate to an optax optimizer.

  Returns:
    A `LossWeighting` with a `FamoState` and an `after_step`.

  Raises:
    ValueError: for a negative or non-finite gamma, a learning rate that is not
      positive or bounds that are not finite; at `init` for another number of
      tasks.

  Examples:
    >>> import jax.numpy as jnp, mtl_jax, optax
    >>> weighting = mtl_jax.famo(optimizer=optax.sgd, learning_rate=4.0)
    >>> losses, state = jnp.array([1.0, 2.0]), weighting.init(2)
    >>> weights, state = weighting.update(losses, state)
    >>> jnp.set_printoptions(precision=3)
    >>> print(weights)
    [0.667 0.333]
    >>> e = jnp.e
    >>> state = weighting.after_step(jnp.array([1 / e, 2.0]), state)
    >>> print(state.logits)
    [-1.  1.]

  References:
    Liu et al., `FAMO: Fast Adaptive Multitask Optimization
    <https://arxiv.org/abs/2306.03792>`_, 2023, Algorithm 2
  """
  arguments.check_not_negative('gamma', gamma)
  bounds = arguments.as_numbers('min_losses', min_losses)
  tx = optax.chain(
    optax.add_decayed_weights(gamma),
    task_optimizer.make(learning_rate, optimizer),
  )

  def distance(losses):
    arguments.check_length('min_losses', bounds, losses.shape[0])
    return losses - jnp.asarray(bounds, losses.dtype)

  def init(num_tasks):
    arguments.check_length('min_losses', bounds, num_tasks)
    logits = jnp.zeros(num_tasks)
    return FamoState(
      logits,
      task_optimizer.init(tx, logits),
      losses=jnp.ones(num_tasks),
      present=jnp.zeros(num_tasks, bool),
    )

  def update(losses, state, active):
    above, left = loss_weighting.unsolved(distance(losses), active)
    z = loss_weighting.softmax(state.logits, left)
    shares = jnp.where(left, z / loss_weighting.positive(above), 0)
    total = jnp.sum(shares)
    weights = shares / jnp.where(jnp.any(left), total, 1)
    return weights, state._replace(
      losses=jnp.where(active, losses, state.losses), present=active
    )

  def after_step(new_losses, state, active):
    before = loss_weighting.positive(distance(state.losses))
    after = loss_weighting.positive(distance(new_losses))
    known = active & state.present
    known = known & jnp.isfinite(before) & jnp.isfinite(after)
    gain = jnp.log(jnp.where(known, before, 1))
    gain = gain - jnp.log(jnp.where(known, after, 1))
    z = loss_weighting.softmax(state.logits, known)
    gradients = z * (gain - jnp.sum(z * gain))
    logits, optimizer_state = task_optimizer.step(
      tx, gradients, state.optimizer, state.logits, known
    )
    return state._replace(logits=logits, optimizer=optimizer_state)

  return loss_weighting.loss_weighting(init, update, after_step)
