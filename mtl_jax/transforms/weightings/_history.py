"""Weightings from each task's past performance."""

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtl_jax.transforms.contract import arguments
from mtl_jax.transforms.contract import loss_weighting


class DwaState(NamedTuple):
  """State of `dwa`.

  Attributes:
    count: scalar, number of updates in this epoch.
    total: [T], sum of the losses in this epoch.
    seen: [T], number of updates in this epoch with the task.
    mean: [T], mean loss in the last epoch with the task; 0 before there is one.
    rate: [T], quotient of the last two means; 1 before there are two.
  """

  count: jax.Array  # type: ignore[assignment]
  total: jax.Array
  seen: jax.Array
  mean: jax.Array
  rate: jax.Array


class DtpState(NamedTuple):
  """State of `dtp`.

  Attributes:
    kpis: [T], moving averages.
    seen: bool [T], whether there is one yet.
  """

  kpis: jax.Array
  seen: jax.Array


def dwa(
  steps_per_epoch: int, temperature: float = 2.0
) -> loss_weighting.LossWeighting:
  r"""Dynamic weight average (DWA).

  With the mean losses :math:`\bar L_i` of the last two epochs

  .. math::
    w_i = T\, \mathrm{softmax}(r / \tau)_i, \qquad
    r_i = \frac{\bar L_i(t-1)}{\bar L_i(t-2)}

  and :math:`r_i = 1` in the first two epochs.

  Scale: weights sum to the number of tasks. A mean is over the updates with the
  task present and its loss finite; without any, its last two means stay.
  :math:`r_i` is 1 where the earlier mean is 0.

  Args:
    steps_per_epoch: number of updates an epoch has.
    temperature: :math:`\tau`, positive.

  Returns:
    A `LossWeighting` with a `DwaState`.

  Raises:
    ValueError: for a number of steps below 1 or a temperature that is not
      positive.

  Examples:
    >>> import jax.numpy as jnp, mtl_jax
    >>> weighting = mtl_jax.dwa(steps_per_epoch=1)
    >>> state = weighting.init(2)
    >>> jnp.set_printoptions(precision=3)
    >>> for losses in ([1.0, 1.0], [1.0, 3.0], [1.0, 1.0]):
    ...   weights, state = weighting.update(jnp.array(losses), state)
    ...   print(weights)
    [1. 1.]
    [1. 1.]
    [0.538 1.462]

  References:
    Liu et al., `End-to-End Multi-Task Learning with Attention
    <https://arxiv.org/abs/1803.10704>`_, 2019, eq. 7
  """
  arguments.check_count('steps_per_epoch', steps_per_epoch)
  arguments.check_positive('temperature', temperature)

  def init(num_tasks):
    return DwaState(
      count=jnp.zeros((), jnp.int32),
      total=jnp.zeros(num_tasks),
      seen=jnp.zeros(num_tasks, jnp.int32),
      mean=jnp.zeros(num_tasks),
      rate=jnp.ones(num_tasks),
    )

  def update(losses, state, active):
    shares = loss_weighting.softmax(state.rate / temperature, active)
    weights = loss_weighting.number(active) * shares
    counted = active & jnp.isfinite(losses)
    total = state.total + jnp.where(counted, losses, 0)
    seen = state.seen + counted
    count = state.count + 1
    # The epoch's last update makes means of its sums.
    over = count == steps_per_epoch
    known = over & (seen > 0)
    mean = total / jnp.maximum(seen, 1)
    # Without an earlier mean, or with a mean of 0, there is no rate.
    nothing = state.mean == 0
    rate = jnp.where(nothing, 1, mean / jnp.where(nothing, 1, state.mean))
    return weights, DwaState(
      count=jnp.where(over, 0, count),
      total=jnp.where(over, 0, total),
      seen=jnp.where(over, 0, seen),
      mean=jnp.where(known, mean, state.mean),
      rate=jnp.where(known, rate, state.rate),
    )

  return loss_weighting.loss_weighting(init, update)


