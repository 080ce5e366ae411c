"""Aggregators that are a map from the Gram matrix to weights."""

from collections.abc import Callable
from collections.abc import Hashable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax.transforms import _aggregator
from mtl_jax.transforms import _inner


class Solution(NamedTuple):
  """Weights found by an iterative solver.

  Attributes:
    weights: [T].
    residual: scalar, how far the weights are from the solver's optimality
      conditions, relative to the size of their terms.
  """

  weights: jax.Array
  residual: jax.Array


class FromGramState(NamedTuple):
  """State of an aggregator made by `from_gram`.

  All fields but `key` are None without `num_tasks`.

  Attributes:
    task_weights: [T], weights of the last update; its coefficients in terms of
      the task gradients. Zero for absent tasks.
    gram: [T, T], Gram matrix of the last task gradients.
    residual: scalar, the solver's relative residual; None for a method in
      closed form.
    key: the key the next update draws from; None for a deterministic method.
  """

  task_weights: jax.Array | None
  gram: jax.Array | None
  residual: jax.Array | None
  key: jax.Array | None

  def diagnostics(self) -> dict[str, jax.Array]:
    """What there is to see; see `mtl_jax.diagnostics`."""
    if self.task_weights is None or self.gram is None:
      return {}
    weights, gram = self.task_weights, self.gram
    norms = jnp.sqrt(jnp.diagonal(gram))
    present = norms > 0
    pairs = jnp.triu(present[:, None] & present[None, :], 1)
    conflicting = jnp.sum(pairs & (gram < 0))
    mean = present / jnp.maximum(jnp.sum(present), 1)
    lengths = (weights @ gram @ weights) * (mean @ gram @ mean)
    cosine = jnp.where(
      lengths > 0,
      (weights @ gram @ mean) / jnp.sqrt(jnp.where(lengths > 0, lengths, 1)),
      0.0,
    )
    seen: dict[str, jax.Array] = {
      'task_weights': weights,
      'gram': gram,
      'gradient_norms': norms,
      'conflict': conflicting / jnp.maximum(jnp.sum(pairs), 1),
      'mean_cosine': cosine,
    }
    return seen if self.residual is None else seen | {'residual': self.residual}


def check_seed(seed: int | jax.Array) -> None:
  """Raises unless `seed` is an integer or a typed key."""
  if isinstance(seed, jax.Array):
    if jnp.issubdtype(seed.dtype, jax.dtypes.prng_key):
      return
  elif isinstance(seed, int | np.integer):
    return
  raise TypeError(
    f'seed must be an int or a typed key (jax.random.key), got {seed!r}'
  )


def own_key(seed: int | jax.Array | None) -> jax.Array | None:
  """A fresh typed key, so that no two states ever share a buffer."""
  if seed is None:
    return None
  if not isinstance(seed, jax.Array):
    return jax.random.key(seed)
  return jax.random.wrap_key_data(
    jnp.array(jax.random.key_data(seed), copy=True),
    impl=jax.random.key_impl(seed),
  )


def check_num_tasks(num_tasks: int | None) -> None:
  if num_tasks is not None and num_tasks < 1:
    raise ValueError(f'num_tasks must be at least 1, got {num_tasks}')


