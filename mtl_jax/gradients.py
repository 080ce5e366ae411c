"""Gradients of every task, in one forward pass.

`task_grad` turns a function that gives one loss per task into two: the task
gradients at given parameters, and those with every task at parameters of its
own, which is what `flat_minima` asks for. How the T evaluations run is chosen
here and nowhere else.
"""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtl_jax import micro_batches as accumulation
from mtl_jax import transforms
from mtl_jax import types
from mtl_jax.transforms.contract import arguments
from mtl_jax.transforms.contract import labels

ENGINES = ('auto', 'unroll', 'vmap', 'scan')


class TaskGrad(NamedTuple):
  """What `task_grad` returns.

  Attributes:
    at: `(params, *args) -> ((losses [T], aux), task_grads)`: all tasks at the
      same parameters; one forward pass, T pull-backs. aux is None without
      `has_aux`.
    at_each: `(task_params, *args) -> (losses [T], task_grads)`: task i at its
      own parameters, row i of shared leaves [T, *shape]; all other leaves
      [*shape].
  """

  at: Callable[..., tuple[tuple[jax.Array, Any], types.TaskGrads]]
  at_each: Callable[..., tuple[jax.Array, types.TaskGrads]]


class Parts:
  """Parameters as (shared leaves, leaves by task, frozen leaves) and back."""

  def __init__(self, param_labels, tree, task_names):
    self._partition = labels.Partition(param_labels, tree, task_names)
    self._labels = self._partition.labels
    self._task_names = task_names

  def split(self, tree):
    leaves = self._partition.leaves(tree)
    pick = lambda label: [
      x for x, own in zip(leaves, self._labels, strict=True) if own == label
    ]
    heads = {task: pick(task) for task in self._task_names}
    return pick(labels.SHARED), heads, pick(labels.FROZEN)

  def join(self, shared, heads, frozen):
    parts = {
      labels.SHARED: iter(shared),
      labels.FROZEN: iter(frozen),
      **{task: iter(head) for task, head in heads.items()},
    }
    return self._partition.tree([next(parts[own]) for own in self._labels])