def dtp(
  gamma: float | Sequence[float] = 1.0,
  alpha: float = 0.1,
  *,
  kpi: Callable[[jax.Array], Any] = lambda losses: jnp.exp(-losses),
) -> loss_weighting.LossWeighting:
  r"""Dynamic task prioritization (DTP): more weight for tasks that do badly.

  With an indicator :math:`\kappa_i \in [0, 1]` of each task's performance
  (KPI), such as its accuracy, and its moving average

  .. math::
    \bar\kappa_i \leftarrow \alpha\, \kappa_i + (1 - \alpha)\, \bar\kappa_i,
    \qquad w_i = -(1 - \bar\kappa_i)^{\gamma_i} \log \bar\kappa_i

  which is the focal loss of :math:`\bar\kappa_i`. The average starts at the
  first indicator.

  Scale: as the equation says; 0 for a perfect task. An indicator outside of
  [0, 1] makes the task's weight NaN and leaves its average.

  Args:
    gamma: focusing parameter, not negative; one for all tasks or one each.
    alpha: share of the new indicator, from above 0 to 1.
    kpi: `losses [T] -> indicators [T]`, for updates that do not get the keyword
      `kpis` [T]. The default is :math:`e^{-L_i}`: for a cross-entropy, the
      geometric mean of the right labels' probabilities.

  Returns:
    A `LossWeighting` with a `DtpState`, whose `update` takes `kpis`.

  Raises:
    ValueError: for a negative or non-finite gamma or another alpha; at `init`
      for another number of tasks; at `update` for kpis of another shape.

  Examples:
    >>> import jax.numpy as jnp, mtl_jax
    >>> weighting = mtl_jax.dtp()
    >>> losses, state = jnp.array([1.0, 2.0]), weighting.init(2)
    >>> jnp.set_printoptions(precision=3)
    >>> weights, state = weighting.update(
    ...   losses, state, kpis=jnp.array([0.5, 1.0]))
    >>> print(weights, state.kpis)
    [0.347 0.   ] [0.5 1. ]

  References:
    Guo et al., `Dynamic Task Prioritization for Multitask Learning
    <https://openaccess.thecvf.com/content_ECCV_2018/html/Michelle_Guo_Focus_on_the_ECCV_2018_paper.html>`_,
    2018
  """
  gammas = arguments.as_numbers('gamma', gamma)
  if any(x < 0 for x in arguments.known(gammas)):
    raise ValueError(f'gamma must not be negative, got {gamma!r}')
  arguments.check_that(
    'alpha', alpha, lambda x: 0 < x <= 1, 'above 0 and at most 1'
  )
  if not callable(kpi):
    raise ValueError(f'kpi must be a function of the losses, got {kpi!r}')

  def init(num_tasks):
    arguments.check_num_tasks(num_tasks)
    arguments.check_length('gamma', gammas, num_tasks)
    return DtpState(jnp.zeros(num_tasks), jnp.zeros(num_tasks, bool))

  def update(losses, state, *, active=None, kpis=None, **unused):
    del unused
    losses, active = loss_weighting.present_losses(losses, active, state)
    now = jnp.asarray(kpi(losses) if kpis is None else kpis)
    if now.shape != losses.shape:
      raise ValueError(f'kpis must have shape {losses.shape}, got {now.shape}')
    now = jax.lax.stop_gradient(now.astype(losses.dtype))
    valid = (now >= 0) & (now <= 1)
    learnt = active & valid
    first = jnp.where(state.seen, state.kpis, now)
    average = alpha * now + (1 - alpha) * first
    kept = jnp.where(learnt, average, state.kpis)
    # The logarithm stays finite for a task with an indicator of 0.
    safe = jnp.maximum(average, jnp.finfo(average.dtype).tiny)
    focus = (1 - average) ** jnp.asarray(gammas, average.dtype)
    weights = jnp.where(valid, focus * jnp.abs(jnp.log(safe)), jnp.nan)
    weights = jnp.where(active, weights, 0)
    return weights, DtpState(kept, state.seen | learnt)

  return loss_weighting.LossWeighting(init, update)
