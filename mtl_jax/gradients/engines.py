"""Engines that evaluate the gradients of T tasks in turn or at once.

The numbers are the same for every engine; time and memory are not.
"""

from collections.abc import Callable
from collections.abc import Mapping
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax import types
from mtl_jax.gradients import _programs
from mtl_jax.gradients import dependencies
from mtl_jax.transforms.contract import labels

ENGINES = ('auto', 'unroll', 'vmap', 'scan')

# `(params, *args) -> (losses, aux)`, losses {task: scalar} or [T].
LossFn = Callable[..., tuple[Any, Any]]
# The gradient of one task: shared leaves, and leaves of its head.
Own = tuple[list[Any], list[Any]]


class Linear(NamedTuple):
  """One forward pass of all tasks, with any number of pull-backs.

  Attributes:
    losses: [T].
    aux: the second result of the function.
    task: `i -> (shared leaves, leaves of head i)`, the gradient of loss i.
    weighted: `weights [T] -> shared leaves`, the gradient of a weighted sum.
  """

  losses: jax.Array
  aux: Any
  task: Callable[[int], Own]
  weighted: Callable[[jax.Array], list[Any]]


class PullBacks(NamedTuple):
  """A `Linear` in the parameters, with the functions around it.

  Attributes:
    linear: the forward pass.
    params: the parameters: shared leaves, leaves by task, frozen leaves.
    join: `(shared, heads, frozen) -> tree`, laid out as the parameters.
    elsewhere: `(i, shared leaves, leaves of head i) -> gradient` of loss i at
      other parameters: one more forward and backward pass.
  """

  linear: Linear
  params: tuple[list[Any], dict[str, list[Any]], list[Any]]
  join: Callable[..., Any]
  elsewhere: Callable[[int, Any, Any], Own]


def platform_engine(engine: str) -> str:
  """The engine that `'auto'` means on this platform, or the given engine."""
  if engine != 'auto':
    return engine
  return 'scan' if jax.default_backend() == 'cpu' else 'unroll'


def linearized(
  f: Callable[[list[Any], dict[str, list[Any]]], tuple[Any, Any]],
  partition: labels.Partition,
  shared: list[Any],
  heads: dict[str, list[Any]],
) -> Linear:
  """Evaluates all losses once.

  Args:
    f: `(shared, heads) -> (losses, aux)`, losses {task: scalar} or [T].
    partition: the parameters' partition, for names and paths of heads.
    shared: leaves that all tasks may use.
    heads: {task: leaves} that only this task may use.

  Returns:
    A `Linear`.

  Raises:
    ValueError: for losses that are not one scalar a task; when a task is pulled
      back, if its loss depends on another task's head.
  """
  names = partition.task_names

  out, pull, aux = jax.linearize(
    lambda *args: _ordered(f(*args), names), shared, heads, has_aux=True
  )
  losses = jnp.stack(as_scalars(out, names))
  own = _Owned(lambda *dots: (pull(*dots), ()), f, partition, shared, heads)

  def task(i):
    loss = own.loss(i)
    leaves = [own.leaves[k] for k in loss.places]
    if not leaves:
      return own.gradient(i, {})
    # All tangents are arguments. XLA would compute with constants in their
    # place, even with zeros, and custom gradients refuse them.
    transposed = jax.linear_transpose(loss.run, *leaves)
    cotangents = transposed(jnp.ones_like(out[i]))
    return own.gradient(i, dict(zip(loss.places, cotangents, strict=True)))

  def weighted(weights):
    stacked = lambda *dots: jnp.stack(as_scalars(pull(*dots), names))
    transposed = jax.linear_transpose(stacked, shared, heads)
    return transposed(weights.astype(losses.dtype))[0]

  return Linear(losses, aux, task, weighted)


