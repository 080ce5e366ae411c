"""Joint updates from the gradient of a weighted loss: one backward pass."""

from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtl_jax.transforms import BilevelWeighting
from mtl_jax.transforms import LossWeighting
from mtl_jax.transforms.contract import arguments
from mtl_jax.transforms.contract import labels
from mtl_jax.updates import _joint


class WeightedUpdateState(NamedTuple):
  """State of `weighted_update`.

  Attributes:
    weighting: state of the weighting.
    task_weights: [T], weights of the last update; zero for absent tasks.
  """

  weighting: Any
  task_weights: jax.Array

  def diagnostics(self) -> dict[str, jax.Array]:
    """The diagnostics; see `mtl_jax.diagnostics`."""
    return {'task_weights': self.task_weights}


def weighted_update(
  weighting: LossWeighting, task_names: Sequence[str]
) -> _joint.JointUpdate:
  r"""The update of a loss weighting.

  .. math:: d = \nabla_\theta \sum_i w_i(L)\, L_i(\theta)

  One forward and one backward pass for any number of tasks. Micro-batches take
  one more forward pass, because weights need the losses on the whole batch
  before they scale any gradient.

  Args:
    weighting: e.g. `uncertainty()`; see `LossWeighting`.
    task_names: the tasks, in the order of every task axis.

  Returns:
    A joint update with a `WeightedUpdateState`.

  Raises:
    TypeError: for anything but a `LossWeighting`.

  Examples:
    >>> import jax.numpy as jnp, mtl_jax
    >>> names = ('a', 'b')
    >>> losses = mtl_jax.task_losses(
    ...   lambda params, batch: {'a': params**2, 'b': 3 * params}, names)
    >>> joint, params = mtl_jax.weighted_update(mtl_jax.si(), names), 2.0
    >>> found, state = joint.update(
    ...   losses.on(None), jnp.array(params), joint.init(params))
    >>> print(found.grads)  # d/dx [log x^2 + log 3x] = 3 / x
    1.5
  """
  names = labels.check_task_names(task_names)
  if not isinstance(weighting, LossWeighting):
    raise TypeError(f'weighting must be a LossWeighting, got {weighting!r}')
  step = weighting.after_step

  def init(params):
    del params
    state = weighting.init(len(names))
    return WeightedUpdateState(state, jnp.zeros(len(names)))

  def update(losses, params, state):
    weigh = lambda values: weighting.update(
      values, state.weighting, active=losses.active
    )
    found, (weights, weighed), grads = losses.weighted_gradient(weigh, params)
    state = WeightedUpdateState(weighed, weights)
    return _joint.Found(grads, *found), state

  def after_step(new_losses, state, *, active=None):
    moved = step(new_losses, state.weighting, active=active)
    return state._replace(weighting=moved)

  return _joint.JointUpdate(init, update, after_step if step else None)


def bilevel_update(
  weighting: BilevelWeighting,
  task_names: Sequence[str],
  *,
  lookahead: float | jax.Array,
) -> _joint.JointUpdate:
  """The update of a weighting that learns from a look-ahead step.

  One half of the batch is the look-ahead's training batch, the other half its
  validation batch. The whole batch makes the update. A task with labels in only
  one half is not weighed.

  Args:
    weighting: e.g. `auto_lambda()`; see `BilevelWeighting`.
    task_names: the tasks, in the order of every task axis.
    lookahead: learning rate of the look-ahead.

  Returns:
    A joint update, whose state is the weighting's.

  Raises:
    TypeError: for anything but a `BilevelWeighting`.
    ValueError: for a look-ahead that is not positive.

  Examples:
    >>> import jax.numpy as jnp, mtl_jax
    >>> names = ('a', 'b')
    >>> losses = mtl_jax.task_losses(
    ...   lambda w, x: {'a': jnp.mean((w * x - 1) ** 2), 'b': w**2}, names)
    >>> joint = mtl_jax.bilevel_update(mtl_jax.moml(), names, lookahead=0.1)
    >>> w = jnp.array(0.0)
    >>> found, state = joint.update(losses.on(jnp.ones(4)), w, joint.init(w))
    >>> print(found.losses, found.grads)
    [1. 0.] -1.0
  """
  names = labels.check_task_names(task_names)
  if not isinstance(weighting, BilevelWeighting):
    raise TypeError(f'weighting must be a BilevelWeighting, got {weighting!r}')
  if not isinstance(lookahead, jax.Array):
    arguments.check_positive('lookahead', lookahead)

  def update(losses, params, state):
    losses.require(
      'bilevel_update', 'a look-ahead on the global batch', replicas=False
    )
    train, valid = losses.split(2)
    weights, state = weighting.update(
      lambda params, half: half.values(params),
      params,
      train,
      valid,
      state,
      learning_rate=lookahead,
      active=train.active & valid.active,
    )
    weigh = lambda _: (jnp.where(losses.active, weights, 0), None)
    found, _, grads = losses.weighted_gradient(weigh, params)
    return _joint.Found(grads, *found), state

  init = lambda params: weighting.init(len(names), params)
  return _joint.JointUpdate(init, update)
