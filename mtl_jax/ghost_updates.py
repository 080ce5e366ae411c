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
from mtl_jax import ghost_layers
from mtl_jax import gradients
from mtl_jax import gram_based
from mtl_jax.transforms.contract import aggregation
from mtl_jax.transforms.contract import labels
from mtl_jax.transforms.wrappers import _shared_only
from mtl_jax.transforms.wrappers import ball

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
  param_labels: labels.ParamLabels = labels.default_labels,
  has_aux: bool = False,
) -> gram_based.GramUpdate:
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
  names = labels.check_task_names(task_names)
  size = len(names)
  options = gram_based.Options(
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
    present = aggregation.full_active(active, size)
    parts = gradients.Parts(param_labels, params, names)
    shared, heads, frozen = parts.split(params)

    def evaluate(shared, heads, ghosts, taps):
      layers = ghost_layers.Layers(shared, ghosts, taps)
      out = loss_fn(parts.join(shared, heads, frozen), layers, *args)
      losses, aux = out if has_aux else (out, None)
      return gradients.as_scalars(losses, names), aux, layers

    ghosts = ghost_layers.ghosts_of(
      evaluate, shared, heads, size, options.is_flat
    )
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
    kernels = {i: ghost_layers.Kernel(x) for i, x in inputs.items()}

    def keep(i, tree):
      """Zeros for an absent task."""
      return jax.tree.map(lambda x: jnp.where(present[i], x, 0), tree)

    def pull_back(i):
      transposed = jax.linear_transpose(
        lambda *dots: pull(*dots)[i], others, heads, taps
      )
      of_others, of_heads, cotangents = transposed(jnp.ones_like(losses[i]))
      return keep(
        i, ghost_layers.Gradient(of_others, cotangents, of_heads[names[i]])
      )

    found = [pull_back(i) for i in range(size)]
    gram, moved, sizes = ghost_layers.gram_of(kernels, found)
    stacked = jnp.stack(losses)
    known = jnp.where(present, stacked, 1)
    loss_state = gram_based.weights_for(inner, gram, state.loss, known, present)
    w = gram_based.unless_broken(loss_state.task_weights, gram, present)
    flat_state, terms, of_heads = state.flat, [(w, found)], found

    if options.is_flat:
      # Of a gradient that cancels to rounding neither length nor direction are
      # known.
      squares = jnp.diagonal(gram)
      known_length = ~(squares <= _RESOLUTION * sizes)
      scales = ball.step_sizes(
        ball.Norms(
          jnp.where(known_length, squares, 0),
          jnp.stack([ball.squared_norm(g.head) for g in found]),
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
          lambda p, g: ball.shifted(p, g, scale), leaves, grads
        )

        def own_loss(others, taps, head):
          return losses_of(others, {**heads, names[i]: head}, taps)[0][i]

        sam = jax.grad(own_loss, argnums=(0, 1, 2))(
          move(others, found[i].others, of_shared),
          move(taps, {k: moved[k][i] for k in taps}, of_shared),
          move(heads[names[i]], found[i].head, of_head),
        )
        return keep(i, ghost_layers.Gradient(*sam))

      of_heads = list(map(at_worst_point, range(size)))
      flat = [
        jax.tree.map(jnp.subtract, *pair)
        for pair in zip(of_heads, found, strict=True)
      ]
      v, flat_state = gram_based.weights_of_flat(
        inner,
        ghost_layers.gram_of(kernels, flat)[0],
        gram,
        state.flat,
        known,
        present,
        shared,
      )
      terms.append((v, flat))

    sums = [ghost_layers.weighted_sum(*term) for term in terms]
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

  return gram_based.GramUpdate(options.init, update)
