"""One forward pass of all tasks, pulled back one task at a time."""

from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtl_jax import types
from mtl_jax.gradients import _order
from mtl_jax.gradients import _owners
from mtl_jax.transforms.contract import labels

# The gradient of one task: shared leaves, and leaves of its head.
Own = tuple[list[Any], list[Any]]


class Linear(NamedTuple):
  """One forward pass of all tasks, with any number of pull-backs.

  Attributes:
    losses: [T].
    aux: the second result of the function.
    task: `i -> (shared leaves, leaves of head i)`, the gradient of loss i.
    weighted: `weights [T] -> shared leaves`, the gradient of a weighted sum. A
      loss of weight 0 has no part in it.
    elsewhere: `(i, shared leaves, leaves of head i) -> gradient` of loss i at
      other parameters: one more forward and backward pass. None unless asked.
  """

  losses: jax.Array
  aux: Any
  task: Callable[[int], Own]
  weighted: Callable[[jax.Array], list[Any]]
  elsewhere: Callable[[int, Any, Any], Own] | None


class PullBacks(NamedTuple):
  """A `Linear` in the parameters, with the functions around it.

  Attributes:
    linear: the forward pass.
    params: the parameters: shared leaves, leaves by task, frozen leaves.
    join: `(shared, heads, frozen) -> tree`, laid out as the parameters.
  """

  linear: Linear
  params: tuple[list[Any], dict[str, list[Any]], list[Any]]
  join: Callable[..., Any]


def linearized(
  f: Callable[[list[Any], dict[str, list[Any]]], tuple[Any, Any]],
  partition: labels.Partition,
  shared: list[Any],
  heads: dict[str, list[Any]],
  elsewhere: bool = False,
) -> Linear:
  """Evaluates all losses once.

  Args:
    f: `(shared, heads) -> (losses, aux)`, losses {task: scalar} or [T].
    partition: the parameters' partition, for names and paths of heads.
    shared: leaves that all tasks may use.
    heads: {task: leaves} that only this task may use.
    elsewhere: whether losses are to be evaluated at other parameters too.

  Returns:
    A `Linear`.

  Raises:
    ValueError: for losses that are not one scalar a task; when a task is pulled
      back, if its loss depends on another task's head.
  """
  names = partition.task_names

  out, pull, aux = jax.linearize(
    lambda *args: _order.ordered(f(*args), names), shared, heads, has_aux=True
  )
  losses = jnp.stack(_order.as_scalars(out, names))
  own = _owners.Owned(
    lambda *dots: (pull(*dots), ()), f, partition, shared, heads
  )

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

  def all_at_once(weights):
    stacked = lambda *dots: jnp.stack(_order.as_scalars(pull(*dots), names))
    transposed = jax.linear_transpose(stacked, shared, heads)
    return transposed(weights.astype(losses.dtype))[0]

  def one_by_one(weights):
    branches = [lambda k=k: task(k)[0] for k in range(len(names))]

    def add(i, total):
      return [
        t + jnp.where(weights[i] != 0, (weights[i] * g).astype(g.dtype), 0)
        for t, g in zip(total, jax.lax.switch(i, branches), strict=True)
      ]

    start = list(map(jnp.zeros_like, shared))
    return jax.lax.fori_loop(0, len(names), add, start)

  def weighted(weights):
    # A cotangent of 0 does not stop the NaN of an absent task.
    return jax.lax.cond(jnp.all(weights != 0), all_at_once, one_by_one, weights)

  evaluate = None
  if elsewhere:
    traced = _owners.Owned(f, f, partition, shared, heads)
    own_evaluation = _owners.evaluation(traced)
    evaluate = lambda *args: own_evaluation(*args)[1]
  return Linear(losses, aux, task, weighted, evaluate)


def pull_backs(
  loss_fn: _order.LossFn,
  names: tuple[str, ...],
  param_labels: labels.ParamLabels,
  params: types.Params,
  *args: Any,
  elsewhere: bool = False,
) -> PullBacks:
  """Evaluates all losses once; see `PullBacks` and `linearized`."""
  partition = labels.Partition(param_labels, params, names)
  shared, heads, frozen = partition.split(params)

  def f(shared, heads):
    return loss_fn(partition.join(shared, heads, frozen), *args)

  return PullBacks(
    linearized(f, partition, shared, heads, elsewhere),
    (shared, heads, frozen),
    partition.join,
  )