def task_grad(
  loss_fn: Callable[..., Any],
  task_names: Sequence[str],
  *,
  param_labels: transforms.ParamLabels = transforms.default_labels,
  engine: str = 'auto',
  micro_batches: int = 1,
  has_aux: bool = False,
) -> TaskGrad:
  """Task gradients of a function that gives one loss per task.

  Args:
    loss_fn: `(params, *args) -> {task: scalar}`, or `(losses, aux)` with
      `has_aux`. An array [T] is accepted in place of the dictionary; the work
      of other tasks' heads is then not always left out.
    task_names: the tasks, in the order of every task axis.
    param_labels: see `mtl_jax.shared_only`. A leaf used by more than one task
      is shared; a task's own leaf must not influence another task's loss.
    engine: how T tasks are evaluated; the numbers are the same. `'unroll'`: one
      after the other in one program, each task's scalar differentiated alone,
      so that other heads cost nothing. `'vmap'`: batched over tasks; every
      head is evaluated for every task. `'scan'`: a loop over tasks, each with
      its own head alone, whose results are written into the stack in place: a
      flat update needs two stacks of temporary memory instead of three.
      `'auto'`: `'scan'` on CPU, where it takes less time too for LeNet and for
      a perceptron of ten tasks and 4 % more for ResNet-18
      (results/benchmarks/joint_update.json); `'unroll'` elsewhere.
    micro_batches: n; the batch is cut into n slices whose task gradients are
      averaged by label counts, before anything is made of them. The first of
      `*args` is the batch: all its leaves [B, ...] are cut, row r going to
      slice r mod n; `batch['mask'][task]`, where it is there, holds the counts.
      Other arguments (a key, say) go to each slice as they are. Leaves of aux
      come back with a leading axis n.
    has_aux: whether `loss_fn` returns `(losses, aux)`. `at_each` drops aux.

  Returns:
    `TaskGrad(at, at_each)`. In task gradients a shared leaf is [T, *shape], a
    head's leaf [*shape] holds the gradient of its own task's loss, and a
    frozen leaf is zero.

  Raises:
    ValueError: for another engine, `micro_batches` below 1 or that does not
      divide the batch, and for losses that are not one scalar per task.

  Examples:
    >>> import jax.numpy as jnp, mtl_jax
    >>> params = {'shared': jnp.array(2.0), 'heads': {'a': jnp.array(3.0),
    ...           'b': jnp.array(5.0)}}
    >>> def loss_fn(params, x):
    ...   return {task: params['shared'] * head * x
    ...           for task, head in params['heads'].items()}
    >>> at, at_each = mtl_jax.task_grad(loss_fn, ('a', 'b'))
    >>> (losses, _), grads = at(params, 1.0)
    >>> print(losses, grads['shared'], grads['heads']['b'])
    [ 6. 10.] [3. 5.] 2.0
    >>> own = {'shared': jnp.array([2.0, 4.0]), 'heads': params['heads']}
    >>> losses, grads = at_each(own, 1.0)
    >>> print(losses, grads['shared'], grads['heads']['b'])
    [ 6. 20.] [3. 5.] 4.0
  """
  names = labels.check_task_names(task_names)
  arguments.one_of('engine', engine, ENGINES)
  if micro_batches < 1:
    raise ValueError(f'micro_batches must be at least 1, got {micro_batches}')
  size = len(names)
  if engine == 'auto':
    engine = 'scan' if jax.default_backend() == 'cpu' else 'unroll'

  def losses_of(params, *args):
    """The losses as a tuple of T scalars, and aux."""
    out = loss_fn(params, *args)
    losses, aux = out if has_aux else (out, None)
    return as_scalars(losses, names), aux

  def at(params, *args):
    parts = Parts(param_labels, params, names)
    shared, heads, frozen = parts.split(params)

    def f(shared, heads):
      return losses_of(parts.join(shared, heads, frozen), *args)

    losses, pull, aux = jax.linearize(f, shared, heads, has_aux=True)

    def pull_back(i):
      """Gradient of task i's loss alone: shared leaves and its own head."""
      # All tangents are arguments: numbers in the place of one, zeros included,
      # would be computed with, and custom gradients refuse them.
      transposed = jax.linear_transpose(
        lambda *dots: pull(*dots)[i], shared, heads
      )
      shared_grad, head_grads = transposed(jnp.ones_like(losses[i]))
      return shared_grad, head_grads[names[i]]

    if engine == 'unroll':
      grads = [pull_back(i) for i in range(size)]
      stack = [
        jnp.stack(rows) for rows in zip(*(g[0] for g in grads), strict=True)
      ]
      own_heads = {task: g[1] for task, g in zip(names, grads, strict=True)}
    elif engine == 'vmap':
      transposed = jax.linear_transpose(
        lambda *dots: jnp.stack(pull(*dots)), shared, heads
      )
      one_hot = jnp.diag(jnp.ones_like(jnp.stack(losses)))
      stack, _ = jax.vmap(transposed)(one_hot)
      own_heads = {task: pull_back(i)[1] for i, task in enumerate(names)}
    else:
      _, stack, own_heads = _scan_tasks(
        lambda i, _: (losses[i], *pull_back(i)),
        names,
        [_zeros_like(x, size) for x in shared],
        heads,
        losses[0],
      )
    zeros = jax.tree.map(jnp.zeros_like, frozen)
    return (jnp.stack(losses), aux), parts.join(stack, own_heads, zeros)

  def at_each(task_params, *args):
    parts = Parts(param_labels, task_params, names)
    stack, heads, frozen = parts.split(task_params)

    def own_loss(i, shared, head):
      losses, _ = losses_of(
        parts.join(shared, {**heads, names[i]: head}, frozen), *args
      )
      return losses[i]

    def evaluate(i, shared):
      return jax.value_and_grad(own_loss, argnums=(1, 2))(
        i, shared, heads[names[i]]
      )

    if engine == 'unroll':
      found = [evaluate(i, [x[i] for x in stack]) for i in range(size)]
      losses = jnp.stack([loss for loss, _ in found])
      shared_grads = [
        jnp.stack(rows)
        for rows in zip(*(grads[0] for _, grads in found), strict=True)
      ]
      own_heads = {
        task: grads[1] for task, (_, grads) in zip(names, found, strict=True)
      }
    elif engine == 'vmap':

      def total(stack, heads):
        # The index keeps the map alive where nothing is shared.
        each = jax.vmap(
          lambda i, shared: jnp.stack(
            losses_of(parts.join(shared, heads, frozen), *args)[0]
          )[i]
        )
        own = each(jnp.arange(size), stack)
        return jnp.sum(own), own

      grads, losses = jax.grad(total, argnums=(0, 1), has_aux=True)(
        stack, heads
      )
      shared_grads, own_heads = grads
    else:

      def of_task(i, shared):
        loss, (shared_grad, head_grad) = evaluate(i, shared)
        return loss, shared_grad, head_grad

      loss = jax.eval_shape(
        lambda: own_loss(0, [x[0] for x in stack], heads[names[0]])
      )
      losses, shared_grads, own_heads = _scan_tasks(
        of_task, names, stack, heads, loss
      )
    zeros = jax.tree.map(jnp.zeros_like, frozen)
    return losses, parts.join(shared_grads, own_heads, zeros)

  if micro_batches == 1:
    return TaskGrad(at, at_each)
  return TaskGrad(
    *accumulation.accumulated((at, at_each), names, param_labels, micro_batches)
  )


