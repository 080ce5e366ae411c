"""A row of the table of methods that every property is tested on."""

from collections.abc import Callable
from collections.abc import Mapping
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import references

import mtl_jax

# The matrix of SimplexLab/TorchJD's tests, and losses to go with it.
GOLDEN_MATRIX = np.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
GOLDEN_LOSSES = np.array([1.0, 2.0])

# As many as the largest number of tasks in these tests.
LOSSES = 0.25 + np.arange(40) * 7 % 11
WEIGHTS = tuple(0.5 + i % 3 for i in range(40))


# Rows are one another by identity: they are keys of caches.
@dataclasses.dataclass(frozen=True, eq=False)
class Method:
  """A row of the table.

  Attributes:
    name: what the test is called.
    factory: of `mtl_jax`.
    reference: `(J [T, D], losses [T]) -> [N, D]` in float64: all the updates
      that are right. More than one for a random method, equally likely. None
      for the sum weighted by `per_task`. With `stepwise`: `(J, losses, *,
      memory, draw, extra, **per_task) -> ([N, D], memory)`; memory is None at
      the first step, draw what `draws` returns (None without), extra the tuple
      of further stacks [T, D], and per_task the arguments of that name.
    golden: [3], the update on `GOLDEN_MATRIX`, from outside or by hand; the
      first one for a method with memory.
    scale: `T -> number`, what T identical gradients are multiplied by.
    arguments: of the factory.
    per_task: arguments of the factory with one entry a task.
    golden_per_task: the same for `GOLDEN_MATRIX`.
    needs_losses: whether `update` raises without `losses`.
    random: whether the state holds a key.
    wrong: (argument, value) pairs that the factory refuses.
    stepwise: whether the reference goes from step to step.
    draws: `(key, T, D) -> array`, what a random method draws from the fresh key
      of an update. With it a random method has one right update; without it all
      outcomes stand in the reference.
    needs_tasks: whether `init` raises without `num_tasks`.
    extra_batches: how many further stacks `update` needs.
    weights: `'gradients'`: `task_weights` are the coefficients in the task
      gradients; `'tracked'`: in gradients that the method tracks; `'none'`: it
      has no weights.
    symmetric: whether the order of tasks does not matter.
    wide_tolerance: relative tolerance for rows of lengths 1e-2 to 1e2; None
      where the method is no map that could be right for them.
    bound: how many times the longest gradient an update of three may be long.
  """

  name: str
  factory: Callable[..., Any]
  reference: Callable[..., Any] | None
  golden: tuple[float, float, float]
  scale: Callable[[int], float] = lambda size: 1.0
  arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  per_task: Mapping[str, tuple[Any, ...]] = dataclasses.field(
    default_factory=dict
  )
  golden_per_task: Mapping[str, tuple[Any, ...]] | None = None
  needs_losses: bool = False
  random: bool = False
  wrong: tuple[tuple[str, Any], ...] = ()
  stepwise: bool = False
  draws: Callable[[Any, int, int], Any] | None = None
  needs_tasks: bool = False
  extra_batches: int = 0
  weights: str = 'gradients'
  symmetric: bool = True
  wide_tolerance: float | None = 1e-4
  bound: float = 100.0

  def make(self, tasks, *, num_tasks=None, **options):
    """The aggregator for these of the (up to 40) tasks."""
    if num_tasks is None and self.needs_tasks:
      num_tasks = len(tasks)
    return self.factory(
      **self.arguments,
      **self._of_tasks(tasks),
      num_tasks=num_tasks,
      **options,
    )

  def make_golden(self, **options):
    """The aggregator whose update on `GOLDEN_MATRIX` is `golden`."""
    per_task = self.golden_per_task or self._of_tasks(range(2))
    return self.factory(**self.arguments, **per_task, num_tasks=2, **options)

  def extras(self, task_grads):
    """Keywords of `update` that this method needs besides losses.

    The further stacks are a map of each entry of the task gradients, of degree
    1 and not parallel to them.
    """
    if not self.extra_batches:
      return {}
    return {
      'extra_grads': tuple(
        jax.tree.map(lambda g, k=k: g + 0.3 * k * jnp.abs(g), task_grads)
        for k in range(1, self.extra_batches + 1)
      )
    }

  def make_alone(self, tasks, **options):
    """The same, with further stacks made as in `extras` where it needs some."""
    tx = self.make(tasks, **options)
    if not self.extra_batches:
      return tx

    def aggregate(task_grads, state, params=None, **extra_args):
      extra_args |= self.extras(task_grads)
      return tx.aggregate(task_grads, state, params, **extra_args)

    return mtl_jax.Aggregator(
      tx.init,
      aggregate,
      axes=tx.axes,
      head_scale=tx.head_scale,
      weights=tx.weights,
    )

  def right(self, J, losses, tasks, *, key=None):
    """All right updates [N, D] for the gradients J of `tasks`.

    `key` is that of the state before the update; of `make(...).init` if None.
    """
    return self.right_step(J, losses, tasks, None, key=key)[0]

  def right_step(self, J, losses, tasks, memory, *, key=None):
    """The same for a method that remembers, and its next memory."""
    J, losses = np.asarray(J, np.float64), np.asarray(losses, np.float64)
    per_task = self._of_tasks(tasks)
    if self.reference is None:
      (weights,) = per_task.values()
      return references.weighted(np.asarray(weights))(J, losses), None
    if not self.stepwise:
      return self.reference(J, losses), None
    draw = None
    if self.draws is not None:
      if key is None:
        key = self.make(tasks).init(jnp.zeros(J.shape[1])).key
      draw = np.asarray(self.draws(jax.random.split(key)[1], *J.shape))
    extra = tuple(
      J + 0.3 * k * np.abs(J) for k in range(1, self.extra_batches + 1)
    )
    return self.reference(
      J, losses, memory=memory, draw=draw, extra=extra, **per_task
    )

  def _of_tasks(self, tasks):
    return {
      name: tuple(values[i] for i in tasks)
      for name, values in self.per_task.items()
    }
