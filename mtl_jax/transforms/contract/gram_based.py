"""Aggregators defined by a map from the Gram matrix to weights."""

from collections.abc import Callable
from collections.abc import Hashable
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtl_jax.transforms.contract import aggregation
from mtl_jax.transforms.contract import algebra
from mtl_jax.transforms.contract import lifting


class Solution(NamedTuple):
  """Weights with their residual and memory.

  Attributes:
    weights: [T].
    residual: scalar, how far the weights are from the solver's optimality
      conditions, relative to the size of their terms; None in closed form.
    memory: the memory for the next update; None without memory.
  """

  weights: jax.Array
  residual: jax.Array | None = None
  memory: Any = None


def from_gram(
  weights_fn: Callable[..., jax.Array | Solution],
  *,
  memory: Callable[[int, Any], Any] | None = None,
  extra_batches: int = 0,
  num_tasks: int | None = None,
  seed: int | jax.Array | None = None,
  axis_name: Hashable | None = None,
  reduce: str = 'mean',
  shard_axis: Hashable | None = None,
  head_scale: str = 'none',
  residual: bool | None = None,
) -> aggregation.Aggregator:
  r"""Lifts a map from the Gram matrix to weights to an aggregator.

  With :math:`G_{ij} = \langle g_i, g_j \rangle` the update is

  .. math:: \sum_i w_i(G)\, g_i

  Most gradient-manipulation methods have this form. The rows and columns of
  absent tasks are zero in the Gram matrix that `weights_fn` gets, and the
  weights it returns for them are dropped.

  Args:
    weights_fn: `(gram [T, T], *, losses [T] or None, active bool [T]) ->
      weights [T]`, or a `Solution`. With `seed` it is also given `key`, a fresh
      one at every update; with `memory` it is given `memory` and returns it in
      its `Solution`; with `extra_batches` it is given `cross`, a function
      `cross(a, b) -> [T, T]` with the inner products of stack a and stack b,
      where 0 means the task gradients and 1, 2, ... mean `extra_grads`. Must be
      jittable. Its result for the active tasks should not depend on the others,
      and the memory of absent tasks should stay.
    memory: `(num_tasks, dtype) -> tree`: the memory at the start. The
      aggregator then needs `num_tasks`.
    extra_batches: how many further stacks of task gradients, from independent
      batches, `update` needs as `extra_grads`.
    num_tasks: T. With it the state holds the weights and the Gram matrix from
      `init` on; without it those fields are always None.
    seed: for a random method: an int, a typed key (`jax.random.key`) or a raw
      one (`jax.random.PRNGKey`). With a raw one the key in the state is a plain
      array, as `flax.serialization` and NumPy need it; the draws are the same.
    axis_name: axis of replicas inside `pmap` or `shard_map`; task gradients and
      losses are averaged over it first.
    reduce: `'mean'` or `'sum'` over `axis_name`. Losses that are already global
      must not be summed again: pass each replica's local losses.
    shard_axis: axis over which the parameters are sharded; inner products are
      summed over it.
    head_scale: default of `shared_only` for this aggregator.
    residual: whether `weights_fn` returns one. None traces it at every `init`
      to find out, which takes some milliseconds.

  Returns:
    An aggregator: `update(task_grads, state, params=None, *, losses=None,
    active=None, extra_grads=None)`; leaves [T, *shape] in, leaves [*shape] out.

  Raises:
    TypeError: for a seed that is neither an integer nor a key.
    ValueError: for a wrong `num_tasks` or `reduce`; at `init` with `memory` and
      without `num_tasks`; at `update` for leaves without a task axis, of
      different T or unlike `params`.

  Examples:
    >>> import jax.numpy as jnp, mtl_jax
    >>> inverse_norms = lambda gram, *, losses, active: 1 / jnp.sqrt(
    ...   jnp.diagonal(gram))
    >>> tx = mtl_jax.from_gram(inverse_norms)
    >>> task_grads = jnp.array([[3.0, 4.0], [0.0, 2.0]])
    >>> updates, _ = tx.update(task_grads, tx.init(jnp.zeros(2)))
    >>> print(updates)
    [0.6 1.8]
  """

  def combine(given: lifting.Given) -> lifting.Combined:
    size = given.gram.shape[0]
    stacks = (given.task_grads, *given.extra_grads)
    extra: dict[str, Any] = {}
    if seed is not None:
      extra['key'] = given.key
    if memory is not None:
      extra['memory'] = given.memory
    if extra_batches:
      extra['cross'] = lambda a, b: algebra.cross(
        stacks[a], stacks[b], (size, size), given.axes
      )
    found = weights_fn(
      given.gram, losses=given.losses, active=given.active, **extra
    )
    if not isinstance(found, Solution):
      found = Solution(found)
    if found.weights.shape != given.active.shape:
      raise ValueError(
        f'weights_fn must return weights [{size}], got shape '
        f'{found.weights.shape}'
      )
    # Without any task the Gram matrix has no meaning; the update is then zero.
    weights = jnp.where(given.active, found.weights, 0).astype(given.gram.dtype)
    inner = given.gram @ weights
    return lifting.Combined(
      updates=algebra.weighted_sum(weights, given.unmasked, given.active),
      weights=weights,
      residual=found.residual,
      memory=found.memory,
      update_inner=(inner, weights @ inner),
    )

  return lifting.lift(
    combine,
    memory=None
    if memory is None
    else lambda size, params, dtype: memory(size, dtype),
    num_tasks=num_tasks,
    seed=seed,
    axes=aggregation.Axes(axis_name, reduce, shard_axis),
    head_scale=head_scale,
    extra_batches=extra_batches,
    residual=residual,
    gram_only=not extra_batches,
  )
