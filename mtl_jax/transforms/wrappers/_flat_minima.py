"""Task-based flat minima around any aggregator."""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtl_jax.transforms.contract import aggregation
from mtl_jax.transforms.contract import arguments
from mtl_jax.transforms.contract import diagnosis
from mtl_jax.transforms.contract import heads
from mtl_jax.transforms.contract import labels
from mtl_jax.transforms.contract import lifting
from mtl_jax.transforms.contract import meshes
from mtl_jax.transforms.wrappers import ball

_COMBINATIONS = ('separate', 'direct', 'second', 'each')
_PERTURBATIONS = ('global', 'per_device')


class FlatMinimaState(NamedTuple):
  """State of `flat_minima`.

  Attributes:
    loss: the aggregator's state for the loss gradients (the only one with
      `combine='direct'` and `'each'`).
    flat: the aggregator's state for the flat gradients; empty where only one
      aggregation takes place.
    count: number of updates so far, int32; the argument of a schedule of rho.
  """

  loss: Any
  flat: Any
  count: jax.Array  # type: ignore[assignment]

  def diagnostics(self) -> dict[str, Any]:
    """Diagnostics from both states, as `'loss/...'` and `'flat/...'`."""
    parts = {'loss': self.loss, 'flat': self.flat}
    return {
      f'{part}/{name}': value
      for part, state in parts.items()
      for name, value in diagnosis.diagnostics(state).items()
    }


