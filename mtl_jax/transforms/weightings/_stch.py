"""Smooth Tchebycheff scalarization."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtl_jax.transforms.contract import arguments
from mtl_jax.transforms.contract import loss_weighting


class StchState(NamedTuple):
  """State of `stch` with a warm-up.

  Attributes:
    count: scalar, number of updates so far, up to the end of the warm-up.
    total: [T], sum of the losses that make the nadir.
    seen: [T], number of those losses.
  """

  count: jax.Array  # type: ignore[assignment]
  total: jax.Array
  seen: jax.Array


def stch(
  mu: float = 1.0,
  *,
  objectives: str = 'losses',
  preference: Sequence[float] | None = None,
  ideal: float | Sequence[float] | None = None,
  nadir: float | Sequence[float] | None = None,
  warm_up_steps: int = 0,
  nadir_steps: int | None = None,
) -> loss_weighting.LossWeighting:
  r"""Smooth Tchebycheff scalarization (STCH): a smooth largest loss.

  With preferences :math:`\lambda` and an ideal point :math:`b`
  (`objectives='losses'`, the paper's)

  .. math::
    \min \mu \log \sum_i e^{y_i / \mu}, \quad y_i = \lambda_i (L_i - b_i),
    \qquad w_i = \lambda_i\, \mathrm{softmax}(y / \mu)_i

  or, with a nadir point :math:`n` (`objectives='log_losses'`, the authors' code
  for multi-task learning)

  .. math::
    \min T \mu \log \sum_i e^{y_i / \mu}, \quad
    y_i = \lambda_i \log \frac{L_i}{n_i}, \qquad
    w_i = T\, \frac{\lambda_i}{L_i}\, \mathrm{softmax}(y / \mu)_i

  where the nadir is given or is the mean loss over the last `nadir_steps` of
  `warm_up_steps` updates. During the warm-up the method is `si`, and it equals
  `si` at the nadir.

  Scale: as the equations say. With `'log_losses'` losses must not be negative,
  otherwise the weights are NaN; a task whose loss is exactly 0 is solved and
  counts as absent. A task that was absent in all `nadir_steps` takes its first
  loss after them.

  Args:
    mu: smoothing, positive; the smaller it is, the nearer to the largest loss
      alone.
    objectives: `'losses'` or `'log_losses'`.
    preference: [T], non-negative and not all zero; None is 1 / T (of the
      active tasks) for `'losses'` and 1 for `'log_losses'`.
    ideal: lower bound of the losses, one for all or one each, for `'losses'`;
      None is 0.
    nadir: positive, one for all or one each, for `'log_losses'`.
    warm_up_steps: number of updates in which to find the nadir, instead of
      `nadir`. The authors use five epochs.
    nadir_steps: number of last warm-up updates that make the mean; None for
      all. The authors use one epoch.

  Returns:
    A `LossWeighting`, with a `StchState` if there is a warm-up and without
    state otherwise.

  Raises:
    ValueError: for a wrong number or name, for `'log_losses'` without nadir or
      warm-up or with both, and for arguments of the other objectives; at `init`
      and `update` for another number of tasks.

  Examples:
    >>> import jax.numpy as jnp, mtl_jax
    >>> weighting = mtl_jax.stch(objectives='log_losses', nadir=1.0)
    >>> losses, state = jnp.array([1.0, 3.0]), weighting.init(2)
    >>> print(weighting.update(losses, state)[0])  # 2 (1/4, 3/4) / (1, 3)
    [0.5 0.5]

  References:
    Lin et al., `Smooth Tchebycheff Scalarization for Multi-Objective
    Optimization <https://arxiv.org/abs/2402.19078>`_, 2024
  """
  arguments.check_positive('mu', mu)
  arguments.one_of('objectives', objectives, ('losses', 'log_losses'))
  arguments.check_count('warm_up_steps', warm_up_steps, least=0)
  if objectives == 'losses':
    if nadir is not None or warm_up_steps or nadir_steps is not None:
      raise ValueError(
        "objectives='losses' takes an ideal point and no nadir: got "
        f'nadir={nadir!r}, warm_up_steps={warm_up_steps}, '
        f'nadir_steps={nadir_steps}'
      )
  elif ideal is not None:
    raise ValueError(f"objectives='log_losses' takes no ideal, got {ideal!r}")
  elif (nadir is None) == (warm_up_steps == 0):
    raise ValueError(
      "objectives='log_losses' needs either nadir or warm_up_steps, got "
      f'nadir={nadir!r} and warm_up_steps={warm_up_steps}'
    )
  if nadir_steps is not None:
    arguments.check_count('nadir_steps', nadir_steps)
    if nadir_steps > warm_up_steps:
      raise ValueError(
        f'nadir_steps must be at most warm_up_steps={warm_up_steps}, got '
        f'{nadir_steps}'
      )
  preference = arguments.as_preference(preference)
  lowest = arguments.as_numbers('ideal', 0.0 if ideal is None else ideal)
  highest = arguments.as_numbers('nadir', 1.0 if nadir is None else nadir)
  if any(x <= 0 for x in arguments.known(highest)):
    raise ValueError(f'nadir must be positive, got {nadir!r}')
  window = warm_up_steps if nadir_steps is None else nadir_steps
  per_task = (
    ('preference', preference),
    ('ideal', lowest),
    ('nadir', highest),
  )

  def shares(y, active):
    # Scaled after subtraction of the largest: for a small mu only the
    # difference must not overflow.
    largest = jnp.max(jnp.where(active, y, -jnp.inf))
    return loss_weighting.softmax((y - largest) / mu, active)

  def of_losses(losses, active):
    preferred = 1 / loss_weighting.number(active)
    if preference is not None:
      preferred = jnp.asarray(preference, losses.dtype)
    y = preferred * (losses - jnp.asarray(lowest, losses.dtype))
    return preferred * shares(y, active)

  def of_logarithms(losses, active, highest):
    preferred = jnp.asarray(
      1.0 if preference is None else preference, losses.dtype
    )
    losses, left = loss_weighting.unsolved(losses, active)
    losses = loss_weighting.positive(losses)
    y = preferred * (jnp.log(losses) - jnp.log(highest))
    number = loss_weighting.number(left)
    return number * preferred * shares(y, left) / losses

  def init(num_tasks):
    for argument, values in per_task:
      arguments.check_length(argument, values, num_tasks)
    return StchState(
      count=jnp.zeros((), jnp.int32),
      total=jnp.zeros(num_tasks),
      seen=jnp.zeros(num_tasks, jnp.int32),
    )

  def update(losses, state, active):
    warming = state.count < warm_up_steps
    counted = active & jnp.isfinite(loss_weighting.positive(losses))
    in_window = warming & (state.count >= warm_up_steps - window)
    counted = counted & (in_window | (~warming & (state.seen == 0)))
    total = state.total + jnp.where(counted, losses, 0)
    seen = state.seen + counted
    found = jnp.where(seen > 0, total / jnp.maximum(seen, 1), 1)
    above, left = loss_weighting.unsolved(losses, active)
    weights = jnp.where(
      warming,
      jnp.where(left, 1 / loss_weighting.positive(above), 0),
      of_logarithms(losses, active, found),
    )
    count = jnp.minimum(state.count + 1, warm_up_steps)
    return weights, StchState(count, total, seen)

  if warm_up_steps:
    return loss_weighting.loss_weighting(init, update)
  if objectives == 'losses':
    return loss_weighting.stateless(of_losses, *per_task)
  return loss_weighting.stateless(
    lambda losses, active: of_logarithms(
      losses, active, jnp.asarray(highest, losses.dtype)
    ),
    *per_task,
  )
