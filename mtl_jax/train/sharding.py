"""The layout of a step's arrays on a mesh.

A step is written for one device. `Layout` specifies along which axes each array
is cut, and the compiler inserts the communication. Two places need an explicit
layout. Parameters are gathered where a loss function uses them, so that
activations stay with their rows, and their gradients come back in shards.
Stacks of task gradients are cut by tasks during their computation and by
entries during the aggregation.
"""

from collections.abc import Sequence
import dataclasses
import functools
import math
from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

from mtl_jax import gradients
from mtl_jax import transforms
from mtl_jax import types
from mtl_jax.train import distributed
from mtl_jax.transforms.contract import labels

PARAMETERS = ('replicated', 'sharded')

# Any collective takes some microseconds, in which a fast link carries some ten
# thousand bytes. ResNet-18 with two heads has 66 leaves; 45 of them have fewer
# entries than this, together 0.1 % of all.
MIN_SIZE = 2048


@dataclasses.dataclass(frozen=True)
class Layout:
  """The layout of parameters, optimizer states and stacks on a mesh.

  Dividing tasks among devices is for models with dense layers: a convolution
  that is batched over tasks has groups, whose inputs XLA gathers
  (results/benchmarks/communication.json, LeNet).

  A leaf is cut along its longest axis that the number of parts divides. A leaf
  without such an axis, or with fewer than `min_size` entries, stays whole on
  every device.

  Attributes:
    mesh: of `distributed.make_mesh`.
    task_names: the tasks.
    parameters: `'replicated'`, or `'sharded'`: parameters, their optimizer
      state and their rows of the stacks are cut over the mesh's axis `'data'`.
    param_labels: see `mtl_jax.shared_only`.
    min_size: entries of the smallest leaf that is cut.
  """

  mesh: jax.sharding.Mesh
  task_names: tuple[str, ...]
  parameters: str = 'replicated'
  param_labels: transforms.ParamLabels = transforms.default_labels
  min_size: int = MIN_SIZE

  def __post_init__(self):
    if self.parameters not in PARAMETERS:
      raise ValueError(
        f'parallel.parameters must be one of {PARAMETERS}, got '
        f'{self.parameters!r}'
      )
    if len(self.task_names) % self.task_devices:
      raise ValueError(
        'parallel.task_devices must divide the number of tasks, got '
        f'{self.task_devices} for the {len(self.task_names)} tasks '
        f'{self.task_names}'
      )

  @property
  def task_devices(self) -> int:
    """Number of devices along the mesh's axis `'task'`."""
    return self.mesh.shape.get(distributed.TASK_AXIS, 1)

  def engine(self, engine: str) -> str:
    """The engine of `mtl_jax.task_grad` for this layout.

    Args:
      engine: the requested engine.

    Returns:
      The same engine; `'vmap'` for `'auto'` if tasks are divided among devices.

    Raises:
      ValueError: if tasks are divided among devices and the engine takes them
        in turn.
    """
    if self.task_devices == 1:
      return engine
    if engine not in ('auto', 'vmap'):
      raise ValueError(
        f'engine {engine!r} takes tasks in turn, but parallel.task_devices is '
        f"{self.task_devices}: engine must be 'vmap'"
      )
    return 'vmap'

  def of_params(self, params: types.Params) -> Any:
    """The shardings of parameters, or of their shapes."""
    return self._of_tree(params, self._parameter_axes)

  def of_state(self, state: Any) -> Any:
    """The shardings of a training state.

    The state of the update is laid out like aggregated stacks, so that only
    parameters are moved afterwards. In it a leaf [T, *shape] is a stack if a
    parameter has that shape; any other leaf is cut like a parameter with its
    shape.

    Args:
      state: a `TrainState`, or its shapes.

    Returns:
      The same tuple with shardings.
    """
    params = state.params
    shapes = {x.shape for x in jax.tree.leaves(params)}
    updating = lambda tree: self._of_tree(tree, self._aggregation_axes, shapes)
    return state._replace(
      step=self._named(),
      params=self.of_params(params),
      model_state=jax.tree.map(lambda _: self._named(), state.model_state),
      joint=updating(state.joint),
      opt_state=updating(state.opt_state),
    )

  def gather(self, params: types.Params) -> types.Params:
    """Parameters as a loss function needs them, whole on every device.

    Derivatives with respect to them are laid out like the parameters.
    """
    if not self._parameter_axes:
      return params
    return jax.tree.map(
      lambda x, shards: _gathered(x, self._named(), shards),
      params,
      self.of_params(params),
    )

  def around(self, losses: gradients.TaskLosses) -> gradients.TaskLosses:
    """The same losses, with parameters and task gradients laid out.

    Args:
      losses: of `mtl_jax.task_losses`.

    Returns:
      A `TaskLosses`. It has no dense form if parameters are sharded.

    Raises:
      ValueError: see `engine`.
    """
    objective = losses.objective
    if self._parameter_axes:
      gathered = lambda fn: (
        None
        if fn is None
        else lambda params, *args: fn(self.gather(params), *args)
      )
      objective = gradients.Objective(*map(gathered, objective))
      objective = objective._replace(dense_loss_fn=None)
    return dataclasses.replace(
      losses,
      objective=objective,
      engine=self.engine(losses.engine),
      place=self.task_grad,
      task_devices=self.task_devices,
    )

  def task_grad(self, fns: gradients.TaskGrad) -> gradients.TaskGrad:
    """The same functions, with their arguments and results laid out.

    Args:
      fns: of `mtl_jax.task_grad`.

    Returns:
      The pair. Its stacks are cut as an aggregator needs them: each device
      holds all rows for a part of the entries. It then has a part of every
      inner product between two rows, and only [T, T] numbers are summed over
      devices.
    """
    if not self._aggregation_axes:
      return fns

    # All inputs and results of an aggregator are laid out here. Given a choice,
    # the compiler would also cut [T, T] matrices, which needs communication in
    # every iteration of a solver.
    def at(params, *args):
      (losses, aux), task_grads = fns.at(params, *args)
      losses = jax.lax.with_sharding_constraint(losses, self._named())
      return (losses, aux), self._by_entries(self._by_tasks(task_grads))

    def at_each(task_params, *args):
      task_params = self._by_tasks(self._by_entries(task_params))
      losses, task_grads = fns.at_each(task_params, *args)
      return losses, self._by_entries(self._by_tasks(task_grads))

    return gradients.TaskGrad(at, at_each)

  @property
  def _parameter_axes(self) -> tuple[str, ...]:
    return (distributed.DATA_AXIS,) if self.parameters == 'sharded' else ()

  @property
  def _aggregation_axes(self) -> tuple[str, ...]:
    tasks = (distributed.TASK_AXIS,) if self.task_devices > 1 else ()
    return self._parameter_axes + tasks

  def _by_tasks(self, stacks):
    """The stacks with each row on the devices of its task."""
    if self.task_devices == 1:
      return stacks
    return self._constrain(stacks, distributed.TASK_AXIS, self._parameter_axes)

  def _by_entries(self, stacks):
    """The stacks with all rows for a part of the entries on each device."""
    return self._constrain(stacks, None, self._aggregation_axes)

  def _constrain(self, tree, rows, axes):
    """Lays out a tree of task gradients or task parameters."""
    partition = labels.Partition(self.param_labels, tree, self.task_names)
    shardings = [
      self._named(rows, *self._cut(x.shape[1:], axes))
      if label == labels.SHARED
      else self._named(*self._cut(x.shape, axes))
      for x, label in zip(partition.leaves(tree), partition.labels, strict=True)
    ]
    return jax.lax.with_sharding_constraint(tree, partition.tree(shardings))

  def _of_tree(self, tree, axes, stacks_of=frozenset()):
    def sharding(x):
      if x.shape[:1] == (len(self.task_names),) and x.shape[1:] in stacks_of:
        return self._named(None, *self._cut(x.shape[1:], axes))
      return self._named(*self._cut(x.shape, axes))

    return jax.tree.map(sharding, tree)

  def _cut(self, shape: Sequence[int], axes: tuple[str, ...]) -> list[Any]:
    """The mesh axes for each axis of a leaf."""
    cut: list[Any] = [None] * len(shape)
    parts = math.prod(self.mesh.shape[axis] for axis in axes)
    able = [i for i, n in enumerate(shape) if n % parts == 0]
    if parts > 1 and able and math.prod(shape) >= self.min_size:
      cut[max(able, key=lambda i: shape[i])] = axes
    return cut

  def _named(self, *axes):
    return NamedSharding(self.mesh, PartitionSpec(*axes))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gathered(x, whole, shards):
  """The array laid out as `whole`, with its cotangent laid out as `shards`."""
  return jax.lax.with_sharding_constraint(x, whole)