def as_scalars(losses: Any, names: tuple[str, ...]) -> tuple[jax.Array, ...]:
  """Losses, as a loss function returns them, in the order of the tasks."""
  if isinstance(losses, Mapping):
    if set(losses) != set(names):
      raise ValueError(
        f'loss_fn must return a loss for each of {names}, got {tuple(losses)}'
      )
    scalars = tuple(jnp.asarray(losses[task]) for task in names)
  else:
    losses = jnp.asarray(losses)
    if losses.shape != (len(names),):
      raise ValueError(
        f'loss_fn must return losses of shape ({len(names)},) or a dictionary '
        f'of scalars, got shape {losses.shape}'
      )
    scalars = tuple(losses)
  for task, loss in zip(names, scalars, strict=True):
    if loss.shape:
      raise ValueError(
        f'the loss of task {task!r} must be a scalar, got shape {loss.shape}'
      )
  dtype = jnp.result_type(*scalars)
  return tuple(loss.astype(dtype) for loss in scalars)


def _scan_tasks(
  of_task: Callable[..., Any],
  names: tuple[str, ...],
  stack: Any,
  heads: Mapping[str, Any],
  loss: Any,
) -> tuple[jax.Array, Any, dict[str, Any]]:
  """A loop over tasks that writes each result in the place of its input.

  Args:
    of_task: `(i, row i of stack) -> (loss, shared gradient, head gradient)`
      with i a Python integer.
    names: the tasks.
    stack: leaves [T, ...]; row i becomes the shared gradient of task i, so that
      there is one stack and not two.
    heads: {task: leaves}, of the shapes of the head gradients.
    loss: a loss, or its shape and dtype.

  Returns:
    losses [T], shared gradients [T, ...], head gradients by task.
  """

  def branch(i):
    def run(row, own_heads):
      loss, shared_grad, head_grad = of_task(i, row)
      return loss, shared_grad, {**own_heads, names[i]: head_grad}

    return run

  branches = [branch(i) for i in range(len(names))]

  def step(i, carry):
    losses, stack, own_heads = carry
    loss, shared_grad, own_heads = jax.lax.switch(
      i, branches, [x[i] for x in stack], own_heads
    )
    stack = [x.at[i].set(g) for x, g in zip(stack, shared_grad, strict=True)]
    return losses.at[i].set(loss), stack, own_heads

  # Every entry of the carry is overwritten, so the parameters do to start with.
  start = _zeros_like(loss, len(names)), list(stack), dict(heads)
  return jax.lax.fori_loop(0, len(names), step, start)


def _zeros_like(x: Any, size: int) -> jax.Array:
  """Zeros [size, *x.shape] that vary over the mapped axes that `x` does."""
  # A loop's carry must, inside shard_map(check_vma=True).
  return jnp.broadcast_to(jnp.zeros_like(x)[None], (size, *x.shape))
