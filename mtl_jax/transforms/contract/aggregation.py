"""The contract of an aggregator, and the devices it works over.

An aggregator is an optax transformation whose input leaves carry a leading task
axis and whose output leaves do not. This module holds their common parts: the
reduction over replicas and shards, and the checks of shapes.
"""

from collections.abc import Callable
from collections.abc import Hashable
from collections.abc import Mapping
from collections.abc import Sequence
import inspect
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax.experimental import aggregating

from mtl_jax.transforms.contract import arguments
from mtl_jax.transforms.contract import meshes

_HEADS = (
  'Heads have no task axis: where params have some, wrap the aggregator, as in '
  'shared_only(aggregator, task_names).'
)


class Axes(NamedTuple):
  """The mapped axes under which a transformation is called, if any.

  Attributes:
    axis_name: axis of replicas inside `pmap` or `shard_map`. Task gradients and
      losses are averaged over it first.
    reduce: `'mean'` or `'sum'`, how replicas are brought together.
    shard_axis: axis over which every parameter is sharded. Only inner products
      are summed over it; the gradients stay where they are.
  """

  axis_name: Hashable | None = None
  reduce: str = 'mean'
  shard_axis: Hashable | None = None

  def check(self) -> 'Axes':
    """The axes themselves; raises unless they go together."""
    arguments.one_of('reduce', self.reduce, ('mean', 'sum'))
    if self.axis_name is not None and self.axis_name == self.shard_axis:
      raise ValueError(
        'axis_name and shard_axis must be different axes, got '
        f'{self.axis_name!r} for both'
      )
    return self

  def average(self, tree: Any) -> Any:
    """Averages or sums gradients over the replicas.

    Args:
      tree: gradients of this replica, any shapes.

    Returns:
      Their mean (or sum) over `axis_name`; `tree` itself without one.

    Raises:
      ValueError: if under `shard_map(check_vma=True)` a leaf does not vary over
        `axis_name`. The gradient of a replicated parameter is *summed* over
        devices there by automatic differentiation already, and no later mean
        undoes that.
    """
    if self.axis_name is None:
      return tree
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
      if self._replicated(leaf):
        raise ValueError(
          f'the gradient at {jax.tree_util.keystr(path) or "the root"} does '
          f'not vary over axis_name={self.axis_name!r}: under '
          'shard_map(check_vma=True) the gradient of a replicated parameter is '
          'summed over devices already. Differentiate with respect to '
          "jax.lax.pcast(params, axis_name, to='varying'), or leave axis_name "
          'out if the gradients are global.'
        )
    reduce = jax.lax.pmean if self.reduce == 'mean' else jax.lax.psum
    return jax.tree.map(lambda x: reduce(x, self.axis_name), tree)

  def average_losses(self, losses: jax.Array | None) -> jax.Array | None:
    """Like `average`; losses that are already global stay unchanged."""
    if losses is None or self.axis_name is None or self._replicated(losses):
      return losses
    reduce = jax.lax.pmean if self.reduce == 'mean' else jax.lax.psum
    return reduce(losses, self.axis_name)

  def replicate(self, tree: Any) -> Any:
    """Marks parameters as varying by replica, so that gradients stay local."""
    if self.axis_name is None:
      return tree

    def mark(x):
      axes = self._replicated(x)
      return jax.lax.pcast(x, tuple(axes), to='varying') if axes else x

    return jax.tree.map(mark, tree)

  def sum_shards(self, x: jax.Array) -> jax.Array:
    """Sums inner products over the shards of the parameters."""
    return x if self.shard_axis is None else jax.lax.psum(x, self.shard_axis)

  def _replicated(self, x: Any) -> frozenset[Hashable]:
    """The axes of `axis_name` over which `x` is known to be the same."""
    # An axis index varies over its axes by definition, so its type shows which
    # of them are tracked here at all (none under pmap and
    # shard_map(check_vma=False)).
    index = jax.lax.axis_index(self.axis_name)
    return _varying(index) - _varying(x)


def _varying(x: Any) -> frozenset[Hashable]:
  """The mapped axes over which a value varies, according to its type."""
  return jax.typeof(x).manual_axis_type.varying


