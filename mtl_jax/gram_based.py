"""What updates that see Gram matrices alone have in common.

A method that is a map from the Gram matrix to weights needs no gradients of its
own; where the matrix comes from is the business of `gram_updates` and
`ghost_updates`.
"""

from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtl_jax import types
from mtl_jax.transforms.contract import aggregation
from mtl_jax.transforms.contract import arguments
from mtl_jax.transforms.solvers import simplex
from mtl_jax.transforms.wrappers import _shared_only
from mtl_jax.transforms.wrappers import ball


class GramUpdate(NamedTuple):
  """What `gram_update` and `ghost_update` return.

  Attributes:
    init: `params -> state`.
    update: `(params, state, *args, active=None) -> ((losses [T], aux), grads,
      state)`; grads, laid out as the parameters, are what an aggregator would
      make of the task gradients, and go to any optax transformation.
  """

  init: Callable[[Any], Any]
  update: Callable[..., tuple[tuple[jax.Array, Any], types.Params, Any]]


class GramUpdateState(NamedTuple):
  """State of `gram_update` and `ghost_update`.

  `mtl_jax.diagnostics` shows what is in it.

  Attributes:
    loss: the aggregator's state for the loss gradients.
    flat: the aggregator's state for the flat gradients; empty when plain.
    count: number of updates so far, int32.
  """

  loss: Any
  flat: Any
  count: jax.Array  # type: ignore[assignment]


class Options:
  """The checked arguments that Gram-based updates have in common.

  Args:
    aggregator: see `gram_update`, as all that follow.
    size: number of tasks.
    rho: see `gram_update`.
    rho_heads: see `gram_update`.
    norm: see `gram_update`.
    head_scale: see `gram_update`.
    eps: see `gram_update`.

  Attributes:
    inner: the aggregator, for so many tasks.
    is_flat: whether there is a perturbation.
    head_scale: `'none'` or `'weights'`.
  """

  def __init__(
    self,
    aggregator: optax.GradientTransformation,
    size: int,
    *,
    rho: Any,
    rho_heads: Any,
    norm: str,
    head_scale: str | None,
    eps: float,
  ):
    self.inner = aggregation.as_aggregator(aggregator).for_tasks(size)
    check_gram_based(self.inner, size)
    self.is_flat = rho is not None
    arguments.one_of('norm', norm, ('separate', 'joint'))
    if head_scale is None:
      head_scale = 'none' if self.is_flat else self.inner.head_scale
    arguments.one_of('head_scale', head_scale, _shared_only.HEAD_SCALES)
    self.head_scale = head_scale
    arguments.check_positive('eps', eps)
    self._radius = ball.schedule('rho', rho if self.is_flat else 0.0)
    self._radius_heads = self._radius
    if rho_heads is not None:
      self._radius_heads = ball.schedule('rho_heads', rho_heads)
    self._size = size

  def init(self, params: Any) -> GramUpdateState:
    """The state before the first update."""
    del params
    start = lambda: self.inner.init(jnp.zeros(self._size))
    return GramUpdateState(
      loss=start(),
      flat=start() if self.is_flat else optax.EmptyState(),
      count=jnp.zeros((), jnp.int32),
    )

  def radii(self, count: jax.Array) -> tuple[Any, Any]:
    """Radii of the shared part and of the heads at this update."""
    return self._radius(count), self._radius_heads(count)

  def next(self, loss: Any, flat: Any, state: GramUpdateState):
    """The state after an update."""
    return GramUpdateState(loss, flat, optax.safe_increment(state.count))


def check_gram_based(inner: aggregation.Aggregator, size: int) -> None:
  """Raises for a method that looks at coordinates or remembers some."""
  shapes = [
    jax.tree.map(jnp.shape, jax.eval_shape(inner.init, jnp.zeros(n)))
    for n in (size, size + 1)
  ]
  if (
    inner.weights != 'gradients'
    or inner.extra_batches
    or shapes[0] != shapes[1]
  ):
    raise ValueError(
      'aggregator must be a map from the Gram matrix to weights, got one with '
      f'weights={inner.weights!r} and extra_batches={inner.extra_batches}, '
      'or one that remembers gradients'
    )
  if inner.axes != aggregation.Axes():
    raise ValueError(f'aggregator must have no axes, got {inner.axes}')


def weights_for(inner, gram, state, losses, present):
  """The next state, with the weights that rows of this Gram matrix have."""
  lengths, cos, usable = simplex.cosines(gram, present)
  values, vectors = jnp.linalg.eigh(cos)
  units = vectors * jnp.sqrt(jnp.maximum(values, 0))[None, :]
  # Rows with these lengths and cosines: all that the method looks at.
  rows = jnp.where(usable, lengths, 0)[:, None] * units
  _, state = inner.aggregate(rows, state, losses=losses, active=present)
  return state


def weights_of_flat(
  inner: aggregation.Aggregator,
  gram_of_flat: jax.Array,
  gram: jax.Array,
  state: Any,
  losses: jax.Array,
  present: jax.Array,
  shared: Any,
) -> tuple[jax.Array, Any]:
  """Weights [T] of the flat gradients, zero for those that are only rounding.

  Args:
    inner: the aggregator.
    gram_of_flat: Gram matrix [T, T] of the flat gradients.
    gram: that of the loss gradients.
    state: the aggregator's state for the flat gradients.
    losses: [T].
    present: bool [T].
    shared: leaves of the shared parameters, for their dtypes.

  Returns:
    The weights, and the next state.
  """
  resolution = max(
    (float(jnp.finfo(x.dtype).eps) for x in jax.tree.leaves(shared)),
    default=0.0,
  )
  squares = jnp.diagonal(gram_of_flat)
  seen = squares > resolution**2 * jnp.diagonal(gram)
  # A non-finite gradient is not rounding: it has to reach the update.
  seen = seen | ~jnp.isfinite(squares)
  both = seen[:, None] & seen[None, :]
  gram_of_flat = jnp.where(both, gram_of_flat, 0)
  state = weights_for(inner, gram_of_flat, state, losses, present)
  weights = jnp.where(seen, state.task_weights, 0)
  return unless_broken(weights, gram_of_flat, present), state


def unless_broken(weights, gram, present):
  """The weights; NaN where the Gram matrix of those present is not finite."""
  # A zero weight would hide a gradient that is not finite.
  finite = jnp.all(jnp.isfinite(gram))
  return jnp.where(present & ~finite, jnp.nan, weights)