def _gathered_forward(x, whole, shards):
  del shards
  return jax.lax.with_sharding_constraint(x, whole), None


def _gathered_backward(whole, shards, _, cotangent):
  # With only the shards the compiler may again cut activations along another
  # axis than their rows. A sum over devices of which each keeps a shard is one
  # reduce-scatter, if the backend has one.
  cotangent = jax.lax.with_sharding_constraint(cotangent, whole)
  return (jax.lax.with_sharding_constraint(cotangent, shards),)


_gathered.defvjp(_gathered_forward, _gathered_backward)


def per_device(step: Any, mesh: jax.sharding.Mesh) -> Any:
  """A step that every device runs separately, on its own rows of the batch.

  Args:
    step: `(state, batch) -> (state, metrics)` from `make_train_step`, with
      losses that have `axis_name='data'`.
    mesh: of `distributed.make_mesh`.

  Returns:
    The same function of the global state, which every device holds whole, and
    the global batch.
  """
  spec = jax.sharding.PartitionSpec
  return jax.shard_map(
    step,
    mesh=mesh,
    in_specs=(spec(), spec(distributed.DATA_AXIS)),
    out_specs=spec(),
    # With the check on, the gradient of a replicated parameter would be summed
    # over devices before the perturbation.
    check_vma=False,
  )
