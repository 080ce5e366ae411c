"""A step as one of several replicas, each with rows of the batch of its own.

Under plain `jit` every number is that of the whole batch by itself. Inside
`shard_map` a replica sees its own rows alone, and what is of the whole batch
has to be said: here, and nowhere else in a step.
"""

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtl_jax import slices as slicing
from mtl_jax import types
from mtl_jax.train import distributed
from mtl_jax.transforms.contract import aggregation


class Replicas(NamedTuple):
  """The replicas of a step.

  Attributes:
    axis_name: the mapped axis they lie along; None under plain `jit`, where
      what a method is given is of the whole batch already.
  """

  axis_name: str | None = None

  def mean(self, tree: Any) -> Any:
    """The mean over replicas, such as of losses, in the leaves' dtypes."""
    if self.axis_name is None:
      return tree
    return jax.tree.map(
      lambda x: jax.lax.pmean(x, self.axis_name).astype(x.dtype), tree
    )

  def mean_gradients(self, grads: Any) -> Any:
    """The same of gradients; raises where they are summed already."""
    return aggregation.Axes(self.axis_name).average(grads)

  def sum(self, tree: Any) -> Any:
    """The sum over replicas, such as of counts and metrics."""
    if self.axis_name is None:
      return tree
    return jax.lax.psum(tree, self.axis_name)

  def own_key(self, key: jax.Array) -> jax.Array:
    """A key of this replica, so that its rows have other dropout masks."""
    if self.axis_name is None:
      return key
    return jax.random.fold_in(key, jax.lax.axis_index(self.axis_name))

  def label_counts(
    self, batches: Sequence[types.Batch], names: tuple[str, ...]
  ) -> jax.Array:
    """Labels of each task in each of the batches, [N, T], over all replicas."""
    return self.sum(_label_counts(batches, names))

  def shares(
    self, loss_fn: Callable[..., Any], names: tuple[str, ...]
  ) -> Callable[..., Any]:
    """The replica's shares of the losses, whose mean is the global loss.

    A task's loss is the mean over its labels on all replicas, which is no mean
    of means where some have more labels than others. The factors are inside
    what is differentiated: where rows of one replica have a part in another's
    loss, as by statistics of BatchNorm, no later factor would be right.

    Args:
      loss_fn: `(params, batch) -> ({task: mean over its labels}, aux)`.
      names: the tasks.

    Returns:
      The same of `(params, *arguments)`; `loss_fn` itself under plain `jit`.
    """
    if self.axis_name is None:
      return loss_fn

    def share_fn(params, rows, per_label):
      (batch,) = rows
      means, aux = loss_fn(params, batch)
      factors = _label_counts([batch], names)[0] * per_label
      return {
        task: factors[i] * means[task] for i, task in enumerate(names)
      }, aux

    return share_fn

  def arguments(
    self, batch: types.Batch, names: tuple[str, ...], micro_batches: int
  ) -> tuple[Any, ...]:
    """What `shares` are called with after the parameters, for a batch.

    Args:
      batch: the replica's rows.
      names: the tasks.
      micro_batches: how many slices the rows are evaluated in.

    Returns:
      The batch, out of sight of whoever would weigh slices by this replica's
      labels in them, so that all count alike; and [T], what a label counts for.
      The batch alone under plain `jit`.
    """
    if self.axis_name is None:
      return (batch,)
    mean = self.mean(_label_counts([batch], names)[0])
    return (batch,), micro_batches / jnp.where(mean > 0, mean, 1)


def _label_counts(batches, names):
  stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *batches)
  return slicing.label_counts(stacked, names, len(batches))


def per_device(step: Any, mesh: jax.sharding.Mesh) -> Any:
  """A step that every device runs by itself, on its rows of the batch.

  Args:
    step: `(state, batch) -> (state, metrics)` of `make_train_step` with
      `axis_name='data'`.
    mesh: of `distributed.make_mesh`.

  Returns:
    The same function of the global state, which every device holds whole, and
    the global batch.
  """
  spec = jax.sharding.PartitionSpec
  return jax.shard_map(
    step,
    mesh=mesh,
    in_specs=(spec(), spec(distributed.DATA_AXIS)),
    out_specs=spec(),
    # With the check on, the gradient of a replicated parameter is summed over
    # devices before anyone can perturb by it.
    check_vma=False,
  )
