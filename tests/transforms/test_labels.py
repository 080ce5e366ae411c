"""Which leaves count as heads without labels of the user's own."""

import dataclasses
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest

import mtl_jax

_NAMES = ('a', 'b')
_PARTS = jnp.ones(2), {task: jnp.ones(3) for task in _NAMES}


class _Tuple(NamedTuple):
  shared: Any
  heads: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class _Module:
  shared: Any
  heads: Any


def _shapes(params, **options):
  """Shapes of the task gradients of two losses that use everything."""
  loss_fn = lambda tree: {
    task: (i + 1) * sum(x.sum() for x in own)
    for i, task in enumerate(_NAMES)
    for own in [_used(tree, task)]
  }
  grads = mtl_jax.task_grad(loss_fn, _NAMES, **options).at(params)[1]
  return sorted(x.shape for x in jax.tree.leaves(grads))


def _used(tree, task):
  """The leaves that a task uses: all that are not of another task's head."""
  other = next(t for t in _NAMES if t != task)
  return [
    leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    if other
    not in jax.tree_util.keystr(path, simple=True, separator='/').split('/')
  ]


@pytest.mark.parametrize(
  'params',
  [
    dict(zip(('shared', 'heads'), _PARTS, strict=True)),
    _Tuple(*_PARTS),
    _Module(*_PARTS),
  ],
  ids=['dictionary', 'named tuple', 'dataclass'],
)
def test_heads_are_known_in_any_container_with_both_entries(params):
  assert _shapes(params) == [(2, 2), (3,), (3,)]


@pytest.mark.parametrize(
  'params',
  [
    {'params': dict(zip(('shared', 'heads'), _PARTS, strict=True))},
    dict(zip(('backbone', 'heads'), _PARTS, strict=True)),
    {'trunk': _PARTS[0], 'head_a': jnp.ones(3), 'head_b': jnp.ones(3)},
  ],
  ids=['below params', 'another trunk', 'heads by prefix'],
)
def test_leaves_named_like_heads_that_count_as_shared_are_warned_of(params):
  everything = lambda tree: {
    task: sum(x.sum() for x in jax.tree.leaves(tree)) for task in _NAMES
  }
  with pytest.warns(UserWarning, match='param_labels'):
    mtl_jax.task_grad(everything, _NAMES).at(params)
  # Whoever means it says so, and is not warned.
  at, _ = mtl_jax.task_grad(
    everything, _NAMES, param_labels=lambda params: 'shared'
  )
  at(params)


def test_names_of_tasks_elsewhere_are_no_heads_and_not_warned_of():
  params = {'a': jnp.ones(2), 'other': jnp.ones(3)}
  loss_fn = lambda tree: {task: tree['a'].sum() for task in _NAMES}
  grads = mtl_jax.task_grad(loss_fn, _NAMES).at(params)[1]
  assert grads['a'].shape == (2, 2)
