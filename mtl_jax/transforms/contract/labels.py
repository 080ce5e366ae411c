"""Labels of parameters as shared, as a task's or as frozen."""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
from typing import Any
import warnings

import jax
import jax.numpy as jnp
import optax

from mtl_jax.transforms.contract import aggregation
from mtl_jax.transforms.contract import variables

SHARED = 'shared'
FROZEN = 'frozen'

# A tree of strings, or a function from a tree of parameters to one.
ParamLabels = Any | Callable[[Any], Any]


def default_labels(params: Any) -> Any:
  """Labels for `{'shared': tree, 'heads': {task: tree}}`.

  Args:
    params: a tree of parameters (or of their gradients): a dictionary, a named
      tuple or a dataclass with these two entries, or anything else.

  Returns:
    A tree of strings of the same structure: a task's name for the leaves below
    `params['heads'][task]`, `'shared'` for all others. A tree without `'heads'`
    and `'shared'` is shared as a whole.

  Examples:
    >>> import mtl_jax
    >>> mtl_jax.default_labels({'shared': 1.0, 'heads': {'depth': {'w': 2.0}}})
    {'heads': {'depth': {'w': 'depth'}}, 'shared': 'shared'}
  """
  split = {SHARED, 'heads'} <= _entries(params)

  def label(path, _):
    part = _name(path[0]) if split else SHARED
    return _name(path[1]) if part == 'heads' else SHARED

  return jax.tree_util.tree_map_with_path(label, params)


def _entries(tree: Any) -> set[Any]:
  """The names of a container's entries, empty subtrees included."""
  if isinstance(tree, Mapping):
    return set(tree)
  if dataclasses.is_dataclass(tree):
    return {field.name for field in dataclasses.fields(tree)}
  return set(getattr(tree, '_fields', ()))


def _name(key: Any) -> str:
  """The name of one part of a path, for any kind of container."""
  return str(
    getattr(key, 'key', getattr(key, 'name', getattr(key, 'idx', key)))
  )


def _warn_of_named_heads(paths: Sequence[Any], names: tuple[str, ...]) -> None:
  """Warns if leaves that count as shared are named like heads of tasks."""
  found: dict[str, str] = {}
  for path in paths:
    for part in map(_name, path):
      for task in names:
        if part == task or ('head' in part.lower() and task in part):
          found.setdefault(task, jax.tree_util.keystr(path))
  if len(set(found.values())) > 1:
    warnings.warn(
      f'parameters at {tuple(found.values())} are named like heads of tasks, '
      "but count as shared: only the layout {'shared': ..., 'heads': {task: "
      "...}} is known. Pass param_labels: a task's name for each leaf of its "
      "head, or lambda params: 'shared' if they are meant to be shared",
      stacklevel=4,
    )


def check_task_names(task_names: Sequence[str]) -> tuple[str, ...]:
  """The task names as a tuple; raises unless they are distinct strings."""
  if isinstance(task_names, str):
    raise TypeError(
      f'task_names must be a sequence of names, got the string {task_names!r}'
    )
  names = tuple(task_names)
  reserved = {SHARED, FROZEN} & set(names)
  if not names or len(set(names)) != len(names) or reserved:
    raise ValueError(
      'task_names must be distinct, one at least and none of '
      f'{(SHARED, FROZEN)}, got {names}'
    )
  return names


