"""A program of all losses, and the task that owns each of its arguments."""

import jax
import jax.numpy as jnp

from mtl_jax.gradients import _order
from mtl_jax.gradients import _programs
from mtl_jax.gradients import dependencies


class Owned:
  """A program of all losses that knows the task of each argument.

  Args:
    fn: the function of the program, `(shared, heads) -> (losses, aux)`.
    losses_fn: the losses themselves; `fn` may be their derivative.
    partition: of the parameters.
    shared: leaves that all tasks may use.
    heads: {task: leaves}.

  Attributes:
    leaves: the flattened arguments.
    program: the program.
  """

  def __init__(self, fn, losses_fn, partition, shared, heads):
    self._losses_fn, self._partition = losses_fn, partition
    self._shared, self._heads = shared, heads
    self.leaves = jax.tree.leaves((shared, heads))
    names = partition.task_names
    self.program = _programs.Program(
      lambda *trees: _order.ordered(fn(*trees), names),
      len(names),
      shared,
      heads,
    )
    # JAX flattens dictionaries by sorted keys.
    self._owners: list[str | None] = [None] * len(shared)
    self._start = {}
    for task in sorted(heads):
      self._start[task] = len(self._owners)
      self._owners += [task] * len(heads[task])

  def check_all(self):
    """Raises if any task has a derivative in another task's head."""
    for i in range(len(self._partition.task_names)):
      self.loss(i)

  def head_of(self, task, leaves):
    """The part for a head among flattened arguments or their gradients."""
    start = self._start[task]
    return leaves[start : start + len(self._heads[task])]

  def loss(self, i):
    """Loss i; raises if it has a derivative in another task's head."""
    names = self._partition.task_names
    loss = self.program.loss(i)
    foreign = {
      self._owners[k]
      for k in loss.places
      if self._owners[k] not in (None, names[i])
    }
    if foreign and self.program.separable:
      paths = self._partition.split(
        self._partition.tree([x or 'the root' for x in self._partition.paths])
      )[1]
      dependencies.check_independent(
        f"the loss of task {names[i]!r} must not depend on another task's head "
        "(a leaf that several tasks use is shared: label it 'shared' in "
        'param_labels; one custom_vjp for all losses hides what each of them '
        'uses)',
        lambda others: _order.as_scalars(
          self._losses_fn(self._shared, {**self._heads, **others})[0], names
        )[i],
        {task: self._heads[task] for task in foreign},
        {task: paths[task] for task in foreign},
      )
    return loss

  def with_own(self, i, shared, head):
    """The flattened arguments with new shared leaves and a new head i."""
    start = self._start[self._partition.task_names[i]]
    rest = self.leaves[len(shared) :]
    given = [*shared, *rest]
    given[start : start + len(head)] = head
    return given

  def gradient(self, i, found):
    """Task i's gradient from `{place: gradient}`; zeros for missing places."""
    start = self._start[self._partition.task_names[i]]
    head = self._heads[self._partition.task_names[i]]
    pick = lambda leaves, start: [
      found[k] if k in found else jnp.zeros_like(x)
      for k, x in enumerate(leaves, start)
    ]
    return pick(self._shared, 0), pick(head, start)


def evaluation(traced):
  """`(i, shared, head) -> (loss i, its gradient)`, from one trace for all i."""
  dtype = jnp.result_type(*jax.tree.leaves(traced.program.losses))

  def evaluate(i, shared, head):
    loss = traced.loss(i)

    def own_loss(shared, head):
      given = traced.with_own(i, shared, head)
      return loss.run(*(given[k] for k in loss.places)).astype(dtype)

    return jax.value_and_grad(own_loss, argnums=(0, 1))(shared, head)

  return evaluate
