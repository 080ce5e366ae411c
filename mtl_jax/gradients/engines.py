"""Engines that evaluate the gradients of T tasks in turn or at once.

The numbers are the same for every engine; time and memory are not.
"""

from typing import Any

import jax
import jax.numpy as jnp

from mtl_jax import types
from mtl_jax.gradients import _loop
from mtl_jax.gradients import _order
from mtl_jax.gradients import _owners
from mtl_jax.gradients import linearization
from mtl_jax.transforms.contract import labels

ENGINES = ('auto', 'unroll', 'vmap', 'scan')


def platform_engine(engine: str) -> str:
  """The engine that `'auto'` means on this platform, or the given engine."""
  if engine != 'auto':
    return engine
  return 'scan' if jax.default_backend() == 'cpu' else 'unroll'


def at(
  loss_fn: _order.LossFn,
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
  found = linearization.pull_backs(loss_fn, names, param_labels, params, *args)
  shared, heads, frozen = found.params
  linear, size = found.linear, len(names)
  if engine == 'unroll':
    grads = [linear.task(i) for i in range(size)]
    stack = [jnp.stack(x) for x in zip(*(g[0] for g in grads), strict=True)]
    own_heads = {task: g[1] for task, g in zip(names, grads, strict=True)}
  else:
    _, stack, own_heads = _loop.scan_tasks(
      lambda i, _: (linear.losses[i], *linear.task(i)),
      names,
      [_loop.zeros_like(x, size) for x in shared],
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

  traced = _owners.Owned(f, f, partition, shared, heads)
  traced.check_all()
  found = traced.program.pull_back(traced.leaves)
  out, aux = found.value
  losses = jnp.stack(_order.as_scalars(out, names))
  shared_of = lambda weights: found.pull(weights)[: len(shared)]
  rows = jax.vmap(shared_of)(jnp.diag(jnp.ones_like(losses)))
  # A head's gradient comes from its own loss alone: one pull-back for all.
  own = found.pull(jnp.ones_like(losses))
  own_heads = {task: traced.head_of(task, own) for task in names}
  zeros = jax.tree.map(jnp.zeros_like, frozen)
  grads = partition.join(rows, own_heads, zeros)
  return (losses, aux), grads


def at_each(
  loss_fn: _order.LossFn,
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

  traced = _owners.Owned(f, f, partition, [x[0] for x in stack], heads)
  if engine == 'vmap':
    traced.check_all()

    def total(stack, heads):
      def own_loss(i, shared):
        # The other losses contribute nothing, even if their derivatives are
        # NaN.
        only = jnp.arange(size) == i
        leaves = jax.tree.leaves((shared, heads))
        # Heads are the same in all rows, and guarded they would not be.
        of_heads = range(len(shared), len(leaves))
        out, _ = traced.program.values(leaves, only, of_heads)
        return jnp.stack(_order.as_scalars(out, names))[i]

      # The index keeps the map alive if nothing is shared.
      own = jax.vmap(own_loss)(jnp.arange(size), stack)
      return jnp.sum(own), own

    grads, losses = jax.grad(total, argnums=(0, 1), has_aux=True)(stack, heads)
    shared_grads, own_heads = grads
  else:
    evaluate = _owners.evaluation(traced)

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
      losses, shared_grads, own_heads = _loop.scan_tasks(
        of_task, names, stack, heads, loss
      )
  zeros = jax.tree.map(jnp.zeros_like, frozen)
  return losses, partition.join(shared_grads, own_heads, zeros)