class Partition:
  """The leaves of a tree, by the part to which they belong.

  It is made once a call from the structure of the parameters. It handles
  parameters, task gradients and task parameters. These all have one structure
  and differ only in the shapes of their leaves. Leaves that are not frozen are
  real floating-point numbers.

  Attributes:
    task_names: the tasks, in the order of every task axis.
    labels: list with the label of each leaf.
    paths: list with the printed path of each leaf.
    owners: list with the index of each leaf's task, None if it has none.
  """

  def __init__(
    self, param_labels: ParamLabels, tree: Any, task_names: tuple[str, ...]
  ):
    self.task_names = task_names
    self._structure: Any = jax.tree.structure(tree)
    # Labels must not depend on whether a library has wrapped the leaves.
    tree = variables.unwrapped(tree)
    labels = param_labels(tree) if callable(param_labels) else param_labels
    self.labels = jax.tree.leaves(
      jax.tree.broadcast(variables.unwrapped(labels), tree)
    )
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    self.paths = list(map(jax.tree_util.keystr, paths))
    known = {SHARED, FROZEN, *task_names}
    for path, label, leaf in zip(
      self.paths, self.labels, jax.tree.leaves(tree), strict=True
    ):
      if label not in known:
        raise ValueError(
          f'param_labels gives {label!r} at {path or "the root"}; expected '
          f'{SHARED!r}, {FROZEN!r} or a task of {task_names}'
        )
      if label != FROZEN:
        aggregation.check_leaf('parameter', leaf, path or 'the root')
    whole = all(label == SHARED for label in self.labels)
    if param_labels is default_labels and len(task_names) > 1 and whole:
      _warn_of_named_heads(paths, task_names)
    place = {task: i for i, task in enumerate(task_names)}
    self.owners = [place.get(label) for label in self.labels]

  def leaves(self, tree: Any) -> list[Any]:
    """The leaves of a tree of this structure, in the order of `labels`."""
    if jax.tree.structure(tree) != self._structure:
      raise ValueError(
        f'expected a tree of structure {self._structure}, got '
        f'{jax.tree.structure(tree)}'
      )
    return jax.tree.leaves(tree)

  def tree(self, leaves: Sequence[Any]) -> Any:
    """The tree with these leaves."""
    return jax.tree.unflatten(self._structure, leaves)

  def split(
    self, tree: Any
  ) -> tuple[list[Any], dict[str, list[Any]], list[Any]]:
    """Splits a tree of this structure into its parts.

    Args:
      tree: parameters, task gradients or task parameters.

    Returns:
      The shared leaves, `{task: leaves of its head}` in the order of the
      tasks, and the frozen leaves.
    """
    shared: list[Any] = []
    frozen: list[Any] = []
    heads: dict[str, list[Any]] = {task: [] for task in self.task_names}
    parts = {SHARED: shared, FROZEN: frozen, **heads}
    for leaf, label in zip(self.leaves(tree), self.labels, strict=True):
      parts[label].append(leaf)
    return shared, heads, frozen

  def join(
    self,
    shared: Sequence[Any],
    heads: Mapping[str, Sequence[Any]],
    frozen: Sequence[Any],
  ) -> Any:
    """The tree with these parts; undoes `split`."""
    parts = {SHARED: iter(shared), FROZEN: iter(frozen)}
    parts |= {task: iter(head) for task, head in heads.items()}
    return self.tree([next(parts[label]) for label in self.labels])

  def shared(self, leaves: Sequence[Any]) -> Any:
    """The tree with `optax.MaskedNode` wherever a leaf is not shared."""
    return self.tree(
      [
        leaf if label == SHARED else optax.MaskedNode()
        for leaf, label in zip(leaves, self.labels, strict=True)
      ]
    )

  def check(self, task_grads: Sequence[Any], params: Sequence[Any]) -> None:
    """Raises unless shared leaves have a task axis and all others none.

    Args:
      task_grads: leaves of task gradients.
      params: leaves of parameters.

    Raises:
      ValueError: naming the leaf and both shapes.
    """
    size = len(self.task_names)
    for grad, param, label, path in zip(
      task_grads, params, self.labels, self.paths, strict=True
    ):
      shape = jnp.shape(param)
      expected = (size, *shape) if label == SHARED else shape
      if jnp.shape(grad) != expected:
        what = (
          f'[{size} tasks, *parameter shape]'
          if label == SHARED
          else f'the parameter of {label!r} without a task axis'
        )
        raise ValueError(
          f'the task gradient at {path or "the root"} has shape '
          f'{jnp.shape(grad)}, expected {expected}: {what}'
        )
