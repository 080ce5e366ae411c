"""Updates of Gram-based methods without the task gradients of dense layers.

The inner product of two tasks' gradients of a layer follows from what comes
into the layer and what comes back to its outputs. Where a layer has more inputs
and outputs than there are rows to multiply, that is less work and less memory
than the gradients.
"""

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mtl_jax import dependencies
from mtl_jax import gradients
from mtl_jax import gram_updates
from mtl_jax.transforms import _aggregator
from mtl_jax.transforms import _arguments
from mtl_jax.transforms import _inner
from mtl_jax.transforms import _labels
from mtl_jax.transforms import _shared_only

_HIGHEST = jax.lax.Precision.HIGHEST


def ghost_update(
  loss_fn: Callable[..., Any],
  aggregator: optax.GradientTransformation,
  task_names: Sequence[str],
  *,
  head_scale: str | None = None,
  param_labels: _labels.ParamLabels = _labels.default_labels,
  has_aux: bool = False,
) -> gram_updates.GramUpdate:
  r"""The update of a Gram-based method, from inputs and cotangents of layers.

  With the rows :math:`X` [N, in] that come into a dense layer, N the batch
  times positions, and the gradients :math:`D_i` [N, out] of task i's loss at
  its outputs, the gradient of its weights is :math:`X^\top D_i`, and

  .. math::
    \langle X^\top D_i, X^\top D_j \rangle = \langle D_i, X X^\top D_j \rangle,
    \qquad \sum_i w_i X^\top D_i = X^\top \sum_i w_i D_i

  so that T gradients of the weights are never formed. A layer is treated so
  where it takes fewer operations, :math:`N (in + T\, out) \le (T - 1)\, in\,
  out`; others, and all leaves outside of dense layers, have task gradients as
  in `task_grad`. The numbers are those of the aggregator on task gradients.

  With a forward pass as 1 and a backward pass as 2 it takes up to
  :math:`1 + 2 T` and, where N is small, about :math:`2 + T`: T passes for the
  cotangents and one for the weights. It holds T cotangents of all layers in
  place of T gradients of the weights. Where the rows of a gradient cancel to a
  part c of their length, the relative error of its inner products may reach
  that of float32 over :math:`c^2`, for the gradient over c.

  Args:
    loss_fn: `(params, dense, *args) -> {task: scalar}` (or an array [T]), or
      `(losses, aux)` with `has_aux`. `dense(x [..., in], w [in, out])` is `x @
      w` in the dtype of x, for a shared leaf w just as it stands in params,
      once a leaf and not inside of jit, vmap, checkpoint or a loop.
    aggregator: see `gram_update`.
    task_names: the tasks, in the order of every task axis.
    head_scale: see `shared_only`.
    param_labels: see `shared_only`.
    has_aux: whether `loss_fn` returns `(losses, aux)`.

  Returns:
    `GramUpdate(init, update)`; the state is that of the aggregator.

  Raises:
    ValueError: for an aggregator that needs more than inner products; at
      `update` for a w that is no shared leaf or is used twice, or of which a
      loss depends on by another way than `dense`.

  Examples:
    >>> import jax.numpy as jnp, mtl_jax
    >>> def loss_fn(w, dense, x):
    ...   y = dense(x, w)
    ...   return {'a': 3 * jnp.sum(y[:, 0]), 'b': 4 * jnp.sum(y[:, 1])}
    >>> step = mtl_jax.ghost_update(loss_fn, mtl_jax.mgda(), ('a', 'b'))
    >>> w, x = jnp.ones((1, 2)), jnp.ones((1, 1))
    >>> (losses, _), grads, _ = step.update(w, step.init(w), x)
    >>> print(grads)
    [[1.92 1.44]]

  References:
    Goodfellow, `Efficient Per-Example Gradient Computations
    <https://arxiv.org/abs/1510.01799>`_, 2015 (norms from inputs and
    cotangents, there of examples)
  """
  names = _labels.check_task_names(task_names)
  size = len(names)
  inner = _aggregator.as_aggregator(aggregator).for_tasks(size)
  gram_updates.check_gram_based(inner, size)
  head_scale = inner.head_scale if head_scale is None else head_scale
  _arguments.one_of('head_scale', head_scale, _shared_only.HEAD_SCALES)

  def init(params):
    del params
    return inner.init(jnp.zeros(size))

  def update(params, state, *args, active=None):
    present = _aggregator.full_active(active, size)
    parts = gradients.Parts(param_labels, params, names)
    shared, heads, frozen = parts.split(params)

    def evaluate(shared, heads, taps):
      layers = _Layers(shared, taps)
      out = loss_fn(parts.join(shared, heads, frozen), layers, *args)
      losses, aux = out if has_aux else (out, None)
      return gradients.as_scalars(losses, names), aux, layers

    outputs = jax.eval_shape(
      lambda x: evaluate(x, heads, {})[2].outputs, shared
    )
    taps = {i: jnp.zeros(y.shape, y.dtype) for i, y in outputs.items()}

    def merge(weights, others):
      both = {**weights, **others}
      return [both[i] for i in range(len(shared))]

    weights = {i: x for i, x in enumerate(shared) if i in taps}
    others = {i: x for i, x in enumerate(shared) if i not in taps}
    paths = parts.split(
      jax.tree_util.tree_map_with_path(
        lambda path, _: jax.tree_util.keystr(path) or 'the root', params
      )
    )[0]
    dependencies.check_independent(
      'losses must use what dense is given through dense alone',
      lambda weights: evaluate(merge(weights, others), heads, {})[0],
      weights,
      [paths[i] for i in weights],
    )

    def losses_of(others, heads, taps):
      losses, aux, layers = evaluate(merge(weights, others), heads, taps)
      return losses, (aux, layers.inputs)

    losses, pull, (aux, inputs) = jax.linearize(
      losses_of, others, heads, taps, has_aux=True
    )

    def pull_back(i):
      transposed = jax.linear_transpose(
        lambda *dots: pull(*dots)[i], others, heads, taps
      )
      of_others, of_heads, cotangents = transposed(jnp.ones_like(losses[i]))
      return of_others, cotangents, of_heads[names[i]]

    found = [pull_back(i) for i in range(size)]
    stack, cotangents = _inner.keep_active(
      present,
      jax.tree.map(lambda *rows: jnp.stack(rows), *(f[:2] for f in found)),
    )
    layers = {i: _layer(inputs[i], cotangents[i]) for i in taps}
    gram = _inner.gram(stack, size) + sum(gram for gram, _ in layers.values())
    stacked = jnp.stack(losses)
    state = gram_updates.weights_for(
      inner, gram, state, jnp.where(present, stacked, 1), present
    )
    w = gram_updates.unless_broken(state.task_weights, gram, present)
    of_weights = {
      i: combine(w).astype(weights[i].dtype)
      for i, (_, combine) in layers.items()
    }
    of_shared = merge(of_weights, _inner.weighted_sum(w, stack))
    scale = w if head_scale == 'weights' else None
    own = {
      task: [_shared_only.scale_head(x, i, scale, present) for x in found[i][2]]
      for i, task in enumerate(names)
    }
    grads = parts.join(of_shared, own, jax.tree.map(jnp.zeros_like, frozen))
    return (stacked, aux), grads, state

  return gram_updates.GramUpdate(init, update)