def pull_backs(
  loss_fn: LossFn,
  names: tuple[str, ...],
  param_labels: labels.ParamLabels,
  params: types.Params,
  *args: Any,
) -> PullBacks:
  """Evaluates all losses once; see `PullBacks` and `linearized`."""
  partition = labels.Partition(param_labels, params, names)
  shared, heads, frozen = partition.split(params)

  def f(shared, heads):
    return loss_fn(partition.join(shared, heads, frozen), *args)

  def elsewhere(i, of_shared, of_head):
    traced = _Owned(f, f, partition, of_shared, heads)
    return _evaluation(traced)(i, of_shared, of_head)[1]

  return PullBacks(
    linearized(f, partition, shared, heads),
    (shared, heads, frozen),
    partition.join,
    elsewhere,
  )


def at(
  loss_fn: LossFn,
  names: tuple[str, ...],
  param_labels: labels.ParamLabels,
  engine: str,
  params: types.Params,
  *args: Any,
) -> tuple[tuple[jax.Array, Any], types.TaskGrads]:
  """Losses [T], aux and task gradients of all tasks at the same parameters."""
  engine = platform_engine(engine)
  if engine == 'vmap':
    return _at_batched(loss_fn, names, param_labels, params, *args)
  found = pull_backs(loss_fn, names, param_labels, params, *args)
  shared, heads, frozen = found.params
  linear, size = found.linear, len(names)
  if engine == 'unroll':
    grads = [linear.task(i) for i in range(size)]
    stack = [jnp.stack(x) for x in zip(*(g[0] for g in grads), strict=True)]
    own_heads = {task: g[1] for task, g in zip(names, grads, strict=True)}
  else:
    _, stack, own_heads = _scan_tasks(
      lambda i, _: (linear.losses[i], *linear.task(i)),
      names,
      [_zeros_like(x, size) for x in shared],
      heads,
      linear.losses[0],
    )
  zeros = jax.tree.map(jnp.zeros_like, frozen)
  return (linear.losses, linear.aux), found.join(stack, own_heads, zeros)


def _at_batched(loss_fn, names, param_labels, params, *args):
  """`at` with pull-backs that are batched over tasks."""
  partition = labels.Partition(param_labels, params, names)
  shared, heads, frozen = partition.split(params)

  def f(shared, heads):
    return loss_fn(partition.join(shared, heads, frozen), *args)

  traced = _Owned(f, f, partition, shared, heads)
  traced.check_all()
  found = traced.program.pull_back(traced.leaves)
  out, aux = found.value
  losses = jnp.stack(as_scalars(out, names))
  rows = jax.vmap(found.pull)(jnp.diag(jnp.ones_like(losses)))
  own_heads = {
    task: [x[i] for x in traced.head_of(task, rows)]
    for i, task in enumerate(names)
  }
  zeros = jax.tree.map(jnp.zeros_like, frozen)
  grads = partition.join(rows[: len(shared)], own_heads, zeros)
  return (losses, aux), grads


def at_each(
  loss_fn: LossFn,
  names: tuple[str, ...],
  param_labels: labels.ParamLabels,
  engine: str,
  task_params: types.TaskGrads,
  *args: Any,
) -> tuple[jax.Array, types.TaskGrads]:
  """Losses [T] and task gradients, every task at its own parameters."""
  partition = labels.Partition(param_labels, task_params, names)
  stack, heads, frozen = partition.split(task_params)
  size = len(names)
  engine = platform_engine(engine)

  def f(shared, heads):
    out, _ = loss_fn(partition.join(shared, heads, frozen), *args)
    return out, ()

  traced = _Owned(f, f, partition, [x[0] for x in stack], heads)
  if engine == 'vmap':
    traced.check_all()

    def total(stack, heads):
      def own_loss(i, shared):
        # The other losses contribute nothing, even if their derivatives are
        # NaN.
        only = jnp.arange(size) == i
        out, _ = traced.program.values(jax.tree.leaves((shared, heads)), only)
        return jnp.stack(as_scalars(out, names))[i]

      # The index keeps the map alive if nothing is shared.
      own = jax.vmap(own_loss)(jnp.arange(size), stack)
      return jnp.sum(own), own

    grads, losses = jax.grad(total, argnums=(0, 1), has_aux=True)(stack, heads)
    shared_grads, own_heads = grads
  else:
    evaluate = _evaluation(traced)

    def of_task(i, shared):
      loss, (shared_grad, head_grad) = evaluate(i, shared, heads[names[i]])
      return loss, shared_grad, head_grad

    if engine == 'unroll':
      found = [of_task(i, [x[i] for x in stack]) for i in range(size)]
      losses = jnp.stack([loss for loss, _, _ in found])
      shared_grads = [
        jnp.stack(rows) for rows in zip(*(g for _, g, _ in found), strict=True)
      ]
      own_heads = {
        t: head for t, (_, _, head) in zip(names, found, strict=True)
      }
    else:
      loss = jax.eval_shape(lambda: of_task(0, [x[0] for x in stack])[0])
      losses, shared_grads, own_heads = _scan_tasks(
        of_task, names, stack, heads, loss
      )
  zeros = jax.tree.map(jnp.zeros_like, frozen)
  return losses, partition.join(shared_grads, own_heads, zeros)


