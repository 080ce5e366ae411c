"""A loop over tasks whose results are written in place."""

from collections.abc import Callable
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def scan_tasks(
  of_task: Callable[..., Any],
  names: tuple[str, ...],
  stack: Any,
  heads: Mapping[str, Any],
  loss: Any,
) -> tuple[jax.Array, Any, dict[str, Any]]:
  """A loop over tasks that overwrites each input with its result.

  Args:
    of_task: `(i, row i of stack) -> (loss, shared gradient, head gradient)`
      with i a Python integer.
    names: the tasks.
    stack: leaves [T, ...]; row i becomes the shared gradient of task i, so that
      there is only one stack.
    heads: {task: leaves}, with the shapes of the head gradients.
    loss: a loss, or its shape and dtype.

  Returns:
    losses [T], shared gradients [T, ...], head gradients by task.
  """
  kinds = _Kinds(names, heads)

  def branch(i):
    def run(row):
      loss, shared_grad, head_grad = of_task(i, row)
      return loss, shared_grad, kinds.only(i, head_grad)

    return run

  branches = [branch(i) for i in range(len(names))]

  def step(i, carry):
    losses, stack, own_heads = carry
    loss, shared_grad, head_grads = jax.lax.switch(
      i, branches, [x[i] for x in stack]
    )
    stack = [x.at[i].set(g) for x, g in zip(stack, shared_grad, strict=True)]
    return losses.at[i].set(loss), stack, kinds.write(i, own_heads, head_grads)

  start = zeros_like(loss, len(names)), list(stack), kinds.empty()
  losses, stack, own_heads = jax.lax.fori_loop(0, len(names), step, start)
  return losses, stack, kinds.by_task(own_heads)


class _Kinds:
  """Heads whose leaves have the same shapes and dtypes, stacked.

  Every branch of a loop over tasks returns the same structure. With a place for
  each task's head, memory would grow as the square of T.
  """

  def __init__(self, names: tuple[str, ...], heads: Mapping[str, Any]):
    kind = lambda task: tuple((x.shape, x.dtype) for x in heads[task])
    found: dict[Any, list[str]] = {}
    for task in names:
      found.setdefault(kind(task), []).append(task)
    self._members = list(found.values())
    self._kind_of = [list(found).index(kind(task)) for task in names]
    # The position of each task in its kind.
    self._place_of = np.zeros(len(names), np.int32)
    for i, task in enumerate(names):
      self._place_of[i] = self._members[self._kind_of[i]].index(task)
    self._heads = heads

  def empty(self):
    """The stacks for `write`: for each kind leaves [tasks in it, ...]."""
    return [
      [zeros_like(x, len(members)) for x in self._heads[members[0]]]
      for members in self._members
    ]

  def only(self, i, head):
    """A head of task i for its kind, and zeros for all others."""
    return [
      head
      if kind == self._kind_of[i]
      else [jnp.zeros_like(x) for x in self._heads[members[0]]]
      for kind, members in enumerate(self._members)
    ]

  def write(self, i, stacks, heads):
    """Writes the head of task i, a traced number, into its place."""
    place = jnp.asarray(self._place_of)[i]
    written = []
    for kind, (stack, head) in enumerate(zip(stacks, heads, strict=True)):
      if len(self._members) > 1:
        mine = jnp.asarray(np.equal(self._kind_of, kind))[i]
        head = [
          jnp.where(mine, x, rows[place])
          for x, rows in zip(head, stack, strict=True)
        ]
      written.append(
        [x.at[place].set(g) for x, g in zip(stack, head, strict=True)]
      )
    return written

  def by_task(self, stacks):
    """The stacks as {task: leaves}."""
    return {
      task: [x[k] for x in stack]
      for stack, members in zip(stacks, self._members, strict=True)
      for k, task in enumerate(members)
    }


def zeros_like(x: Any, size: int) -> jax.Array:
  """Zeros [size, *x.shape] that vary over the same mapped axes as `x`."""
  # A loop's carry must, inside shard_map(check_vma=True).
  return jnp.broadcast_to(jnp.zeros_like(x)[None], (size, *x.shape))