class _Layers:
  """What a loss function is given as `dense`.

  Attributes:
    inputs: {number of the shared leaf: x}, of all calls.
    outputs: {number of the shared leaf: x @ w}.
  """

  def __init__(self, shared, taps):
    self._shared = shared
    self._taps = taps
    self.inputs = {}
    self.outputs = {}

  def __call__(self, x, w):
    where = [i for i, leaf in enumerate(self._shared) if leaf is w]
    if len(where) != 1 or where[0] in self.inputs:
      raise ValueError(
        'dense must be given a shared leaf as it stands in params, and each '
        f'once; got an array of shape {jnp.shape(w)} that is '
        f'{"one again" if where else "none of them"}'
      )
    (number,) = where
    self.inputs[number] = x
    # Its gradient is made from the cotangents of the tap.
    y = x @ jax.lax.stop_gradient(w).astype(x.dtype)
    self.outputs[number] = y
    return y + self._taps[number] if number in self._taps else y


def _layer(x: jax.Array, cotangents: jax.Array) -> tuple[jax.Array, Any]:
  """Gram matrix [T, T] of the gradients of a layer's weights, and their sum.

  Args:
    x: [..., in], inputs.
    cotangents: [T, ..., out], gradients of each task's loss at the outputs.

  Returns:
    gram [T, T] and `weights [T] -> [in, out]`.
  """
  size = cotangents.shape[0]
  x = x.reshape(-1, x.shape[-1])
  cotangents = cotangents.reshape(size, -1, cotangents.shape[-1])
  rows, inputs, outputs = *x.shape, cotangents.shape[-1]
  if rows * (inputs + size * outputs) > (size - 1) * inputs * outputs:
    stack = jnp.einsum('ni,tno->tio', x, cotangents)
    return (
      _inner.gram(stack, size),
      lambda weights: _inner.weighted_sum(weights, stack),
    )
  dtype = _inner.wide(x.dtype)
  wide = x.astype(dtype)
  kernel = jnp.matmul(wide, wide.T, precision=_HIGHEST)
  moved = jnp.einsum(
    'nm,tmo->tno', kernel, cotangents.astype(dtype), precision=_HIGHEST
  )
  return (
    _inner.cross(moved, cotangents, (size, size)),
    lambda weights: x.T @ _inner.weighted_sum(weights, cotangents),
  )
