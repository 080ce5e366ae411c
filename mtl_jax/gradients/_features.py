"""The boundary between the shared part of a model and its heads."""

from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtl_jax import types
from mtl_jax.gradients import dependencies
from mtl_jax.transforms.contract import labels


class Features(NamedTuple):
  """Features at some parameters, with the losses above and the pull-back below.

  Attributes:
    aux: the second result of `features_fn`.
    params: `{'shared': features, 'heads': {task: leaves of its head}}`.
    losses_of: `params -> (losses, aux)`.
    pull: a gradient laid out as `params` -> one laid out as the parameters.
  """

  aux: Any
  params: types.Params
  losses_of: Callable[[types.Params], tuple[Any, Any]]
  pull: Callable[[types.Params], types.Params]


def at_features(
  features_fn: Callable[..., Any],
  head_loss_fn: Callable[..., Any],
  names: tuple[str, ...],
  param_labels: labels.ParamLabels,
  params: types.Params,
  *args: Any,
) -> Features:
  """Evaluates the features once; see `Features`.

  Args:
    features_fn: `(params, *args) -> (features, aux)`.
    head_loss_fn: `(params, features, *args) -> (losses, aux)`.
    names: the tasks.
    param_labels: see `mtl_jax.shared_only`.
    params: parameters.
    *args: further arguments of both functions.

  Raises:
    ValueError: for features that are not floating-point arrays. Also if losses
      use shared parameters other than through the features, or if features use
      parameters of heads; the message names the leaves.
  """
  partition = labels.Partition(param_labels, params, names)
  shared, heads, frozen = partition.split(params)
  paths = partition.split(
    partition.tree([path or 'the root' for path in partition.paths])
  )

  def features_of(shared, heads):
    features, aux = features_fn(partition.join(shared, heads, frozen), *args)
    for path, leaf in jax.tree_util.tree_leaves_with_path(features):
      if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise ValueError(
          f'features must be floating-point, got {leaf.dtype} at '
          f'{jax.tree_util.keystr(path) or "the root"}'
        )
    return features, aux

  def losses_of(shared, boundary):
    return head_loss_fn(
      partition.join(shared, boundary['heads'], frozen),
      boundary['shared'],
      *args,
    )

  features, pull, aux = jax.vjp(
    lambda shared: features_of(shared, heads), shared, has_aux=True
  )
  boundary = {'shared': features, 'heads': heads}
  dependencies.check_independent(
    'losses must use shared parameters through the features alone',
    lambda shared: losses_of(shared, boundary)[0],
    shared,
    paths[0],
  )
  dependencies.check_independent(
    'features_fn must not use the parameters of heads',
    lambda heads: features_of(shared, heads)[0],
    heads,
    paths[1],
  )

  def pull_params(grads):
    (of_shared,) = pull(grads['shared'])
    zeros = jax.tree.map(jnp.zeros_like, frozen)
    return partition.join(of_shared, grads['heads'], zeros)

  return Features(
    aux, boundary, lambda boundary: losses_of(shared, boundary), pull_params
  )