class Aggregator(aggregating.Aggregator):
  """An optax `Aggregator` that wrappers can look into.

  Attributes:
    init: `params -> state`.
    update: `(task_grads, state, params=None, *, losses=None, active=None,
      **extra_args) -> (updates, state)`.
    aggregate: `update` without the reduction over replicas, for a wrapper that
      has done it.
    axes: the mapped axes it was made for.
    head_scale: how `shared_only` treats heads by default.
    extra_batches: how many stacks of task gradients from further, independent
      batches `update` needs as `extra_grads`.
    weights: the vectors whose coefficients in the update are the state's
      `task_weights`: the task `'gradients'`, gradients it has `'tracked'`, or
      `'none'` for a method without weights.
    for_tasks: `num_tasks -> Aggregator`; the same aggregator as if made with
      `num_tasks`, for a wrapper that knows the tasks.
    outermost: whether `update` evaluates gradients itself, so that no wrapper
      may pass it a part of the parameters.
    weigh: `(gram [T, T], state, *, losses=None, active=None, **extra_args) ->
      state`, with the `task_weights` that `aggregate` would give to rows with
      these inner products. None for a method that needs more than inner
      products. For aggregators made with `num_tasks`.
    after_step: `(new_losses [T], state, *, active=None) -> state`, with the
      losses for the same batch after the parameters have moved. None for a
      method that does not use them.
  """

  aggregate: Callable[..., tuple[Any, Any]]
  axes: Axes
  head_scale: str
  extra_batches: int
  weights: str
  for_tasks: Callable[[int], 'Aggregator']
  outermost: bool
  weigh: Callable[..., Any] | None
  after_step: Callable[..., Any] | None

  def __new__(
    cls,
    init: Callable[[Any], Any],
    aggregate: Callable[..., tuple[Any, Any]],
    *,
    axes: Axes | None = None,
    head_scale: str = 'none',
    extra_batches: int = 0,
    weights: str = 'none',
    for_tasks: Callable[[int], 'Aggregator'] | None = None,
    outermost: bool = False,
    weigh: Callable[..., Any] | None = None,
    after_step: Callable[..., Any] | None = None,
  ):
    axes = (axes or Axes()).check()

    def update(task_grads, state, params=None, *, losses=None, **extra_args):
      if extra_batches and extra_args.get('extra_grads') is not None:
        extra_args['extra_grads'] = axes.average(extra_args['extra_grads'])
      return aggregate(
        axes.average(task_grads),
        state,
        params,
        losses=axes.average_losses(losses),
        **extra_args,
      )

    self = super().__new__(cls, init, update)
    self.aggregate = aggregate
    self.axes = axes
    self.head_scale = head_scale
    self.extra_batches = extra_batches
    self.weights = weights
    self.for_tasks = for_tasks or (lambda num_tasks: self)
    self.outermost = outermost
    self.weigh = weigh
    self.after_step = after_step
    return self


def as_aggregator(
  tx: aggregating.Aggregator, name: str = 'aggregator'
) -> Aggregator:
  """An optax aggregator as an `Aggregator`.

  Args:
    tx: an `Aggregator`, or any `optax.experimental.aggregating.Aggregator`.
    name: the argument's name, for errors.

  Returns:
    `tx` itself if it is an `Aggregator`. Otherwise one that passes on the extra
    arguments that `tx.update` takes, with zeros in the rows of absent tasks.

  Raises:
    TypeError: for anything else. An optimizer has the same two functions, but
      keeps the task axis.
  """
  if isinstance(tx, Aggregator):
    return tx
  if not isinstance(tx, aggregating.Aggregator):
    raise TypeError(f'{name} must be an aggregator: {_instead(tx)}')
  # optax's own aggregators have the type that takes extra arguments but take
  # none, so only the signature shows it.
  parameters = inspect.signature(tx.update).parameters
  swallows = any(p.kind == p.VAR_KEYWORD for p in parameters.values())

  def aggregate(task_grads, state, params=None, *, active=None, **extra_args):
    if active is not None:
      # `tx` need not know about `active`.
      task_grads = jax.tree.map(
        lambda leaf: jnp.where(
          jnp.reshape(active, (-1,) + (1,) * (leaf.ndim - 1)), leaf, 0
        ),
        task_grads,
      )
      extra_args['active'] = active
    taken = {
      name: value
      for name, value in extra_args.items()
      if swallows or name in parameters
    }
    return tx.update(task_grads, state, params, **taken)

  return Aggregator(tx.init, aggregate)


def _instead(value: Any) -> str:
  """The end of an error: what to pass instead of `value`."""
  if hasattr(value, 'instead_of_aggregator'):
    return value.instead_of_aggregator()
  if isinstance(value, optax.GradientTransformation):
    return (
      f'got an optax {type(value).__name__}, such as an optimizer or a chain. '
      'Chain it after the aggregation, as in '
      'optax.chain(mtl_jax.shared_only(mtl_jax.cagrad(), task_names), '
      'optax.adam(1e-3)). A transformation of your own that removes the task '
      'axis is an mtl_jax.Aggregator(init, update).'
    )
  called = getattr(value, '__name__', None)
  if callable(value) and called:
    return f'got the function {called}; call it, as in {called}()'
  return f'got {type(value).__name__}'


def as_inner(
  wrapper: str, tx: aggregating.Aggregator, name: str = 'aggregator'
) -> Aggregator:
  """`as_aggregator` for the argument of a wrapper.

  Args:
    wrapper: the wrapper's name, for errors.
    tx: see `as_aggregator`.
    name: see `as_aggregator`.

  Returns:
    See `as_aggregator`.

  Raises:
    TypeError: see `as_aggregator`.
    ValueError: for an aggregator that is outermost.
  """
  inner = as_aggregator(tx, name)
  if inner.outermost:
    raise ValueError(
      f'{wrapper} wraps an aggregator of shared leaves alone, and flat_minima '
      'separates heads from shared leaves itself: pass the aggregator inside '
      f'it to {wrapper}, or leave {wrapper} out'
    )
  return inner


