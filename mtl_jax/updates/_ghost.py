"""Updates from Gram-based methods without task gradients of dense layers.

The inner product of two tasks' gradients in a layer follows from the layer's
inputs and from the cotangents at its outputs. If a layer has more inputs and
outputs than rows, this takes less work and less memory than the gradients.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

from mtl_jax.gradients import dependencies
from mtl_jax.gradients import linearization
from mtl_jax.transforms import Perturbation
from mtl_jax.transforms.contract import heads
from mtl_jax.transforms.contract import labels
from mtl_jax.transforms.wrappers import ball
from mtl_jax.updates import _ghost_layers
from mtl_jax.updates import _gram_based
from mtl_jax.updates import _joint

# The share of a sum below which float32 keeps it to a few per cent or worse.
_RESOLUTION = 1e-6


def ghost_update(
  aggregator: optax.GradientTransformation,
  task_names: Sequence[str],
  *,
  flat: Perturbation | None = None,
  head_scale: str | None = None,
) -> _joint.JointUpdate:
  r"""The update from a Gram-based method, by inputs and cotangents of layers.

  Let :math:`X` [N, in] be the input rows of a dense layer, with N the batch
  times positions, and :math:`D_i` [N, out] the gradient of task i's loss at its
  outputs. Then the gradient of its weights is :math:`X^\top D_i`, and

  .. math::
    \langle X^\top D_i, X^\top D_j \rangle = \langle D_i, X X^\top D_j \rangle,
    \qquad \sum_i w_i X^\top D_i = X^\top \sum_i w_i D_i

  so that T gradients of the weights are never formed. With `flat` it is the
  update of `flat_minima(combine='separate')`. If :math:`X` depends only on the
  batch, as in a first layer, task i's perturbation of the weights adds

  .. math::
    \frac{\rho}{|g_i|} \, X X^\top D_i

  to the outputs. This product is already available, so neither perturbed
  weights nor a second product with them is needed.

  A layer is treated this way if it takes fewer operations: plain for :math:`N
  (in + T\, out) \le (T - 1)\, in\, out`; with `rho` for :math:`N (in + 2 T\,
  out) \le (3 T - 1)\, in\, out`, and if its inputs are the same at all
  parameters. Other layers, and all leaves outside dense layers, have task
  gradients as in `task_grad`. The result is the same as from the aggregator on
  task gradients.

  With a forward pass as 1 and a backward pass as 2 the plain update takes up to
  :math:`1 + 2 T` and, where N is small, about :math:`2 + T`: T passes for the
  cotangents and one for the weights. In a flat update (:math:`1 + 5 T`) a first
  layer's part is :math:`1 + 3 T`; here it takes about 2 where N is small. Such
  a layer holds T cotangents (3 T when flat) instead of T gradients of its
  weights. If the rows of a gradient cancel to a fraction c of their length, the
  relative error of its inner products may reach float32's over :math:`c^2`,
  while the gradient's error is float32's over c. A task whose gradient cancels
  to rounding in this way (:math:`c^2 < 10^{-6}`) is not perturbed.

  The losses' `Objective` has `dense_loss_fn(params, dense, batch, *args)`, in
  which `dense(x [..., in], w [in, out])` is `x @ w` in the dtype of x. Here w
  must be an unchanged shared leaf from params; each leaf may be used once, and
  not inside jit, vmap, checkpoint or a loop. For a flax model
  `mtl_jax.models.intercept_dense` passes its layers to `dense`. The gradient of
  an absent task's loss must be finite or is dropped.

  Args:
    aggregator: see `gram_update`.
    task_names: the tasks, in the order of every task axis.
    flat: the perturbation of flat minima, not adaptive; None for a plain
      update.
    head_scale: see `gram_update`.

  Returns:
    A joint update; the state is `gram_update`'s.

  Raises:
    ValueError: for an aggregator that needs more than inner products and for an
      adaptive perturbation; at `update` for losses without dense layers, and if
      w is not a shared leaf, is not a matrix or is passed to `dense` twice, or
      if a loss uses such a leaf other than through `dense`.

  Examples:
    >>> import jax.numpy as jnp, mtl_jax
    >>> def dense_loss_fn(w, dense, x):
    ...   y = dense(x, w)
    ...   return {'a': 3 * jnp.sum(y[:, 0]), 'b': 4 * jnp.sum(y[:, 1])}
    >>> objective = mtl_jax.Objective(
    ...   loss_fn=lambda w, x: dense_loss_fn(w, jnp.matmul, x),
    ...   dense_loss_fn=dense_loss_fn)
    >>> losses = mtl_jax.task_losses(objective, ('a', 'b'))
    >>> joint = mtl_jax.ghost_update(mtl_jax.mgda(), ('a', 'b'))
    >>> w, x = jnp.ones((1, 2)), jnp.ones((1, 1))
    >>> found, _ = joint.update(losses.on(x), w, joint.init(w))
    >>> print(found.grads)
    [[1.92 1.44]]

  References:
    Goodfellow, `Efficient Per-Example Gradient Computations
    <https://arxiv.org/abs/1510.01799>`_, 2015 (norms from inputs and
    cotangents, there of examples)
  """
  names = labels.check_task_names(task_names)
  size = len(names)
  if flat is not None and flat.adaptive:
    raise ValueError(
      'flat.adaptive must be False for ghost_update, got True: the moved '
      'weights of its layers are never formed'
    )
  method = _gram_based.GramMethod(
    'ghost_update', aggregator, size, flat, head_scale
  )

  def update(losses, params, state):
    present = losses.active
    partition = labels.Partition(losses.param_labels, params, names)
    shared, own_heads, frozen = partition.split(params)

    def evaluate(shared, heads, ghosts, taps):
      layers = _ghost_layers.Layers(shared, ghosts, taps)
      values, aux = losses.dense_losses(
        partition.join(shared, heads, frozen), layers, asker='ghost_update'
      )
      return values, aux, layers

    ghosts = _ghost_layers.ghosts_of(
      evaluate, shared, own_heads, size, flat is not None
    )
    weights = {i: x for i, x in enumerate(shared) if i in ghosts}
    others = {i: x for i, x in enumerate(shared) if i not in ghosts}

    def merge(weights, others):
      both = {**weights, **others}
      return [both[i] for i in range(len(shared))]

    paths = partition.split(
      partition.tree([path or 'the root' for path in partition.paths])
    )[0]
    dependencies.check_independent(
      'losses must use the weights that dense gets only through dense',
      lambda weights: evaluate(merge(weights, others), own_heads, ghosts, {})[
        0
      ],
      weights,
      [paths[i] for i in weights],
    )

    taps = {i: jnp.zeros(y.shape, y.dtype) for i, y in ghosts.items()}
    # All tasks may use the other shared leaves and the taps.
    together, structure = jax.tree.flatten((others, taps))

    def losses_of(together, heads):
      others, taps = jax.tree.unflatten(structure, together)
      values, aux, layers = evaluate(
        merge(weights, others), heads, ghosts, taps
      )
      inputs = {i: layers.inputs[i] for i in ghosts}
      return dict(zip(names, values, strict=True)), (aux, inputs)

    linear = linearization.linearized(
      losses_of, partition, together, own_heads, elsewhere=flat is not None
    )
    aux, inputs = linear.aux
    kernels = {i: _ghost_layers.Kernel(x) for i, x in inputs.items()}

    def keep(i, of_together, of_head):
      """A task's gradient; zeros for an absent task."""
      gradient = _ghost_layers.Gradient(
        *jax.tree.unflatten(structure, of_together), of_head
      )
      return jax.tree.map(lambda x: jnp.where(present[i], x, 0), gradient)

    found = [keep(i, *linear.task(i)) for i in range(size)]
    gram, moved, sizes = _ghost_layers.gram_of(kernels, found)
    known = jnp.where(present, linear.losses, 1)
    given = _gram_based.Given(known, present)
    w, loss_state = method.weights(gram, state.loss, given)
    flat_state, terms, of_heads = state.flat, [(w, found)], found

    if flat is not None:
      # A gradient that cancels to rounding has no known length or direction.
      squares = jnp.diagonal(gram)
      known_length = ~(squares <= _RESOLUTION * sizes)
      scales = ball.step_sizes(
        ball.Norms(
          jnp.where(known_length, squares, 0),
          jnp.stack([ball.squared_norm(g.head) for g in found]),
        ),
        flat,
        state.count,
      )
      scales = jnp.where(known_length, scales[0], 0), scales[1]

      def at_worst_point(i):
        """Task i's gradient at its own worst point of the ball."""
        of_shared, of_head = (scale[i] for scale in scales)
        move = lambda leaves, grads, scale: jax.tree.map(
          lambda p, g: ball.shifted(p, g, scale), leaves, grads
        )

        there = (
          move(others, found[i].others, of_shared),
          move(taps, {k: moved[k][i] for k in taps}, of_shared),
        )
        sam = linear.elsewhere(
          i,
          jax.tree.leaves(there),
          move(own_heads[names[i]], found[i].head, of_head),
        )
        return keep(i, *sam)

      of_heads = list(map(at_worst_point, range(size)))
      flat_grads = [
        jax.tree.map(jnp.subtract, *pair)
        for pair in zip(of_heads, found, strict=True)
      ]
      v, flat_state = method.flat_weights(
        _ghost_layers.gram_of(kernels, flat_grads)[0],
        gram,
        state.flat,
        given,
        shared,
      )
      terms.append((v, flat_grads))

    sums = [_ghost_layers.weighted_sum(*term) for term in terms]
    of_others, cotangents, _ = jax.tree.map(lambda *x: sum(x), *sums)
    of_weights = {
      i: kernels[i].gradient(cotangents[i]).astype(weights[i].dtype)
      for i in ghosts
    }
    scale = w if method.head_scale == 'weights' else None
    own = {
      task: [heads.scale_head(x, i, scale, present) for x in of_heads[i].head]
      for i, task in enumerate(names)
    }
    zeros = jax.tree.map(jnp.zeros_like, frozen)
    grads = partition.join(merge(of_weights, of_others), own, zeros)
    count = optax.safe_increment(state.count)
    state = _gram_based.GramUpdateState(loss_state, flat_state, count)
    return _joint.Found(grads, linear.losses, aux), state

  return _joint.JointUpdate(method.init, update, method.after_step)
