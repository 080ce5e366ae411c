"""Aggregation of the shared parameters; heads pass through."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

from mtl_jax.transforms.contract import aggregation
from mtl_jax.transforms.contract import arguments
from mtl_jax.transforms.contract import heads
from mtl_jax.transforms.contract import labels
from mtl_jax.transforms.contract import lifting


def shared_only(
  aggregator: optax.GradientTransformation,
  task_names: Sequence[str],
  *,
  param_labels: labels.ParamLabels = labels.default_labels,
  head_scale: str | None = None,
) -> aggregation.Aggregator:
  """Aggregates the shared leaves and lets the heads pass.

  Args:
    aggregator: any aggregator; it sees only the shared leaves. Its weights are
      in the state whether or not it was made with `num_tasks`.
    task_names: the tasks, in the order of the task axis.
    param_labels: a tree of strings (a prefix of the parameters' tree will do)
      or a function from parameters to one: `'shared'`, a task's name, or
      `'frozen'` (zero update).
    head_scale: `'none'` or `'weights'`, which multiplies each head's gradient
      by its task's weight. None takes the aggregator's default: `'none'` for
      all except `linear`, which has `'weights'` so that equal weights give the
      gradient of the mean loss, heads included.

  Returns:
    An aggregator: shared leaves [T, *shape] and head leaves [*shape] in, leaves
    [*shape] out. Its state is the state of `aggregator`. At `update`, `losses`
    and `active` may be {task: value} too.

  Raises:
    TypeError: for anything but an aggregator.
    ValueError: for `flat_minima`, for another `head_scale`, for an aggregator
      with another number of tasks, for `'weights'` with a method without
      weights; at `init` and `update` for labels that name no task and for
      leaves that are neither frozen nor real floating-point arrays; at `update`
      for leaves with another shape.

  Examples:
    >>> import jax.numpy as jnp, mtl_jax
    >>> params = {'shared': jnp.zeros(2), 'heads': {'a': jnp.zeros(1),
    ...           'b': jnp.zeros(1)}}
    >>> task_grads = {'shared': jnp.array([[1.0, 0.0], [-2.0, 2.0]]),
    ...               'heads': {'a': jnp.ones(1), 'b': jnp.ones(1)}}
    >>> tx = mtl_jax.shared_only(mtl_jax.mgda(), ('a', 'b'))
    >>> updates, _ = tx.update(task_grads, tx.init(params), params)
    >>> jnp.set_printoptions(precision=3)
    >>> print(updates['shared'], updates['heads']['a'])
    [0.308 0.462] [1.]
  """
  names = labels.check_task_names(task_names)
  inner = aggregation.as_inner('shared_only', aggregator).for_tasks(len(names))
  head_scale = inner.head_scale if head_scale is None else head_scale
  arguments.one_of('head_scale', head_scale, heads.HEAD_SCALES)

  def init(params):
    partition = labels.Partition(param_labels, params, names)
    state = inner.init(partition.shared(partition.leaves(params)))
    # A user who asks for weights from a method without any gets the error at
    # once. If `'weights'` is the method's default, it is raised only if there
    # is a head.
    if head_scale == 'weights' and any(o is not None for o in partition.owners):
      heads.head_weights(state)
    return state

  def aggregate(
    task_grads, state, params=None, *, losses=None, active=None, **extra_args
  ):
    partition = labels.Partition(param_labels, task_grads, names)
    grads = partition.leaves(task_grads)
    if inner.extra_batches:
      extra_args['extra_grads'] = tuple(
        partition.shared(partition.leaves(stack))
        for stack in lifting.check_extra_grads(
          extra_args.get('extra_grads'), inner.extra_batches
        )
      )
    shared_params = None
    if params is not None:
      param_leaves = partition.leaves(params)
      partition.check(grads, param_leaves)
      shared_params = partition.shared(param_leaves)
    present = None
    if active is not None:
      active = aggregation.in_order('active', active, names)
      present = aggregation.full_active(active, len(names))
    extra_args['losses'] = aggregation.in_order('losses', losses, names)
    shared_updates, state = inner.aggregate(
      partition.shared(grads),
      state,
      shared_params,
      active=active,
      **extra_args,
    )
    shared = iter(jax.tree.leaves(shared_updates))
    weights = None
    if head_scale == 'weights' and any(o is not None for o in partition.owners):
      weights = heads.head_weights(state)
    updates = []
    for grad, label, owner in zip(
      grads, partition.labels, partition.owners, strict=True
    ):
      if label == labels.SHARED:
        updates.append(next(shared))
      elif owner is None:
        updates.append(jnp.zeros_like(grad))
      else:
        updates.append(heads.scale_head(grad, owner, weights, present))
    return partition.tree(updates), state

  return aggregation.Aggregator(
    init,
    aggregate,
    axes=inner.axes,
    head_scale=head_scale,
    extra_batches=inner.extra_batches,
    weights=inner.weights,
    after_step=inner.after_step,
  )
