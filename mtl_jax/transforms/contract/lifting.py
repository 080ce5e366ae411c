"""Lifting of a rule that combines task gradients to an aggregator.

This module holds what all methods share: shapes, absent tasks, randomness,
memory, the state and its diagnostics. `from_gram` lifts a map from the Gram
matrix to weights. A method that works on the coordinates of the gradients, or
on stored gradients, is lifted from here directly.
"""

from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtl_jax.transforms.contract import aggregation
from mtl_jax.transforms.contract import algebra
from mtl_jax.transforms.contract import arguments
from mtl_jax.transforms.contract import meshes


class AggregatorState(NamedTuple):
  """State of an aggregator.

  The first four fields are None without `num_tasks`.

  Attributes:
    task_weights: [T], weights of the last update; its coefficients in terms of
      the task gradients (of the tracked gradients, where a method tracks them).
      Zero for absent tasks. None for a method without weights.
    gram: [T, T], Gram matrix of the last task gradients.
    mean_cosine: scalar, cosine of the last update with the mean of the active
      task gradients.
    residual: scalar, the solver's relative residual; None for a method in
      closed form.
    key: the key the next update draws from; None for a deterministic method.
    memory: the method's memory between updates; None for a method without
      memory.
  """

  task_weights: jax.Array | None
  gram: jax.Array | None
  mean_cosine: jax.Array | None
  residual: jax.Array | None
  key: jax.Array | None
  memory: Any

  def diagnostics(self) -> dict[str, jax.Array]:
    """The diagnostics; see `mtl_jax.diagnostics`."""
    if self.gram is None or self.mean_cosine is None:
      return {}
    norms = jnp.sqrt(jnp.diagonal(self.gram))
    present = norms > 0
    pairs = jnp.triu(present[:, None] & present[None, :], 1)
    conflicting = jnp.sum(pairs & (self.gram < 0))
    seen = {
      'gram': self.gram,
      'gradient_norms': norms,
      'conflict': conflicting / jnp.maximum(jnp.sum(pairs), 1),
      'mean_cosine': self.mean_cosine,
    }
    if self.task_weights is not None:
      seen['task_weights'] = self.task_weights
    if self.residual is not None:
      seen['residual'] = self.residual
    return seen


class Given(NamedTuple):
  """The input of a rule at an update.

  Attributes:
    task_grads: tree of leaves [T, *shape]; zeros in the rows of absent tasks.
    gram: [T, T], inner products of the task gradients.
    losses: [T], at least float32, 1 for absent tasks; None if not passed.
    active: bool [T].
    key: a fresh key; None without a seed.
    memory: the rule's memory after the last update; None without memory.
    extra_grads: further stacks like `task_grads`, from independent batches.
    axes: the mapped axes, for sums over the shards of parameters.
    unmasked: `task_grads` before the rows of absent tasks are masked, for a
      rule that masks row by row and so needs no second stack.
  """

  task_grads: Any
  gram: jax.Array
  losses: jax.Array | None
  active: jax.Array
  key: jax.Array | None
  memory: Any
  extra_grads: tuple[Any, ...]
  axes: aggregation.Axes
  unmasked: Any


class Combined(NamedTuple):
  """The result of a rule.

  Attributes:
    updates: tree of leaves [*shape].
    weights: [T], zero for absent tasks; None for a method without weights.
    residual: scalar of an iterative solver.
    memory: with the structure, shapes and dtypes of `Given.memory`.
    update_inner: [T], inner products of the update with the task gradients, and
      its squared norm: `(inner [T], square)`. None to have them computed.
  """

  updates: Any
  weights: jax.Array | None = None
  residual: jax.Array | None = None
  memory: Any = None
  update_inner: tuple[jax.Array, jax.Array] | None = None


def own_key(seed: int | jax.Array | None) -> jax.Array | None:
  """A fresh key, so that no two states ever share a buffer.

  Args:
    seed: an integer, for a typed key; a typed key, or a raw one, which stays a
      plain array that any format can save; None.

  Returns:
    The key, or None.
  """
  if seed is None:
    return None
  if arguments.is_raw_key(seed):
    return jnp.array(seed, copy=True)
  if not _is_typed(seed):
    return jax.random.key(seed)
  return jax.random.wrap_key_data(
    jnp.array(jax.random.key_data(seed), copy=True),
    impl=jax.random.key_impl(seed),
  )


def _is_typed(key: Any) -> bool:
  """Whether it is a typed key."""
  return isinstance(key, jax.Array) and jnp.issubdtype(
    key.dtype, jax.dtypes.prng_key
  )


