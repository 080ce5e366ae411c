"""Losses on one of several replicas, each with its own rows of the batch.

Under plain `jit` every number refers to the global batch. Inside `shard_map` a
replica sees only its own rows, so sums and means over replicas are explicit.
"""

from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtl_jax.gradients import _weighted
from mtl_jax.gradients import slices
from mtl_jax.transforms.contract import aggregation


class Replicas(NamedTuple):
  """The replicas that evaluate a batch together.

  Attributes:
    axis_name: the mapped axis of the replicas; None under plain `jit`.
  """

  axis_name: str | None = None

  def mean(self, tree: Any) -> Any:
    """The mean over replicas, for example of losses, in the leaves' dtypes."""
    if self.axis_name is None:
      return tree

    def mean(x):
      x = jnp.asarray(x)
      return jax.lax.pmean(x, self.axis_name).astype(x.dtype)

    return jax.tree.map(mean, tree)

  def mean_gradients(self, grads: Any) -> Any:
    """The mean of gradients; raises if they are already summed."""
    return aggregation.Axes(self.axis_name).average(grads)

  def sum(self, tree: Any) -> Any:
    """The sum over replicas, for example of counts and metrics."""
    if self.axis_name is None:
      return tree
    return jax.lax.psum(tree, self.axis_name)

  def shares(
    self,
    loss_fn: Callable[..., Any],
    names: tuple[str, ...],
    label_counts: jax.Array,
    number: int,
  ) -> Callable[..., Any]:
    """The replica's shares of the losses, whose mean is the global loss.

    A task's loss is the mean over its labels on all replicas. It differs from
    the mean of the replicas' means if some have more labels than others. The
    factors are part of the differentiated function: if rows on one replica
    influence another's loss, as through BatchNorm's statistics, no later factor
    would be right.

    Args:
      loss_fn: `(params, batch, *args) -> (losses, aux)`, losses the means over
        the labels of the batch, {task: scalar} or [T].
      names: the tasks.
      label_counts: [T], labels of each task on all replicas.
      number: the number of slices that each replica takes one at a time. All
        slices have equal weight, regardless of their labels.

    Returns:
      The same function of the shares; `loss_fn` itself under plain `jit`.
    """
    if self.axis_name is None:
      return loss_fn
    mean = label_counts / jax.lax.axis_size(self.axis_name)
    per_label = number / jnp.where(mean > 0, mean, 1)

    def share_fn(params, batch, *args):
      factors = slices.label_counts(batch, names) * per_label
      # The mean of a task without labels here may be anything.
      means, aux = _weighted.guarded(
        loss_fn, names, factors > 0, params, batch, *args
      )
      return [
        jnp.where(factors[i] > 0, factors[i] * mean, 0)
        for i, mean in enumerate(means)
      ], aux

    return share_fn