def from_gram(
  weights_fn: Callable[..., jax.Array | Solution],
  *,
  num_tasks: int | None = None,
  seed: int | jax.Array | None = None,
  axis_name: Hashable | None = None,
  reduce: str = 'mean',
  shard_axis: Hashable | None = None,
  head_scale: str = 'none',
) -> _aggregator.Aggregator:
  r"""Lifts a map from the Gram matrix to weights to an aggregator.

  With :math:`G_{ij} = \langle g_i, g_j \rangle` the update is

  .. math:: \sum_i w_i(G)\, g_i

  which most gradient-manipulation methods are. Rows and columns of absent tasks
  are zero in the Gram matrix that `weights_fn` sees, and whatever weight it
  gives to such a task is dropped.

  Args:
    weights_fn: `(gram [T, T], *, losses [T] or None, active bool [T]) ->
      weights [T]`, or a `Solution` of weights and residual. With `seed` it is
      also given `key`, a fresh one at every update. Must be jittable; its
      result on the active tasks should be what it is without the others.
    num_tasks: T. With it the weights and the Gram matrix stand in the state
      from `init` on; without it those fields are None for ever.
    seed: an int or a typed key, for a random method.
    axis_name: axis of replicas inside `pmap` or `shard_map`; task gradients and
      losses are averaged over it first.
    reduce: `'mean'` or `'sum'` over `axis_name`. Losses that are global already
      must not be summed again: pass each replica's own.
    shard_axis: axis over which the parameters are sharded; inner products are
      summed over it.
    head_scale: default of `shared_only` for this aggregator.

  Returns:
    An aggregator: `update(task_grads, state, params=None, *, losses=None,
    active=None)`; leaves [T, *shape] in, leaves [*shape] out.

  Raises:
    TypeError: for a seed that is neither an integer nor a typed key.
    ValueError: for a wrong `num_tasks` or `reduce`; at `update` for leaves
      without a task axis, of different T or unlike `params`.

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
  check_num_tasks(num_tasks)
  if seed is not None:
    check_seed(seed)
  axes = _aggregator.Axes(axis_name, reduce, shard_axis)

  def solve(gram, losses, active, key):
    extra = {} if key is None else {'key': key}
    found = weights_fn(gram, losses=losses, active=active, **extra)
    if not isinstance(found, Solution):
      found = Solution(found, None)
    if found.weights.shape != active.shape:
      raise ValueError(
        f'weights_fn must return weights [{active.shape[0]}], got shape '
        f'{found.weights.shape}'
      )
    # The Gram matrix of no task says nothing; the update is then zero.
    weights = jnp.where(active, found.weights, 0).astype(gram.dtype)
    return Solution(weights, found.residual)

  def init(params):
    key = own_key(seed)
    if num_tasks is None:
      return FromGramState(None, None, None, key)
    dtype = jnp.result_type(
      jnp.float32,
      *(_inner.wide(leaf.dtype) for leaf in jax.tree.leaves(params)),
    )
    gram = jax.ShapeDtypeStruct((num_tasks, num_tasks), dtype)
    losses = jax.ShapeDtypeStruct((num_tasks,), dtype)
    active = jax.ShapeDtypeStruct((num_tasks,), bool)
    found = jax.eval_shape(solve, gram, losses, active, key)
    return FromGramState(
      task_weights=jnp.zeros(num_tasks, dtype),
      gram=jnp.zeros((num_tasks, num_tasks), dtype),
      residual=None if found.residual is None else jnp.zeros((), dtype),
      key=key,
    )

  def aggregate(
    task_grads, state, params=None, *, losses=None, active=None, **unused
  ):
    del unused
    size = _aggregator.check_task_axis(task_grads, params, num_tasks)
    present = _aggregator.full_active(active, size)
    losses = _aggregator.check_losses(losses, size)
    if active is not None:
      task_grads = _inner.keep_active(present, task_grads)
      losses = None if losses is None else jnp.where(present, losses, 1)
    key, draw = state.key, None
    if key is not None:
      key, draw = jax.random.split(key)
    gram = _inner.gram(task_grads, size, axes)
    weights, residual = solve(gram, losses, present, draw)
    updates = _inner.weighted_sum(weights, task_grads)
    if num_tasks is None:
      return updates, FromGramState(None, None, None, key)
    if residual is not None:
      residual = residual.astype(gram.dtype)
    return updates, FromGramState(weights, gram, residual, key)

  def for_tasks(size):
    if num_tasks not in (None, size):
      raise ValueError(f'num_tasks is {num_tasks}, but there are {size} tasks')
    if num_tasks is not None:
      return lifted
    return from_gram(
      weights_fn,
      num_tasks=size,
      seed=seed,
      axis_name=axis_name,
      reduce=reduce,
      shard_axis=shard_axis,
      head_scale=head_scale,
    )

  lifted = _aggregator.Aggregator(
    init, aggregate, axes=axes, head_scale=head_scale, for_tasks=for_tasks
  )
  return lifted