def _draw(key: jax.Array | None) -> tuple[jax.Array | None, jax.Array | None]:
  """The key for the next state, and a typed key to draw from now."""
  if key is None:
    return None, None
  key, draw = jax.random.split(key)
  # A rule need not know of raw keys.
  return key, draw if _is_typed(draw) else jax.random.wrap_key_data(draw)


def check_extra_grads(extra_grads: Any, number: int) -> tuple[Any, ...]:
  """The further stacks a method needs; raises for another number."""
  if not number:
    return ()
  stacks = () if extra_grads is None else tuple(extra_grads)
  if len(stacks) != number:
    raise ValueError(
      f'extra_grads must hold {number} stacks of task gradients from '
      f'independent batches, got {len(stacks)}'
    )
  return stacks


def _mean_cosine(
  combined: Combined, task_grads: Any, gram: jax.Array, active: jax.Array, axes
) -> jax.Array:
  """Cosine of the update with the mean of the active task gradients."""
  if combined.update_inner is None:
    inner, square = algebra.with_rows(
      combined.updates, task_grads, active.shape[0], axes
    )
  else:
    inner, square = combined.update_inner
  mean = active / jnp.maximum(jnp.sum(active), 1)
  # Two roots instead of one: the product of two squares can leave float32.
  lengths = jnp.sqrt(jnp.maximum(square, 0)) * jnp.sqrt(
    jnp.maximum(mean @ gram @ mean, 0)
  )
  safe = jnp.where(lengths > 0, lengths, 1)
  # Rounding may leave it just outside the range of a cosine.
  return jnp.where(lengths > 0, jnp.clip(mean @ inner / safe, -1, 1), 0.0)


def _has_residual(
  combine: Callable[[Given], Combined],
  params: Any,
  num_tasks: int,
  dtype: Any,
  key: jax.Array | None,
  memory: Any,
  extra_batches: int,
) -> bool:
  """Whether a rule returns a residual, found by tracing it."""
  of = lambda *shape: jax.ShapeDtypeStruct(shape, dtype)
  stack = jax.tree.map(
    lambda p: jax.ShapeDtypeStruct((num_tasks, *p.shape), p.dtype), params
  )
  given = {
    'task_grads': stack,
    'gram': of(num_tasks, num_tasks),
    'losses': of(num_tasks),
    'active': jax.ShapeDtypeStruct((num_tasks,), bool),
    'key': _draw(key)[1],
    'memory': memory,
    'extra_grads': (stack,) * extra_batches,
    'unmasked': stack,
  }
  # The axes are unknown when a state is made.
  found = jax.eval_shape(
    lambda given: combine(Given(axes=aggregation.Axes(), **given)).residual,
    given,
  )
  return found is not None


