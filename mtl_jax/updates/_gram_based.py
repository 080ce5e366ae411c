"""Updates that need only the Gram matrix of the task gradients.

A method that maps the Gram matrix to weights does not need a stack of task
gradients. `_gram` and `_ghost` differ in how they compute the matrix.
"""

from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtl_jax.transforms import Perturbation
from mtl_jax.transforms.contract import aggregation
from mtl_jax.transforms.contract import algebra
from mtl_jax.transforms.contract import arguments
from mtl_jax.transforms.contract import heads
from mtl_jax.transforms.wrappers import ball


class GramUpdateState(NamedTuple):
  """State of `gram_update` and `ghost_update`.

  `mtl_jax.diagnostics` shows its contents.

  Attributes:
    loss: the aggregator's state for the loss gradients.
    flat: the aggregator's state for the flat gradients; empty when plain.
    count: number of updates so far, int32.
  """

  loss: Any
  flat: Any
  count: jax.Array  # type: ignore[assignment]


class Given(NamedTuple):
  """The input for weights besides a Gram matrix.

  Attributes:
    losses: [T], 1 for absent tasks.
    present: bool [T].
  """

  losses: jax.Array
  present: jax.Array


def dtype_of(leaves: Sequence[Any]) -> Any:
  """The dtype of Gram matrices: float32, or wider if an array is."""
  return jnp.result_type(jnp.float32, *(algebra.wide(x.dtype) for x in leaves))


class GramMethod:
  """An aggregator that maps the Gram matrix to weights.

  Attributes:
    flat: the perturbation of flat minima; None for a plain update.
    head_scale: `'none'` or `'weights'`.
  """

  def __init__(
    self,
    asker: str,
    aggregator: optax.GradientTransformation,
    num_tasks: int,
    flat: Perturbation | None,
    head_scale: str | None,
  ):
    inner = aggregation.as_aggregator(aggregator).for_tasks(num_tasks)
    if inner.weigh is None:
      raise ValueError(
        f'{asker} needs an aggregator that is a map from the Gram matrix to '
        'weights; this one looks at coordinates of the gradients, remembers '
        'some, or needs further stacks'
      )
    if inner.axes != aggregation.Axes():
      raise ValueError(
        f'{asker} needs an aggregator without axes, got {inner.axes}'
      )
    if head_scale is None:
      head_scale = 'none' if flat else inner.head_scale
    arguments.one_of('head_scale', head_scale, heads.HEAD_SCALES)
    self.flat, self.head_scale = flat, head_scale
    self._inner, self._size = inner, num_tasks
    self.after_step = self._after_step if inner.after_step else None

  def init(self, params: Any) -> GramUpdateState:
    """The state before the first update."""
    leaves = [
      x
      for x in jax.tree.leaves(params)
      if jnp.issubdtype(x.dtype, jnp.floating)
    ]
    start = lambda: self._inner.init(jnp.zeros(self._size, dtype_of(leaves)))
    return GramUpdateState(
      loss=start(),
      flat=start() if self.flat else optax.EmptyState(),
      count=jnp.zeros((), jnp.int32),
    )

  def weights(
    self, gram: jax.Array, state: Any, given: Given
  ) -> tuple[jax.Array, Any]:
    """Weights [T] of the loss gradients, and the next state."""
    return self._weigh(gram, state, given)

  def flat_weights(
    self,
    gram_of_flat: jax.Array,
    gram: jax.Array,
    state: Any,
    given: Given,
    shared: Sequence[jax.Array],
  ) -> tuple[jax.Array, Any]:
    """Weights [T] of the flat gradients, zero for those that are rounding.

    Args:
      gram_of_flat: Gram matrix [T, T] of the flat gradients.
      gram: Gram matrix [T, T] of the loss gradients.
      state: the aggregator's state for the flat gradients.
      given: losses and present tasks.
      shared: leaves of the shared parameters, for their dtypes.

    Returns:
      The weights, and the next state.
    """
    seen = ball.resolved(jnp.diagonal(gram_of_flat), jnp.diagonal(gram), shared)
    gram_of_flat = jnp.where(seen[:, None] & seen[None, :], gram_of_flat, 0)
    weights, state = self._weigh(gram_of_flat, state, given)
    return jnp.where(seen, weights, 0), state

  def _weigh(self, gram, state, given):
    losses, present = given
    state = self._inner.weigh(gram, state, losses=losses, active=present)
    # A zero weight would hide a gradient that is not finite.
    finite = jnp.all(jnp.isfinite(gram))
    return jnp.where(present & ~finite, jnp.nan, state.task_weights), state

  def _after_step(self, new_losses, state, *, active=None):
    move = lambda x: self._inner.after_step(new_losses, x, active=active)
    flat = move(state.flat) if self.flat else state.flat
    return state._replace(loss=move(state.loss), flat=flat)
