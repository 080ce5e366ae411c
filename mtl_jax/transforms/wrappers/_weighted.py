"""Loss weightings as aggregators."""

from collections.abc import Hashable
from typing import Any
from typing import NamedTuple

import jax

from mtl_jax.transforms.contract import aggregation
from mtl_jax.transforms.contract import algebra
from mtl_jax.transforms.contract import lifting
from mtl_jax.transforms.contract import loss_weighting
from mtl_jax.transforms.contract import variables


class WeightedMemory(NamedTuple):
  """The memory of an aggregator made by `weighted`.

  Attributes:
    weighting: state of the `LossWeighting`.
  """

  weighting: Any


def weighted(
  weighting: loss_weighting.LossWeighting,
  *,
  num_tasks: int | None = None,
  axis_name: Hashable | None = None,
  reduce: str = 'mean',
  shard_axis: Hashable | None = None,
) -> aggregation.Aggregator:
  r"""A weighting of losses as an aggregator of task gradients.

  .. math:: d = \sum_i w_i(L)\, g_i

  It costs one backward pass a task. A training step that takes the weighting
  directly costs one backward pass in all.

  Scale: the weighting's. Degree of homogeneity: 1.

  Args:
    weighting: e.g. `uncertainty()` or `gls()`.
    num_tasks: T; needed, here or from a wrapper that knows the tasks.
    axis_name: see `from_gram`; losses are averaged first too.
    reduce: see `from_gram`.
    shard_axis: see `from_gram`.

  Returns:
    An aggregator whose `update` needs `losses` [T] and passes further arguments
    to the weighting. `shared_only` also multiplies heads by the task's weight,
    because these are weights for losses.

  Raises:
    TypeError: for anything but a `LossWeighting`.
    ValueError: at `init` without `num_tasks`; at `update` without `losses`.

  Examples:
    >>> import jax.numpy as jnp, mtl_jax
    >>> tx = mtl_jax.weighted(mtl_jax.si(), num_tasks=2)
    >>> task_grads = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
    >>> updates, _ = tx.update(
    ...   task_grads, tx.init(jnp.zeros(3)), losses=jnp.array([1.0, 2.0]))
    >>> print(updates)
    [-1.   1.5  1.5]
  """
  if not isinstance(weighting, loss_weighting.LossWeighting):
    raise TypeError(f'weighting must be a LossWeighting, got {weighting!r}')

  def lifted(size, extra_args):
    def combine(given: lifting.Given) -> lifting.Combined:
      if given.losses is None:
        raise ValueError('weighted needs losses at update')
      weights, state = loss_weighting.call_update(
        weighting,
        given.losses,
        given.memory.weighting,
        given.active,
        extra_args,
      )
      weights = weights.astype(given.gram.dtype)
      inner = given.gram @ weights
      return lifting.Combined(
        algebra.weighted_sum(weights, given.unmasked, given.active),
        weights=weights,
        memory=WeightedMemory(state),
        update_inner=(inner, weights @ inner),
      )

    return lifting.lift(
      combine,
      memory=lambda size, *unused: WeightedMemory(weighting.init(size)),
      num_tasks=size,
      axes=aggregation.Axes(axis_name, reduce, shard_axis),
      head_scale='weights',
      gram_only=True,
      after_step=moved if weighting.after_step else None,
    )

  def moved(new_losses, state, *, active=None):
    weighting_state = weighting.after_step(
      new_losses, state.memory.weighting, active=active
    )
    return state._replace(memory=WeightedMemory(weighting_state))

  def sized(size):
    plain = lifted(size, {})

    def aggregate(
      task_grads, state, params=None, *, losses=None, active=None, **extra_args
    ):
      return lifted(size, extra_args).aggregate(
        task_grads, state, params, losses=losses, active=active
      )

    def for_tasks(tasks):
      if size not in (None, tasks):
        raise ValueError(f'num_tasks is {size}, but there are {tasks} tasks')
      return sized(tasks)

    return aggregation.Aggregator(
      plain.init,
      aggregate,
      axes=plain.axes,
      head_scale='weights',
      weights='gradients',
      for_tasks=for_tasks,
      weigh=plain.weigh,
      after_step=plain.after_step,
    )

  return sized(num_tasks)


def after_step(
  weighting: loss_weighting.LossWeighting,
  new_losses: jax.Array,
  opt_state: Any,
  active: Any = None,
) -> Any:
  """Passes the losses after the step to a weighting inside an optimizer.

  Args:
    weighting: the one passed to `weighted`.
    new_losses: [T], for the same batch at the new parameters; means over all
      replicas, like the losses passed to `update`.
    opt_state: state of any optax transformation with `weighted` in it, once or
      (as in `flat_minima`) more than once.
    active: bool [T], the tasks in that batch; None for all.

  Returns:
    The optimizer state for the next update; `opt_state` itself if the weighting
    does not use losses after the step.

  Raises:
    ValueError: if no aggregator made by `weighted` is in `opt_state`.

  Examples:
    >>> import jax.numpy as jnp, mtl_jax, optax
    >>> famo = mtl_jax.famo()
    >>> tx = optax.chain(mtl_jax.weighted(famo, num_tasks=2), optax.sgd(0.1))
    >>> state = tx.init(jnp.zeros(3))
    >>> task_grads = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
    >>> _, state = tx.update(task_grads, state, losses=jnp.array([1.0, 2.0]))
    >>> state = mtl_jax.after_step(famo, jnp.array([0.5, 2.0]), state)
    >>> jnp.set_printoptions(precision=3)
    >>> print(state[0].memory.weighting.logits)
    [-0.025  0.025]
  """
  mine = lambda node: isinstance(node, WeightedMemory)
  if not any(mine(x) for x in jax.tree.leaves(opt_state, is_leaf=mine)):
    raise ValueError('there is no weighted(...) in opt_state')
  if weighting.after_step is None:
    return opt_state
  step = weighting.after_step

  def move(node):
    if not mine(node):
      return node
    old = variables.unwrapped(node.weighting)
    new = step(new_losses, old, active=active)
    # In the variables that a library has wrapped the old numbers in.
    structure = jax.tree.structure(node.weighting)
    return WeightedMemory(jax.tree.unflatten(structure, jax.tree.leaves(new)))

  return jax.tree.map(move, opt_state, is_leaf=mine)