def lift(
  combine: Callable[[Given], Combined],
  *,
  memory: Callable[[int, Any, Any], Any] | None = None,
  num_tasks: int | None = None,
  seed: int | jax.Array | None = None,
  axes: aggregation.Axes | None = None,
  head_scale: str = 'none',
  extra_batches: int = 0,
  weights: str = 'gradients',
  residual: bool | None = False,
  gram_only: bool = False,
  after_step: Callable[..., Any] | None = None,
) -> aggregation.Aggregator:
  """Makes an aggregator from a rule.

  Args:
    combine: `Given -> Combined`; jittable. Its result for the active tasks
      should not depend on the others.
    memory: `(num_tasks, params, dtype) -> tree`, the rule's memory at the
      start, with fresh buffers; dtype is the Gram matrix's. The rule must not
      change the part of absent tasks.
    num_tasks: T; needed at `init` by a rule with memory.
    seed: an int or a key, for a random rule.
    axes: the mapped axes.
    head_scale: default of `shared_only` for this aggregator.
    extra_batches: number of further stacks the rule needs.
    weights: the vectors whose coefficients are `Combined.weights`: the task
      `'gradients'`, gradients the rule has `'tracked'`, or `'none'` without
      weights.
    residual: whether the rule has one; None to find out by tracing it at
      `init`, for a rule of unknown origin.
    gram_only: whether the rule uses only the Gram matrix of the task gradients
      and keeps no memory shaped like them. `Given.task_grads` may then be None,
      and so is `Combined.updates`.
    after_step: see `Aggregator`.

  Returns:
    An aggregator with an `AggregatorState`.

  Raises:
    TypeError: for a seed that is neither an integer nor a key.
    ValueError: for a wrong `num_tasks`; at `init` of a rule with memory without
      `num_tasks`; at `update` for leaves without a task axis, of different T or
      unlike `params`, and for another number of `extra_grads`.
  """
  arguments.check_num_tasks(num_tasks)
  if seed is not None:
    arguments.check_seed(seed)
  axes = axes or aggregation.Axes()

  def init(params):
    aggregation.check_parameters(params)
    key = own_key(seed)
    if num_tasks is None:
      if memory is not None:
        raise ValueError(
          'this aggregator remembers something of every task; make it with '
          'num_tasks'
        )
      return AggregatorState(None, None, None, None, key, None)
    dtype = jnp.result_type(
      jnp.float32,
      *(algebra.wide(leaf.dtype) for leaf in jax.tree.leaves(params)),
    )
    remembered = None
    if memory is not None:
      remembered = memory(num_tasks, params, dtype)
    has_residual = residual
    if residual is None:
      has_residual = _has_residual(
        combine, params, num_tasks, dtype, key, remembered, extra_batches
      )
    return AggregatorState(
      task_weights=None if weights == 'none' else jnp.zeros(num_tasks, dtype),
      gram=jnp.zeros((num_tasks, num_tasks), dtype),
      mean_cosine=jnp.zeros((), dtype),
      residual=jnp.zeros((), dtype) if has_residual else None,
      key=key,
      memory=remembered,
    )

  def aggregate(
    task_grads,
    state,
    params=None,
    *,
    losses=None,
    active=None,
    extra_grads=None,
    **unused,
  ):
    del unused
    # An update is sharded like its rows, and a state stays sharded as it began.
    specs = lambda: (
      jax.tree.map(meshes.row_spec, task_grads),
      jax.tree.map(meshes.spec, state),
    )
    return meshes.with_automatic_axes(
      combined, specs, task_grads, state, params, losses, active, extra_grads
    )

  def combined(task_grads, state, params, losses, active, extra_grads):
    size = aggregation.check_task_axis(task_grads, params, num_tasks)
    extra_grads = check_extra_grads(extra_grads, extra_batches)
    for stack in extra_grads:
      aggregation.check_task_axis(stack, params, size)
    present = aggregation.full_active(active, size)
    losses = aggregation.check_losses(losses, size)
    gram = algebra.gram(task_grads, size, axes)
    unmasked = task_grads
    if active is not None:
      # Masked after the product: before it, the masked stack would be in
      # memory.
      gram = jnp.where(present[:, None] & present[None, :], gram, 0)
      task_grads, extra_grads = algebra.keep_active(
        present, (task_grads, extra_grads)
      )
      losses = None if losses is None else jnp.where(present, losses, 1)
    given = (task_grads, gram, losses, present, extra_grads, unmasked)
    return advance(*given, state, masked=active is not None)

  def weigh(gram, state, *, losses=None, active=None, **unused):
    del unused
    size = gram.shape[0]
    present = aggregation.full_active(active, size)
    losses = aggregation.check_losses(losses, size)
    if active is not None:
      gram = jnp.where(present[:, None] & present[None, :], gram, 0)
      losses = None if losses is None else jnp.where(present, losses, 1)
    given = (None, gram, losses, present, (), None)
    return advance(*given, state, masked=active is not None)[1]

  def advance(
    task_grads, gram, losses, present, extra_grads, unmasked, state, *, masked
  ):
    """The update, and the state after it."""
    key, draw = _draw(state.key)
    found = combine(
      Given(
        task_grads,
        gram,
        losses,
        present,
        draw,
        state.memory,
        extra_grads,
        axes,
        unmasked,
      )
    )
    updates, remembered = found.updates, found.memory
    if masked:
      # Without any task nothing moves and nothing is learnt.
      anyone = jnp.any(present)
      updates = jax.tree.map(lambda u: jnp.where(anyone, u, 0), updates)
      remembered = jax.tree.map(
        lambda new, old: jnp.where(anyone, new, old), remembered, state.memory
      )
    if num_tasks is None:
      return updates, AggregatorState(None, None, None, None, key, None)
    cosine = _mean_cosine(found, task_grads, gram, present, axes)
    as_gram = lambda x: None if x is None else x.astype(gram.dtype)
    return updates, AggregatorState(
      task_weights=as_gram(found.weights),
      gram=gram,
      mean_cosine=as_gram(cosine),
      residual=as_gram(found.residual),
      key=key,
      memory=remembered,
    )

  def for_tasks(size):
    if num_tasks not in (None, size):
      raise ValueError(f'num_tasks is {num_tasks}, but there are {size} tasks')
    if num_tasks is not None:
      return lifted
    return lift(
      combine,
      memory=memory,
      num_tasks=size,
      seed=seed,
      axes=axes,
      head_scale=head_scale,
      extra_batches=extra_batches,
      weights=weights,
      residual=residual,
      gram_only=gram_only,
      after_step=after_step,
    )

  lifted = aggregation.Aggregator(
    init,
    aggregate,
    axes=axes,
    head_scale=head_scale,
    extra_batches=extra_batches,
    weights=weights,
    for_tasks=for_tasks,
    weigh=weigh if gram_only else None,
    after_step=after_step,
  )
  return lifted
