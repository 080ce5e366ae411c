"""The joint update from task gradients at the features, with one pull-back.

If the shared part of a model is a trunk that ends in features, the trunk is the
expensive part of T backward passes. Here tasks are combined at the features,
and the trunk is pulled back once for any number of tasks.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

from mtl_jax.transforms import shared_only
from mtl_jax.transforms.contract import aggregation
from mtl_jax.transforms.contract import labels
from mtl_jax.updates import _joint
from mtl_jax.updates import _stack


def feature_update(
  aggregator: optax.GradientTransformation,
  task_names: Sequence[str],
  *,
  head_scale: str | None = None,
  param_labels: labels.ParamLabels = labels.default_labels,
) -> _joint.JointUpdate:
  r"""The update from task gradients of the features: MGDA-UB and relatives.

  With features :math:`Z(\theta)` and the aggregator :math:`A`

  .. math::
    z_i = \nabla_Z L_i, \qquad
    d = \Big(\frac{\partial Z}{\partial \theta}\Big)^\top A(z_1, \dots, z_T)

  With a forward pass as 1 and a backward pass as 2 this takes 3, and T small
  passes through heads. Task gradients of parameters take :math:`1 + 2 T`.

  It differs from the aggregator on gradients of parameters and has other
  weights. The features of a batch are [B, ...] and :math:`z_i` holds the
  gradient for every example, so inner products are sums over examples.
  Gradients for different examples never meet, and tasks that conflict in the
  mean over the batch may agree in each example. With the Jacobian :math:`J` of
  the features, gradients of parameters are :math:`g_i = J^\top z_i` and

  .. math::
    \Big| \sum_i w_i g_i \Big| \le |J| \, \Big| \sum_i w_i z_i \Big|

  MGDA minimises the right side (hence the name, an upper bound). If :math:`J
  J^\top` is a multiple of the identity, methods that use only inner products
  and have degree 1 give the same result as on gradients of parameters. A linear
  aggregator does so for every trunk.

  Args:
    aggregator: any that keeps no state with the features' shape and needs no
      `extra_grads`. Its random draws are for features.
    task_names: the tasks, in the order of every task axis.
    head_scale: see `shared_only`.
    param_labels: see `shared_only`; the same as for the losses. Losses may
      depend on shared leaves only through the features, and features may not
      depend on a head's leaf; both are checked.

  Returns:
    A joint update for losses whose `Objective` has `features_fn` and
    `head_loss_fn`. Its state is the aggregator's and fits any batch size.

  Raises:
    ValueError: for an aggregator that needs further stacks or has axes; at
      `init` for one that keeps a state with the features' shape; at `update`
      for features that are not floating-point arrays, and if one of the
      functions uses the other's parameters; the message names the leaves.

  Examples:
    >>> import jax.numpy as jnp, mtl_jax
    >>> def loss_fn(features):
    ...   return {'a': 3 * features[0], 'b': 4 * features[1]}
    >>> objective = mtl_jax.Objective(
    ...   loss_fn=lambda params, x: loss_fn(params * x),
    ...   features_fn=lambda params, x: params * x,
    ...   head_loss_fn=lambda params, features, x: loss_fn(features))
    >>> losses = mtl_jax.task_losses(objective, ('a', 'b'))
    >>> joint = mtl_jax.feature_update(mtl_jax.mgda(), ('a', 'b'))
    >>> params, x = jnp.ones(2), jnp.array([2.0, 1.0])
    >>> found, _ = joint.update(losses.on(x), params, joint.init(params))
    >>> print(found.grads)  # the features' are 1.92 and 1.44
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
  # The features replace the shared parameters.
  joint = _stack.stack_update(shared_only(inner, names, head_scale=head_scale))

  def init(params):
    partition = labels.Partition(param_labels, params, names)
    shared, heads, _ = partition.split(params)
    dtype = jnp.result_type(float, *(x.dtype for x in shared))

    def state_for(*shape):
      features = jnp.zeros(shape, dtype)
      return joint.init({'shared': features, 'heads': heads})

    shapes = [
      jax.tree.map(jnp.shape, jax.eval_shape(lambda n=n: state_for(*n)))
      for n in ((), (2,))
    ]
    if shapes[0] != shapes[1]:
      raise ValueError(
        'aggregator must keep no state with the shape of the features, because '
        f'the next batch has other examples; got the state {shapes[0]}'
      )
    return state_for()

  def update(losses, params, state):
    boundary = losses.at_features(params, asker='feature_update')
    found, state = joint.update(boundary.losses, boundary.params, state)
    return found._replace(grads=boundary.pull(found.grads)), state

  return _joint.JointUpdate(init, update, joint.after_step)