def flat_minima(
  aggregator: optax.GradientTransformation,
  task_names: Sequence[str],
  rho: float | Callable[[jax.Array], Any] = 0.05,
  *,
  rho_heads: float | Callable[[jax.Array], Any] | None = None,
  adaptive: bool = False,
  norm: str = 'separate',
  combine: str = 'separate',
  combiner: optax.GradientTransformation | None = None,
  head_scale: str = 'none',
  perturbation: str = 'global',
  eps: float = 1e-12,
  param_labels: labels.ParamLabels = labels.default_labels,
) -> aggregation.Aggregator:
  r"""Seeks parameters at which every task's loss is flat.

  With the loss gradient :math:`g_i = \nabla L_i(\theta)` of task i, over shared
  parameters and its head, the perturbation, the SAM gradient and the flat
  gradient are

  .. math::
    e_i = \rho \, g_i / |g_i|, \qquad
    s_i = \nabla L_i(\theta + e_i), \qquad
    h_i = s_i - g_i

  and with an aggregator A the update is

  .. math::
    \text{shared: } A(g_1, \dots, g_T) + A(h_1, \dots, h_T), \qquad
    \text{head i: } s_i

  A is called twice, with separate states that start from the same seed. Absent
  tasks are neither perturbed nor updated.

  Args:
    aggregator: A; any aggregator whose update is homogeneous of degree 1 in the
      gradients. The weights of both parts are in the state whether or not it
      was made with `num_tasks`. Its `axis_name` and `shard_axis` also apply to
      the perturbation.
    task_names: the tasks, in the order of the task axis.
    rho: radius of the perturbation, in the units of the parameters, or an optax
      schedule of the number of updates.
    rho_heads: radius for the heads; `rho` if None.
    adaptive: perturb by :math:`\rho \, w^2 g_i / |\, |w|\, g_i |`, elementwise
      in the parameters w (ASAM). This is invariant to their scale.
    norm: `'separate'`: shared part and head are each divided by their own norm
      (paper); `'joint'`: both by the norm over both (the authors' Multi-MNIST
      code).
    combine: `'separate'`: A(g) + A(h). `'direct'`: A(s), the paper's Table 5
      ablation. `'second'`: `combiner` of A(g) and A(h). `'each'`: A of
      `combiner` of g_i and h_i (Table 6).
    combiner: an aggregator of two rows, without state, called without losses
      and active; sums if None. Only for `'second'` and `'each'`.
    head_scale: `'none'`, or `'weights'` to multiply s_i of the heads by the
      weights of the loss part.
    perturbation: only with `axis_name`. `'global'`: every replica perturbs by
      the task gradients of all replicas. `'per_device'`: each replica perturbs
      by its local task gradients and their norm (m-sharpness, with m the
      examples on a replica); loss and SAM gradients are then averaged once,
      after the second pass, instead of after each pass. A replica without
      labels of a task does not perturb it.
    eps: added to the norm, so that a zero gradient is not perturbed.
    param_labels: see `shared_only`; `'frozen'` leaves are neither perturbed nor
      updated.

  Returns:
    An aggregator. Do not wrap it in `shared_only`. Its `update` needs `params`
    and the keyword `grad_fn`: a function from task parameters (laid out like
    task gradients: shared leaves [T, *shape] whose row i is for task i, all
    others [*shape]) to task gradients of the same layout, with the same batch
    and the same randomness as the gradients passed in. Around a method that
    needs `extra_grads`, `update` also needs `extra_grad_fn`, from task
    parameters to a tuple of such stacks. Their flat gradients are taken at the
    same perturbed parameters. `losses` and `active` may be {task: value}.

  Raises:
    TypeError: for anything but an aggregator, and for a radius that is neither
      a number nor a schedule.
    ValueError: for a negative radius or eps, another `norm`, `combine`,
      `head_scale` or `perturbation`, `'per_device'` without `axis_name`, a
      combiner with state, and a combiner that `combine` does not use; at
      `update` without `params`, `grad_fn` or, where needed, `extra_grad_fn`,
      and for leaves with another shape.

  Examples:
    Two tasks, each :math:`\frac12 |\theta - c_i|^2`. The perturbation moves
    :math:`\theta` away from each centre, so that the flat gradient is the
    perturbation itself:

    >>> import jax.numpy as jnp, mtl_jax
    >>> centres = jnp.array([[1.0, 0.0], [0.0, 2.0]])
    >>> grad_fn = lambda task_params: task_params - centres
    >>> params = jnp.zeros(2)
    >>> tx = mtl_jax.flat_minima(mtl_jax.linear(), ('a', 'b'), rho=0.1)
    >>> updates, _ = tx.update(
    ...   params - centres, tx.init(params), params, grad_fn=grad_fn)
    >>> jnp.set_printoptions(precision=3)
    >>> print(updates)
    [-0.55 -1.05]

  References:
    Phan et al., `Improving Multi-task Learning via Seeking Task-based Flat
    Regions <https://arxiv.org/abs/2211.13723>`_, 2022, Algorithm 1

    Foret et al., `Sharpness-Aware Minimization
    <https://arxiv.org/abs/2010.01412>`_, 2020, eq. 2; m-sharpness is from
    section 4.1

    Kwon et al., `ASAM <https://arxiv.org/abs/2102.11600>`_, 2021
  """
  names = labels.check_task_names(task_names)
  size = len(names)
  inner = aggregation.as_inner('flat_minima', aggregator).for_tasks(size)
  axes = inner.axes
  arguments.one_of('combine', combine, _COMBINATIONS)
  arguments.one_of('head_scale', head_scale, heads.HEAD_SCALES)
  arguments.one_of('perturbation', perturbation, _PERTURBATIONS)
  if perturbation == 'per_device' and axes.axis_name is None:
    raise ValueError(
      "perturbation='per_device' needs an aggregator made with axis_name"
    )
  if combiner is not None and combine not in ('second', 'each'):
    raise ValueError(f'combiner has no use with combine={combine!r}')
  if combiner is not None:
    combiner = aggregation.as_inner('flat_minima', combiner, 'combiner')
  in_ball = ball.Perturbation(rho, rho_heads, adaptive, norm, eps)
  two_states = combine in ('separate', 'second')

  def add(first, second):
    """`combiner` of two trees; their sum by default."""
    if combiner is None:
      return jax.tree.map(jnp.add, first, second)
    rows = jax.tree.map(lambda a, b: jnp.stack([a, b]), first, second)
    updates, _ = combiner.update(rows, combiner.init(first), None)
    return updates

  def init(params):
    partition = labels.Partition(param_labels, params, names)
    shared = partition.shared(partition.leaves(params))
    if combiner is not None and jax.tree.leaves(combiner.init(shared)):
      raise ValueError(
        'combiner must have no state (no seed, no num_tasks): the state of one '
        'call has no meaning for the next'
      )
    loss = inner.init(shared)
    if head_scale == 'weights' and any(o is not None for o in partition.owners):
      heads.head_weights(loss)
    return FlatMinimaState(
      loss=loss,
      flat=inner.init(shared) if two_states else optax.EmptyState(),
      count=jnp.zeros((), jnp.int32),
    )

  def aggregate(
    task_grads,
    state,
    params=None,
    *,
    grad_fn=None,
    losses=None,
    active=None,
    extra_grads=None,
    extra_grad_fn=None,
    **extra_args,
  ):
    if params is None:
      raise ValueError('flat_minima needs params at update')
    if grad_fn is None:
      raise ValueError(
        'flat_minima needs the keyword grad_fn at update: a function from task '
        'parameters to task gradients'
      )
    extra_grads = lifting.check_extra_grads(extra_grads, inner.extra_batches)
    if extra_grads and extra_grad_fn is None:
      raise ValueError(
        'flat_minima around a method with extra_grads needs the keyword '
        'extra_grad_fn at update: a function from task parameters to the '
        'tuple of stacks'
      )
    partition = labels.Partition(param_labels, params, names)
    param_leaves = partition.leaves(params)
    losses = aggregation.in_order('losses', losses, names)
    active = aggregation.in_order('active', active, names)
    present = None
    if active is not None:
      present = aggregation.full_active(active, size)

    def read(grads):
      leaves = partition.leaves(grads)
      partition.check(leaves, param_leaves)
      if present is None:
        return leaves
      # Shared rows are masked where they are used: a masked copy would be one
      # more stack in memory.
      return [
        g if owner is None else jnp.where(present[owner], g, 0)
        for g, owner in zip(leaves, partition.owners, strict=True)
      ]

    grads = read(task_grads)

    def perturb(grads, params, radii, present):
      return ball.perturbed(
        partition,
        grads,
        params,
        dataclasses.replace(in_ball, rho=radii[0], rho_heads=radii[1]),
        state.count,
        axes=axes,
        present=present,
      )

    task_params = meshes.with_automatic_axes(
      perturb,
      lambda: partition.tree([meshes.spec(g) for g in grads]),
      grads,
      param_leaves,
      in_ball.radii(state.count),
      present,
    )
    task_params = axes.replicate(task_params)
    # The batch's own gradients come first, then those of further batches.
    of_losses = [task_grads, *extra_grads]
    of_sam = [grad_fn(task_params)]
    if extra_grads:
      moved = extra_grad_fn(task_params)
      of_sam += lifting.check_extra_grads(moved, inner.extra_batches)
    if perturbation == 'per_device':
      # XLA also drops the exchange of values that are not used from here on.
      of_losses, of_sam = axes.average((of_losses, of_sam))
      losses = axes.average_losses(losses)
    else:
      of_sam = axes.average(of_sam)
    loss_stacks, sam_stacks = (
      list(map(read, of_losses)),
      list(map(read, of_sam)),
    )
    sam_grads = sam_stacks[0]

    shared_params = partition.shared(param_leaves)

    def flat_part(loss, sam):
      return meshes.with_automatic_axes(
        lambda loss, sam, present: ball.flat_part(
          partition, loss, sam, axes, present
        ),
        lambda: [meshes.spec(g) for g in sam],
        loss,
        sam,
        present,
      )

    def call(stacks, inner_state):
      return inner.aggregate(
        stacks[0],
        inner_state,
        shared_params,
        losses=losses,
        active=active,
        extra_grads=tuple(stacks[1:]),
        **extra_args,
      )

    loss_state, flat_state = state.loss, state.flat
    if combine == 'direct':
      sam = [partition.shared(leaves) for leaves in sam_stacks]
      shared, loss_state = call(sam, loss_state)
    else:
      loss = [partition.shared(leaves) for leaves in loss_stacks]
      flat = [
        partition.shared(flat_part(*pair))
        for pair in zip(loss_stacks, sam_stacks, strict=True)
      ]
      if combine == 'each':
        both = [jax.vmap(add)(*pair) for pair in zip(loss, flat, strict=True)]
        shared, loss_state = call(both, loss_state)
      else:
        of_loss, loss_state = call(loss, loss_state)
        of_flat, flat_state = call(flat, flat_state)
        if combine == 'separate':
          shared = jax.tree.map(jnp.add, of_loss, of_flat)
        else:
          shared = add(of_loss, of_flat)

    weights = None
    if head_scale == 'weights' and any(o is not None for o in partition.owners):
      weights = heads.head_weights(loss_state)
    shared_leaves = iter(jax.tree.leaves(shared))
    updates = []
    for grad, label, owner in zip(
      sam_grads, partition.labels, partition.owners, strict=True
    ):
      if label == labels.SHARED:
        updates.append(next(shared_leaves))
      elif owner is None:
        updates.append(jnp.zeros_like(grad))
      else:
        updates.append(heads.scale_head(grad, owner, weights, present))
    count = optax.safe_increment(state.count)
    return partition.tree(updates), FlatMinimaState(
      loss_state, flat_state, count
    )

  def after_step(new_losses, state, *, active=None):
    move = lambda inner_state: inner.after_step(
      new_losses, inner_state, active=active
    )
    flat = move(state.flat) if two_states else state.flat
    return state._replace(loss=move(state.loss), flat=flat)

  return aggregation.Aggregator(
    init,
    aggregate,
    # Each replica perturbs by its local gradients before they are averaged.
    axes=axes if perturbation == 'global' else axes._replace(axis_name=None),
    head_scale=head_scale,
    extra_batches=inner.extra_batches,
    outermost=True,
    after_step=after_step if inner.after_step else None,
  )