def check_weights(name: str, inner: Aggregator) -> None:
  """Raises unless an update is a weighted sum of the task gradients."""
  if inner.weights != 'gradients':
    raise ValueError(
      f'{name} needs an aggregator whose update is a weighted sum of the task '
      f'gradients, got one with weights={inner.weights!r}'
    )


def check_task_axis(
  task_grads: Any, params: Any = None, num_tasks: int | None = None
) -> int:
  """Checks that all leaves have one leading task axis, and finds its length.

  Args:
    task_grads: tree of leaves [T, *shape].
    params: tree of leaves [*shape], if known.
    num_tasks: T, if known.

  Returns:
    T.

  Raises:
    ValueError: naming the leaf, if shapes are anything else, or if there is no
      leaf.
  """
  leaves = jax.tree_util.tree_leaves_with_path(task_grads)
  shapes = {}
  if params is not None:
    ours: Any = jax.tree.structure(task_grads)
    theirs: Any = jax.tree.structure(params)
    if ours != theirs:
      raise ValueError(
        'task gradients and params must have one structure, got '
        f'{ours} and {theirs}'
      )
    shapes = {
      path: leaf.shape
      for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
  for path, leaf in leaves:
    where = jax.tree_util.keystr(path) or 'the root'
    check_leaf('task gradient', leaf, where)
    if leaf.ndim == 0:
      raise ValueError(
        f'task gradients need a leading task axis; the leaf at {where} is a '
        f'scalar. {_HEADS}'
      )
    if num_tasks is None:
      num_tasks = leaf.shape[0]
    expected = (num_tasks, *shapes.get(path, leaf.shape[1:]))
    if leaf.shape != expected:
      raise ValueError(
        f'the task gradient at {where} has shape {leaf.shape}, expected '
        f'{expected}: [tasks, *parameter shape] with {num_tasks} tasks. '
        f'{_HEADS}'
      )
  if num_tasks is None:
    raise ValueError('there are no task gradients: the tree has no leaf')
  return num_tasks


def check_leaf(what: str, leaf: Any, where: str) -> None:
  """Raises unless a leaf is an array of real floating-point numbers.

  Args:
    what: `'parameter'` or `'task gradient'`.
    leaf: an array or a number.
    where: its path.

  Raises:
    ValueError: naming the leaf and how to keep it.
  """
  dtype = getattr(leaf, 'dtype', None)
  dtype = jnp.result_type(leaf) if dtype is None else dtype
  if jnp.issubdtype(dtype, jnp.complexfloating):
    # The methods' inner products, norms and signs are for real vectors.
    raise ValueError(
      f'the {what} at {where} is {dtype}; complex parameters are not '
      'supported: make the real and the imaginary part a parameter each, or '
      "label the leaf 'frozen' by param_labels"
    )
  if not jnp.issubdtype(dtype, jnp.floating):
    raise ValueError(
      f'the {what} at {where} is {dtype}, expected a floating-point parameter: '
      "label the leaf 'frozen' by param_labels"
    )


def check_parameters(params: Any) -> None:
  """`check_leaf` for all leaves in a tree of parameters."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    check_leaf('parameter', leaf, jax.tree_util.keystr(path) or 'the root')


def full_active(active: Any, num_tasks: int) -> jax.Array:
  """`active` as a bool array [T]; all tasks where it is None."""
  if active is None:
    return jnp.ones(num_tasks, bool)
  active = as_vector('active', active)
  if active.shape != (num_tasks,):
    raise ValueError(
      f'active must have shape ({num_tasks},), got {active.shape}'
    )
  return active.astype(bool)


def check_losses(losses: Any, num_tasks: int) -> jax.Array | None:
  """`losses` as an array [T], at least float32; None stays None."""
  if losses is None:
    return None
  losses = as_vector('losses', losses)
  if losses.shape != (num_tasks,):
    raise ValueError(
      f'losses must have shape ({num_tasks},), got {losses.shape}'
    )
  return losses.astype(jnp.promote_types(losses.dtype, jnp.float32))


def as_vector(argument: str, values: Any) -> jax.Array:
  """One number a task as an array; raises for anything with names."""
  if not isinstance(values, list | tuple) and not jax.tree_util.all_leaves(
    [values]
  ):
    raise TypeError(
      f'{argument} must be an array [tasks] in the order of the tasks, got a '
      f'{type(values).__name__}; of a dictionary it is '
      f'jnp.stack([{argument}[task] for task in task_names])'
    )
  return meshes.whole(jnp.asarray(values))


def in_order(argument: str, values: Any, task_names: Sequence[str]) -> Any:
  """A dictionary of one number a task as an array [T]; others stay.

  Args:
    argument: its name, for errors.
    values: anything; {task: number} is put in order.
    task_names: the tasks in their order.

  Returns:
    [T], or `values`.

  Raises:
    ValueError: for a dictionary with other tasks.
  """
  if not isinstance(values, Mapping):
    return values
  if set(values) != set(task_names):
    raise ValueError(
      f'{argument} must have one number for each of {tuple(task_names)}, got '
      f'{tuple(values)}'
    )
  return jnp.stack([jnp.asarray(values[task]) for task in task_names])
