"""One aggregation for each group of parameters."""

from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtl_jax.transforms.contract import aggregation
from mtl_jax.transforms.contract import arguments
from mtl_jax.transforms.contract import diagnosis
from mtl_jax.transforms.contract import labels
from mtl_jax.transforms.contract import variables


class PerGroupState(NamedTuple):
  """State of `per_group`.

  Attributes:
    groups: the aggregator's state for each group, by name.
  """

  groups: dict[str, Any]

  def diagnostics(self) -> dict[str, jax.Array]:
    """Diagnostics from each group, as `'<group>/...'`."""
    return {
      f'{group}/{name}': value
      for group, state in self.groups.items()
      for name, value in diagnosis.diagnostics(state).items()
    }


def per_group(
  aggregator: optax.GradientTransformation,
  group_labels: labels.ParamLabels,
) -> aggregation.Aggregator:
  """Aggregates each group of parameters separately.

  Each group has its own Gram matrix, weights and memory, so tasks may conflict
  in one layer and agree in another. Scale and degree of homogeneity: the
  aggregator's.

  Args:
    aggregator: any aggregator.
    group_labels: which group a leaf belongs to: `'leaf'`, so that each leaf is
      a separate group; or, as in optax.partition, a tree of strings (a prefix
      of the parameters' tree will do) or a function from the tree to one. The
      function may use only the tree's structure.

  Returns:
    An aggregator with a `PerGroupState`. A random aggregator draws separately
    for each group. A task has no single weight, so heads are not scaled by
    weights.

  Raises:
    ValueError: for a group without a name.

  Examples:
    >>> import jax.numpy as jnp, mtl_jax
    >>> task_grads = {'bottom': jnp.array([[1.0], [-1.0]]),
    ...               'top': jnp.array([[1.0], [3.0]])}
    >>> params = {'bottom': jnp.zeros(1), 'top': jnp.zeros(1)}
    >>> tx = mtl_jax.per_group(mtl_jax.mgda(), 'leaf')
    >>> updates, _ = tx.update(task_grads, tx.init(params), params)
    >>> print(updates['bottom'], updates['top'])
    [0.] [1.]

  References:
    Sener and Koltun, `Multi-Task Learning as Multi-Objective Optimization
    <https://arxiv.org/abs/1810.04650>`_, 2018 (for one group); layer-wise
    aggregation is from Chen et al., `Just Pick a Sign
    <https://arxiv.org/abs/2010.06808>`_, 2020, section 4
  """
  inner = aggregation.as_inner('per_group', aggregator)

  def split(tree):
    """One tree for each group, with the leaves from other groups masked."""
    leaves, structure = jax.tree.flatten(tree)
    # Names must not depend on whether a library has wrapped the leaves.
    tree = variables.unwrapped(tree)
    if isinstance(group_labels, str) and group_labels == 'leaf':
      groups = [
        jax.tree_util.keystr(path, simple=True, separator='/') or 'root'
        for path, _ in jax.tree_util.tree_leaves_with_path(tree)
      ]
    else:
      found = group_labels(tree) if callable(group_labels) else group_labels
      groups = jax.tree.leaves(
        jax.tree.broadcast(variables.unwrapped(found), tree)
      )
    for label in groups:
      if not isinstance(label, str) or not label:
        raise ValueError(
          f'group_labels must give every leaf a name, got {label!r}'
        )
    mask = lambda group: [
      leaf if label == group else optax.MaskedNode()
      for leaf, label in zip(leaves, groups, strict=True)
    ]
    trees = {
      group: jax.tree.unflatten(structure, mask(group))
      for group in sorted(set(groups))
    }
    return trees, groups, structure

  def init(params):
    trees, _, _ = split(params)
    return PerGroupState(
      {
        group: _fold_keys(inner.init(tree), index)
        for index, (group, tree) in enumerate(trees.items())
      }
    )

  def aggregate(task_grads, state, params=None, *, extra_grads=None, **others):
    trees, groups, structure = split(task_grads)
    if set(trees) != set(state.groups):
      raise ValueError(
        f'the task gradients have the groups {sorted(trees)}, the state those '
        f'of {sorted(state.groups)}'
      )
    params = {} if params is None else split(params)[0]
    extra_grads = [split(stack)[0] for stack in extra_grads or ()]
    pieces, states = {}, {}
    for group, tree in trees.items():
      updates, states[group] = inner.aggregate(
        tree,
        state.groups[group],
        params.get(group),
        extra_grads=tuple(stack[group] for stack in extra_grads),
        **others,
      )
      pieces[group] = iter(jax.tree.leaves(updates))
    leaves = [next(pieces[label]) for label in groups]
    return jax.tree.unflatten(structure, leaves), PerGroupState(states)

  def after_step(new_losses, state, *, active=None):
    return PerGroupState(
      {
        group: inner.after_step(new_losses, x, active=active)
        for group, x in state.groups.items()
      }
    )

  return aggregation.Aggregator(
    init,
    aggregate,
    axes=inner.axes,
    extra_batches=inner.extra_batches,
    for_tasks=lambda size: per_group(inner.for_tasks(size), group_labels),
    after_step=after_step if inner.after_step else None,
  )


def _fold_keys(state: Any, index: int) -> Any:
  """The state with its keys changed, so that no two groups draw the same."""

  def fold(path, leaf):
    typed = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    # A raw key is a plain array, so only the name of its field identifies it.
    raw = path and path[-1] == jax.tree_util.GetAttrKey('key')
    if typed or (raw and arguments.is_raw_key(leaf)):
      return jax.random.fold_in(leaf, index)
    return leaf

  return jax.tree_util.tree_map_with_path(fold, state)