def _evaluation(traced):
  """`(i, shared, head) -> (loss i, its gradient)`, from one trace for all i."""
  dtype = jnp.result_type(*jax.tree.leaves(traced.program.losses))

  def evaluate(i, shared, head):
    loss = traced.loss(i)

    def own_loss(shared, head):
      given = traced.with_own(i, shared, head)
      return loss.run(*(given[k] for k in loss.places)).astype(dtype)

    return jax.value_and_grad(own_loss, argnums=(0, 1))(shared, head)

  return evaluate


class _Owned:
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
      lambda *trees: _ordered(fn(*trees), names), len(names), shared, heads
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
        'param_labels)',
        lambda others: as_scalars(
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


def as_scalars(losses: Any, names: tuple[str, ...]) -> tuple[jax.Array, ...]:
  """The losses from a loss function, in the order of the tasks."""
  return tuple(in_order(losses, names))


def in_order(losses: Any, names: tuple[str, ...]) -> Any:
  """The losses from a loss function as T scalars of one dtype, or as array [T].

  Args:
    losses: a mapping {task: scalar} in any order, a list of scalars, or [T].
    names: the tasks.

  Raises:
    ValueError: for other tasks, and for losses that are not scalars.
  """
  if isinstance(losses, Mapping):
    if set(losses) != set(names):
      raise ValueError(
        f'loss_fn must return a loss for each of {names}, got {tuple(losses)}'
      )
    scalars = [jnp.asarray(losses[task]) for task in names]
  elif isinstance(losses, list) and len(losses) == len(names):
    scalars = list(map(jnp.asarray, losses))
  else:
    losses = jnp.asarray(losses)
    if losses.shape != (len(names),):
      raise ValueError(
        f'loss_fn must return losses of shape ({len(names)},) or a dictionary '
        f'of scalars, got shape {losses.shape}'
      )
    return losses
  for task, loss in zip(names, scalars, strict=True):
    if loss.shape:
      raise ValueError(
        f'the loss of task {task!r} must be a scalar, got shape {loss.shape}'
      )
  dtype = jnp.result_type(*scalars)
  return [loss.astype(dtype) for loss in scalars]


def _ordered(found, names):
  """The result of a loss function, with its losses `in_order`."""
  losses, aux = found
  return in_order(losses, names), aux


def _scan_tasks(
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

  start = _zeros_like(loss, len(names)), list(stack), kinds.empty()
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
      [_zeros_like(x, len(members)) for x in self._heads[members[0]]]
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


def _zeros_like(x: Any, size: int) -> jax.Array:
  """Zeros [size, *x.shape] that vary over the same mapped axes as `x`."""
  # A loop's carry must, inside shard_map(check_vma=True).
  return jnp.broadcast_to(jnp.zeros_like(x)[None], (size, *x.shape))
