"""Updates from task gradients with respect to features, one pull-back in all.

Where the shared part of a model is a trunk that ends in features, the trunk is
the expensive part of T backward passes. Here tasks are combined at the features
and the trunk is pulled back once, whatever T is.
"""

from collections.abc import Callable
from collections.abc import Sequence
import functools
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtl_jax import dependencies
from mtl_jax import gradients
from mtl_jax import types
from mtl_jax.transforms.contract import aggregation
from mtl_jax.transforms.contract import labels
from mtl_jax.transforms.wrappers import _shared_only


class FeatureUpdate(NamedTuple):
  """What `feature_update` returns.

  Attributes:
    init: `(params, *args) -> state`, that of the aggregator;
      `mtl_jax.diagnostics` shows what is in it. It holds for any batch size.
    update: `(params, state, *args, active=None) -> ((losses [T], aux), grads,
      state)`; grads, laid out as the parameters, go to any optax
      transformation.
  """

  init: Callable[..., Any]
  update: Callable[..., tuple[tuple[jax.Array, Any], types.Params, Any]]


def feature_update(
  features_fn: Callable[..., Any],
  loss_fn: Callable[..., Any],
  aggregator: optax.GradientTransformation,
  task_names: Sequence[str],
  *,
  head_scale: str | None = None,
  param_labels: labels.ParamLabels = labels.default_labels,
  has_aux: bool = False,
) -> FeatureUpdate:
  r"""The update from task gradients of the features: MGDA-UB and relatives.

  With features :math:`Z(\theta)` and the aggregator :math:`A`

  .. math::
    z_i = \nabla_Z L_i, \qquad
    d = \Big(\frac{\partial Z}{\partial \theta}\Big)^\top A(z_1, \dots, z_T)

  With a forward pass as 1 and a backward pass as 2 this takes 3 and T small
  passes through heads, where task gradients of parameters take :math:`1 + 2 T`.

  It is another method than the aggregator on gradients of parameters, with
  other weights. The features of a batch are [B, ...] and :math:`z_i` holds the
  gradient of every example, so inner products are sums over examples: those of
  different examples never meet, and tasks that conflict in the mean over the
  batch may agree in each example. With the Jacobian :math:`J` of the features,
  gradients of parameters are :math:`g_i = J^\top z_i` and

  .. math::
    \Big| \sum_i w_i g_i \Big| \le |J| \, \Big| \sum_i w_i z_i \Big|

  of which MGDA makes the right side small (hence the name, an upper bound).
  Where :math:`J J^\top` is a multiple of the identity, methods that look at
  inner products alone and have degree 1 give what they give on gradients of
  parameters. A linear aggregator does so for every trunk.

  Args:
    features_fn: `(params, *args) -> features`, a tree of floating-point arrays:
      all that heads take from the shared parameters. With `has_aux` `(features,
      aux)`.
    loss_fn: `(params, features, *args) -> {task: scalar}` (or an array [T]).
      With `has_aux` `(losses, aux)`.
    aggregator: any that keeps nothing of the features' shape and needs no
      `extra_grads`. Its random draws are for features.
    task_names: the tasks, in the order of every task axis.
    head_scale: see `shared_only`.
    param_labels: see `shared_only`. Losses may depend on shared leaves through
      the features alone, and features on no head's leaf; both are checked.
    has_aux: whether both functions return a second value; aux is then the pair
      of them.

  Returns:
    `FeatureUpdate(init, update)`.

  Raises:
    ValueError: for an aggregator that needs further stacks or has axes; at
      `init` for one that keeps something of the features' shape; at both for
      features that are no floating-point arrays; at `update`, naming the
      leaves, where one of the functions uses the parameters of the other.

  Examples:
    >>> import jax.numpy as jnp, mtl_jax
    >>> features_fn = lambda params, x: params * x
    >>> def loss_fn(params, features, x):
    ...   return {'a': 3 * features[0], 'b': 4 * features[1]}
    >>> step = mtl_jax.feature_update(
    ...   features_fn, loss_fn, mtl_jax.mgda(), ('a', 'b'))
    >>> params, x = jnp.ones(2), jnp.array([2.0, 1.0])
    >>> (losses, _), grads, _ = step.update(params, step.init(params, x), x)
    >>> print(grads)  # the features' are 1.92 and 1.44
    [3.84 1.44]

  References:
    Sener and Koltun, `Multi-Task Learning as Multi-Objective Optimization
    <https://arxiv.org/abs/1810.04650>`_, 2018, section 3.3 (MGDA-UB);
    Chen et al., `Just Pick a Sign: Optimizing Deep Multitask Models with
    Gradient Sign Dropout <https://arxiv.org/abs/2010.06808>`_, 2020
    (`graddrop`, which works on features there)
  """
  names = labels.check_task_names(task_names)
  inner = aggregation.as_aggregator(aggregator)
  if inner.extra_batches:
    raise ValueError(
      'aggregator must need no extra_grads, got one with '
      f'extra_batches={inner.extra_batches}'
    )
  if inner.axes != aggregation.Axes():
    raise ValueError(f'aggregator must have no axes, got {inner.axes}')
  # The features take the place of the shared parameters.
  tx = _shared_only.shared_only(inner, names, head_scale=head_scale)

  def features_of(params, *args):
    out = features_fn(params, *args)
    features, aux = out if has_aux else (out, None)
    for path, leaf in jax.tree_util.tree_leaves_with_path(features):
      if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise ValueError(
          f'features must be floating-point, got {leaf.dtype} at '
          f'{jax.tree_util.keystr(path) or "the root"}'
        )
    return features, aux

  def init(params, *args):
    heads = gradients.Parts(param_labels, params, names).split(params)[1]
    features = jax.eval_shape(lambda p: features_of(p, *args)[0], params)

    def state_for(*lead):
      zeros = lambda x: jnp.zeros((*lead, *x.shape), x.dtype)
      return tx.init({'shared': jax.tree.map(zeros, features), 'heads': heads})

    shapes = [
      jax.tree.map(jnp.shape, jax.eval_shape(functools.partial(state_for, *n)))
      for n in ((), (2,))
    ]
    if shapes[0] != shapes[1]:
      raise ValueError(
        'aggregator must keep nothing of the shape of the features, for the '
        f'next batch has other examples; got one with the state {shapes[0]}'
      )
    return state_for()

  def update(params, state, *args, active=None):
    parts = gradients.Parts(param_labels, params, names)
    shared, heads, frozen = parts.split(params)

    def trunk(shared, heads):
      return features_of(parts.join(shared, heads, frozen), *args)

    def losses_of(shared, boundary):
      out = loss_fn(
        parts.join(shared, boundary['heads'], frozen),
        boundary['shared'],
        *args,
      )
      return out if has_aux else (out, None)

    features, pull, aux = jax.vjp(
      lambda shared: trunk(shared, heads), shared, has_aux=True
    )
    boundary = {'shared': features, 'heads': heads}
    paths = parts.split(
      jax.tree_util.tree_map_with_path(
        lambda path, _: jax.tree_util.keystr(path) or 'the root', params
      )
    )
    dependencies.check_independent(
      'loss_fn must use shared parameters through the features alone',
      lambda shared: losses_of(shared, boundary)[0],
      shared,
      paths[0],
    )
    dependencies.check_independent(
      'features_fn must not use the parameters of heads',
      lambda heads: trunk(shared, heads)[0],
      heads,
      paths[1],
    )
    # Heads are small: a loop over them would save no memory worth its time.
    at, _ = gradients.task_grad(
      lambda boundary: losses_of(shared, boundary),
      names,
      engine='unroll',
      has_aux=True,
    )
    (losses, loss_aux), task_grads = at(boundary)
    combined, state = tx.update(
      task_grads, state, boundary, losses=losses, active=active
    )
    (of_shared,) = pull(combined['shared'])
    zeros = jax.tree.map(jnp.zeros_like, frozen)
    grads = parts.join(of_shared, combined['heads'], zeros)
    return (losses, (aux, loss_aux) if has_aux else None), grads, state

  return FeatureUpdate(init, update)
