"""Updates of Gram-based methods without the task gradients of dense layers.

The inner product of two tasks' gradients of a layer follows from what comes
into the layer and what comes back to its outputs. Where a layer has more inputs
and outputs than there are rows to multiply, that is less work and less memory
than the gradients.
"""

from collections.abc import Callable
from collections.abc import Collection
from collections.abc import Mapping
from collections.abc import Sequence
import math
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtl_jax import dependencies
from mtl_jax import gradients
from mtl_jax import gram_updates
from mtl_jax.transforms import _aggregator
from mtl_jax.transforms import _inner
from mtl_jax.transforms import _labels
from mtl_jax.transforms import _perturbation
from mtl_jax.transforms import _shared_only

_HIGHEST = jax.lax.Precision.HIGHEST
# The part of a sum below which float32 leaves a few per cent of it, or nothing.
_RESOLUTION = 1e-6


def ghost_update(
  loss_fn: Callable[..., Any],
  aggregator: optax.GradientTransformation,
  task_names: Sequence[str],
  *,
  rho: float | Callable[[jax.Array], Any] | None = None,
  rho_heads: float | Callable[[jax.Array], Any] | None = None,
  norm: str = 'separate',
  head_scale: str | None = None,
  eps: float = 1e-12,
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

  so that T gradients of the weights are never formed. With `rho` it is the
  update of `flat_minima(combine='separate')`. Where :math:`X` comes from the
  batch alone, as in a first layer, task i's perturbation of the weights adds

  .. math::
    \frac{\rho}{|g_i|} \, X X^\top D_i

  to the outputs, whose product is already there: neither perturbed weights nor
  a second product with them is needed.

  A layer is treated so where it takes fewer operations: plain for :math:`N (in
  + T\, out) \le (T - 1)\, in\, out`; with `rho` for :math:`N (in + 2 T\, out)
  \le (3 T - 1)\, in\, out`, and where its inputs are the same at all
  parameters. Others, and all leaves outside of dense layers, have task
  gradients as in `task_grad`. The numbers are those of the aggregator on task
  gradients.

  With a forward pass as 1 and a backward pass as 2 the plain update takes up to
  :math:`1 + 2 T` and, where N is small, about :math:`2 + T`: T passes for the
  cotangents and one for the weights. Of the :math:`1 + 5 T` of a flat update a
  first layer's part, :math:`1 + 3 T`, takes about 2 where N is small. Such a
  layer holds T cotangents (3 T when flat) in place of T gradients of its
  weights. Where the rows of a gradient cancel to a part c of their length, the
  relative error of its inner products may reach that of float32 over
  :math:`c^2`, for the gradient over c; a task whose gradient cancels to
  rounding so (:math:`c^2 < 10^{-6}`) is not perturbed.

  Args:
    loss_fn: `(params, dense, *args) -> {task: scalar}` (or an array [T]), or
      `(losses, aux)` with `has_aux`. `dense(x [..., in], w [in, out])` is `x @
      w` in the dtype of x, for a shared leaf w just as it stands in params,
      once a leaf and not inside of jit, vmap, checkpoint or a loop. For a flax
      model `mtl_jax.models.intercept_dense` hands its layers to `dense`. The
      gradient of an absent task's loss must be finite or is left out.
    aggregator: see `gram_update`.
    task_names: the tasks, in the order of every task axis.
    rho: radius of the perturbation, or an optax schedule of the count; None for
      no perturbation.
    rho_heads: see `flat_minima`.
    norm: see `flat_minima`.
    head_scale: see `shared_only`, and with `rho` `flat_minima`, whose defaults
      these are.
    eps: see `flat_minima`.
    param_labels: see `shared_only`.
    has_aux: whether `loss_fn` returns `(losses, aux)`.

  Returns:
    `GramUpdate(init, update)`; the state is `gram_update`'s.

  Raises:
    ValueError: for an aggregator that needs more than inner products, and for
      arguments out of range; at `update` for a w that is no shared leaf, is no
      matrix or is used twice, or, of a layer treated so, on which a loss
      depends by another way than `dense`.

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
  options = gram_updates.Options(
    aggregator,
    size,
    rho=rho,
    rho_heads=rho_heads,
    norm=norm,
    head_scale=head_scale,
    eps=eps,
  )
  inner = options.inner

  def update(params, state, *args, active=None):
    present = _aggregator.full_active(active, size)
    parts = gradients.Parts(param_labels, params, names)
    shared, heads, frozen = parts.split(params)

    def evaluate(shared, heads, ghosts, taps):
      layers = _Layers(shared, ghosts, taps)
      out = loss_fn(parts.join(shared, heads, frozen), layers, *args)
      losses, aux = out if has_aux else (out, None)
      return gradients.as_scalars(losses, names), aux, layers

    ghosts = _ghosts(evaluate, shared, heads, size, options.is_flat)
    weights = {i: x for i, x in enumerate(shared) if i in ghosts}
    others = {i: x for i, x in enumerate(shared) if i not in ghosts}

    def merge(weights, others):
      both = {**weights, **others}
      return [both[i] for i in range(len(shared))]

    paths = parts.split(
      jax.tree_util.tree_map_with_path(
        lambda path, _: jax.tree_util.keystr(path) or 'the root', params
      )
    )[0]
    dependencies.check_independent(
      'losses must use what dense is given through dense alone',
      lambda weights: evaluate(merge(weights, others), heads, ghosts, {})[0],
      weights,
      [paths[i] for i in weights],
    )

    def losses_of(others, heads, taps):
      losses, aux, layers = evaluate(
        merge(weights, others), heads, ghosts, taps
      )
      return losses, (aux, {i: layers.inputs[i] for i in ghosts})

    taps = {i: jnp.zeros(y.shape, y.dtype) for i, y in ghosts.items()}
    losses, pull, (aux, inputs) = jax.linearize(
      losses_of, others, heads, taps, has_aux=True
    )
    kernels = {i: _Kernel(x) for i, x in inputs.items()}

    def keep(i, tree):
      """Zeros for an absent task."""
      return jax.tree.map(lambda x: jnp.where(present[i], x, 0), tree)

    def pull_back(i):
      transposed = jax.linear_transpose(
        lambda *dots: pull(*dots)[i], others, heads, taps
      )
      of_others, of_heads, cotangents = transposed(jnp.ones_like(losses[i]))
      return keep(i, _Gradient(of_others, cotangents, of_heads[names[i]]))

    found = [pull_back(i) for i in range(size)]
    gram, moved, sizes = _gram(kernels, found)
    stacked = jnp.stack(losses)
    known = jnp.where(present, stacked, 1)
    loss_state = gram_updates.weights_for(
      inner, gram, state.loss, known, present
    )
    w = gram_updates.unless_broken(loss_state.task_weights, gram, present)
    flat_state, terms, of_heads = state.flat, [(w, found)], found

    if options.is_flat:
      # Of a gradient that cancels to rounding neither length nor direction are
      # known.
      squares = jnp.diagonal(gram)
      known_length = ~(squares <= _RESOLUTION * sizes)
      scales = _perturbation.step_sizes(
        _perturbation.Norms(
          jnp.where(known_length, squares, 0),
          jnp.stack([_perturbation.squared_norm(g.head) for g in found]),
        ),
        options.radii(state.count),
        norm=norm,
        eps=eps,
      )
      scales = jnp.where(known_length, scales[0], 0), scales[1]

      def at_worst_point(i):
        """Task i's gradient at its own worst point of the ball."""
        of_shared, of_head = (scale[i] for scale in scales)
        move = lambda leaves, grads, scale: jax.tree.map(
          lambda p, g: _perturbation.shifted(p, g, scale), leaves, grads
        )

        def own_loss(others, taps, head):
          return losses_of(others, {**heads, names[i]: head}, taps)[0][i]

        sam = jax.grad(own_loss, argnums=(0, 1, 2))(
          move(others, found[i].others, of_shared),
          move(taps, {k: moved[k][i] for k in taps}, of_shared),
          move(heads[names[i]], found[i].head, of_head),
        )
        return keep(i, _Gradient(*sam))

      of_heads = list(map(at_worst_point, range(size)))
      flat = [
        jax.tree.map(jnp.subtract, *pair)
        for pair in zip(of_heads, found, strict=True)
      ]
      v, flat_state = gram_updates.weights_of_flat(
        inner, _gram(kernels, flat)[0], gram, state.flat, known, present, shared
      )
      terms.append((v, flat))

    sums = [_weighted_sum(*term) for term in terms]
    of_others, cotangents, _ = jax.tree.map(lambda *x: sum(x), *sums)
    of_weights = {
      i: kernels[i].gradient(cotangents[i]).astype(weights[i].dtype)
      for i in ghosts
    }
    scale = w if options.head_scale == 'weights' else None
    own = {
      task: [
        _shared_only.scale_head(x, i, scale, present) for x in of_heads[i].head
      ]
      for i, task in enumerate(names)
    }
    zeros = jax.tree.map(jnp.zeros_like, frozen)
    grads = parts.join(merge(of_weights, of_others), own, zeros)
    return (stacked, aux), grads, options.next(loss_state, flat_state, state)

  return gram_updates.GramUpdate(options.init, update)


class _Gradient(NamedTuple):
  """A task's gradient.

  Attributes:
    others: of shared leaves, `{number: array}`.
    cotangents: at the outputs of layers whose weights have none formed.
    head: of the leaves of the task's own head.
  """

  others: Mapping[int, jax.Array]
  cotangents: Mapping[int, jax.Array]
  head: Any


class _Layers:
  """What a loss function is given as `dense`.

  Attributes:
    inputs: {number of the shared leaf: x}, of all calls.
    outputs: {number of the shared leaf: x @ w}.
  """

  def __init__(self, shared, ghosts: Collection[int], taps):
    self._shared = shared
    self._ghosts = ghosts
    self._taps = taps
    self.inputs: dict[int, jax.Array] = {}
    self.outputs: dict[int, jax.Array] = {}

  def __call__(self, x, w):
    where = [i for i, leaf in enumerate(self._shared) if leaf is w]
    if len(where) != 1 or where[0] in self.inputs:
      raise ValueError(
        'dense must be given a shared leaf as it stands in params, and each '
        f'once; got an array of shape {jnp.shape(w)} that is '
        f'{"one again" if where else "none of them"}'
      )
    if jnp.ndim(w) != 2:
      raise ValueError(f'dense needs w [in, out], got shape {jnp.shape(w)}')
    (number,) = where
    self.inputs[number] = x
    if number in self._ghosts:
      # Its gradient is made from the cotangents of the tap.
      w = jax.lax.stop_gradient(w)
    y = x @ w.astype(x.dtype)
    self.outputs[number] = y
    return y + self._taps[number] if number in self._taps else y


class _Kernel:
  """Products of a layer's inputs with each other, and what they are for.

  Attributes:
    x: inputs [..., in] of the layer, as rows [N, in].
    products: [N, N], float32 at least.
  """

  def __init__(self, x: jax.Array):
    self.x = x.reshape(-1, x.shape[-1])
    rows = self.x.astype(_inner.wide(x.dtype))
    self.products = jnp.matmul(rows, rows.T, precision=_HIGHEST)

  def moved(self, cotangents: jax.Array) -> jax.Array:
    """The inputs times the gradient of the weights, [..., out]."""
    rows = cotangents.reshape(-1, cotangents.shape[-1])
    rows = rows.astype(self.products.dtype)
    moved = jnp.matmul(self.products, rows, precision=_HIGHEST)
    return moved.reshape(cotangents.shape)

  def gradient(self, cotangents: jax.Array) -> jax.Array:
    """The gradient of the weights [in, out]."""
    return self.x.T @ cotangents.reshape(-1, cotangents.shape[-1])


def _ghosts(evaluate, shared, heads, size, is_flat):
  """The layers whose task gradients are not formed, `{number: output}`."""

  def trace(shared, heads):
    layers = evaluate(shared, heads, (), {})[2]
    return layers.inputs, layers.outputs

  inputs, outputs = jax.eval_shape(trace, shared, heads)
  moves = dict.fromkeys(inputs, False)
  if is_flat:
    moves, _ = dependencies.needed(trace, shared, heads)
  return {
    i: outputs[i]
    for i, x in inputs.items()
    if not moves[i]
    and _is_less(
      math.prod(x.shape[:-1]), x.shape[-1], outputs[i].shape[-1], size, is_flat
    )
  }


def _is_less(rows, inputs, outputs, size, is_flat):
  """Whether products of inputs take fewer operations than task gradients."""
  # Flat: products with both cotangents, beside two gradients and a product
  # with perturbed weights.
  passes, formed = (2, 3) if is_flat else (1, 1)
  with_kernel = rows * (inputs + passes * size * outputs)
  return with_kernel <= (formed * size - 1) * inputs * outputs


def _gram(kernels, grads):
  """Gram matrix [T, T] of task gradients, and what they move outputs by.

  Args:
    kernels: `{layer: _Kernel}`.
    grads: a `_Gradient` of every task.

  Returns:
    The matrix; `{layer: [inputs times the gradient of each task]}`; and [T],
    sums of the magnitudes whose sums are the diagonal.
  """
  stack = lambda trees: jax.tree.map(lambda *rows: jnp.stack(rows), *trees)
  size = len(grads)
  gram = _inner.gram(stack([g.others for g in grads]), size)
  sizes = jnp.diagonal(gram)
  all_moved = {}
  for i, kernel in kernels.items():
    rows = [g.cotangents[i] for g in grads]
    moved = [kernel.moved(row) for row in rows]
    gram += _inner.cross(jnp.stack(moved), jnp.stack(rows), (size, size))
    sizes += jnp.stack(
      [jnp.sum(jnp.abs(a * b)) for a, b in zip(moved, rows, strict=True)]
    )
    all_moved[i] = moved
  return gram, all_moved, sizes


def _weighted_sum(weights, grads):
  """The weighted sum over tasks, of all but heads."""

  def combine(*rows):
    wide = _inner.wide(rows[0].dtype)
    total = sum(w * x.astype(wide) for w, x in zip(weights, rows, strict=True))
    return total.astype(rows[0].dtype)

  return jax.tree.map(combine, *(g._replace(head=()) for g in grads))
