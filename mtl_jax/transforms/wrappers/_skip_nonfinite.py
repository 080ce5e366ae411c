"""Skipping of steps with a non-finite update."""

from collections.abc import Hashable
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtl_jax.transforms.contract import arguments
from mtl_jax.transforms.contract import diagnosis
from mtl_jax.transforms.contract import variables


class SkipNonfiniteState(NamedTuple):
  """State of `skip_nonfinite`.

  Attributes:
    inner: state of the wrapped transformation after the last update that was
      not skipped.
    skipped: number of updates skipped so far, int32.
    consecutive: number of updates skipped since the last one applied, int32.
  """

  inner: Any
  skipped: jax.Array
  consecutive: jax.Array

  def diagnostics(self) -> dict[str, jax.Array]:
    """The diagnostics of `inner`, and `'skipped'`."""
    seen = diagnosis.diagnostics(self.inner)
    return {**seen, 'skipped': self.skipped}


def skip_nonfinite(
  inner: optax.GradientTransformation,
  max_consecutive: int = 10,
  *,
  shard_axis: Hashable | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Skips and counts updates that are not finite.

  A NaN or an infinity in an active task's gradient makes every aggregator's
  update non-finite; so does a negative loss in a weighting that takes its
  logarithm. Wrap the whole chain: a skipped update is zero, and the chain's
  state (moments, weights, keys) is unchanged. A step that carries further state
  asks `left_out`. `optax.apply_if_finite` does the same for gradients without a
  task axis; around an aggregator it raises, because shapes change.

  Args:
    inner: the transformation, usually a chain that begins with an aggregator.
    max_consecutive: how many updates in a row may be skipped, at least 1. The
      next one is then applied even if it is not finite, so that a diverged run
      fails visibly.
    shard_axis: axis over which parameters are sharded inside `shard_map`: all
      shards skip the update if one has to.

  Returns:
    A transformation with the same arguments as `inner`.

  Raises:
    ValueError: for a `max_consecutive` below 1.

  Examples:
    >>> import jax.numpy as jnp, mtl_jax, optax
    >>> tx = mtl_jax.skip_nonfinite(
    ...   optax.chain(mtl_jax.linear(num_tasks=2), optax.sgd(1.0)))
    >>> state = tx.init(jnp.zeros(2))
    >>> bad = jnp.array([[1.0, jnp.nan], [1.0, 1.0]])
    >>> updates, state = tx.update(bad, state)
    >>> print(updates, mtl_jax.diagnostics(state)['skipped'])
    [0. 0.] 1
    >>> print(tx.update(jnp.ones((2, 2)), state)[0])
    [-1. -1.]
  """
  arguments.check_count('max_consecutive', max_consecutive)
  inner = optax.with_extra_args_support(inner)

  def init(params):
    # Two buffers: a donated state must not hold one twice.
    return SkipNonfiniteState(
      inner.init(params), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
    )

  def update(updates, state, params=None, **extra_args):
    updates, moved = inner.update(updates, state.inner, params, **extra_args)
    broken = jnp.zeros((), bool)
    for leaf in jax.tree.leaves(updates):
      broken = broken | ~jnp.all(jnp.isfinite(leaf))
    if shard_axis is not None:
      broken = jax.lax.psum(broken.astype(jnp.int32), shard_axis) > 0
    skip = broken & (state.consecutive < max_consecutive)
    updates = jax.tree.map(
      lambda u: jnp.where(skip, jnp.zeros_like(u), u), updates
    )
    moved = jax.tree.map(
      lambda new, old: jnp.where(skip, old, new), moved, state.inner
    )
    return updates, SkipNonfiniteState(
      inner=moved,
      skipped=state.skipped + skip.astype(jnp.int32),
      consecutive=jnp.where(skip, state.consecutive + 1, 0),
    )

  return optax.GradientTransformationExtraArgs(init, update)


def left_out(opt_state: Any) -> jax.Array:
  """Whether a `skip_nonfinite` skipped the last update, bool scalar.

  If so, a training step that carries more than parameters and the optimizer's
  state (running statistics, that of a joint update) keeps the old values.

  Args:
    opt_state: state of any optax transformation.

  Returns:
    True if any `skip_nonfinite` in it skipped the last update; False without
    any.

  Examples:
    >>> import jax.numpy as jnp, mtl_jax, optax
    >>> tx = mtl_jax.skip_nonfinite(optax.sgd(1.0))
    >>> _, state = tx.update(jnp.array(jnp.nan), tx.init(jnp.zeros(())))
    >>> print(mtl_jax.left_out(state))
    True
  """
  mine = lambda node: isinstance(node, SkipNonfiniteState)
  found = jnp.zeros((), bool)
  opt_state = variables.unwrapped(opt_state)
  for node in jax.tree.leaves(opt_state, is_leaf=mine):
    if mine(node):
      found |= node.consecutive > 0
  return found
