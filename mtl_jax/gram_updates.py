"""Updates of Gram-based methods that never hold a stack of task gradients.

A method that is a map from the Gram matrix to weights needs no T gradients at
once: entries of the matrix take two at a time, and the update is one gradient
of the weighted loss. Memory is traded for backward passes.
"""

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mtl_jax import gradients
from mtl_jax import gram_based
from mtl_jax.transforms.contract import aggregation
from mtl_jax.transforms.contract import labels
from mtl_jax.transforms.wrappers import ball


def gram_update(
  loss_fn: Callable[..., Any],
  aggregator: optax.GradientTransformation,
  task_names: Sequence[str],
  *,
  rho: float | Callable[[jax.Array], Any] | None = None,
  rho_heads: float | Callable[[jax.Array], Any] | None = None,
  adaptive: bool = False,
  norm: str = 'separate',
  head_scale: str | None = None,
  eps: float = 1e-12,
  param_labels: labels.ParamLabels = labels.default_labels,
  has_aux: bool = False,
) -> gram_based.GramUpdate:
  r"""The update of a Gram-based method, for models too large for a stack.

  .. math::
    G_{ij} = \langle g_i, g_j \rangle, \qquad
    d = \nabla_\theta \sum_i w_i(G)\, L_i

  with each :math:`g_i` pulled back anew for every entry. With `rho` it is the
  update of `flat_minima(combine='separate')`: the same with the flat gradients
  :math:`h_i`, whose weights :math:`v` make :math:`\sum_i v_i h_i` the second
  part.

  What costs what, with a forward pass as 1 and a backward pass as 2, and copies
  of the shared parameters beside activations and the result:

  * the stack: time :math:`1 + 2 T`, memory :math:`T` copies;
    in `flat_minima` :math:`1 + 5 T` and :math:`2 T + 1`;
  * here: time :math:`3 + T (T + 1)`, memory 2;
    with `rho` :math:`1 + 7 T (T + 1) / 2 + 5 T` and 4.

  It is for few tasks and parameters that leave no room for T gradients.

  Args:
    loss_fn: `(params, *args) -> {task: scalar}` (or an array [T]), or `(losses,
      aux)` with `has_aux`. The gradient of an absent task's loss must be
      finite, as that of a masked mean is.
    aggregator: one that looks at inner products alone: all but `graddrop`,
      `trimmed_mean`, those that track gradients, and those with `extra_grads`.
    task_names: the tasks, in the order of every task axis.
    rho: radius of the perturbation, or an optax schedule of the count; None for
      no perturbation.
    rho_heads: see `flat_minima`.
    adaptive: see `flat_minima`.
    norm: see `flat_minima`.
    head_scale: see `shared_only`, and with `rho` `flat_minima`, whose defaults
      these are.
    eps: see `flat_minima`.
    param_labels: see `shared_only`.
    has_aux: whether `loss_fn` returns `(losses, aux)`.

  Returns:
    `GramUpdate(init, update)`.

  Raises:
    ValueError: for an aggregator that needs more than inner products, and for
      arguments out of range.

  Examples:
    >>> import jax.numpy as jnp, mtl_jax
    >>> def loss_fn(params, x):
    ...   return {'a': 3 * params[0], 'b': 4 * params[1]}
    >>> step = mtl_jax.gram_update(loss_fn, mtl_jax.mgda(), ('a', 'b'))
    >>> params = jnp.ones(2)
    >>> (losses, _), grads, _ = step.update(params, step.init(params), None)
    >>> print(grads)
    [1.92 1.44]

  References:
    Sener and Koltun, `Multi-Task Learning as Multi-Objective Optimization
    <https://arxiv.org/abs/1810.04650>`_, 2018 (the update as a weighted loss)
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

    def losses_of(shared, heads):
      out = loss_fn(parts.join(shared, heads, frozen), *args)
      losses, aux = out if has_aux else (out, None)
      return gradients.as_scalars(losses, names), aux

    losses, pull, aux = jax.linearize(losses_of, shared, heads, has_aux=True)

    def pull_back(i):
      """Task i's gradient: shared leaves and its own head's."""
      transposed = jax.linear_transpose(
        lambda *dots: pull(*dots)[i], shared, heads
      )
      of_shared, of_heads = transposed(jnp.ones_like(losses[i]))
      return of_shared, of_heads[names[i]]

    def sam_gradient(i, of_shared, of_head):
      """Task i's gradient at its own worst point of the ball."""
      head = heads[names[i]]
      moved, moved_head = ball.perturbed_task(
        (of_shared, of_head),
        (shared, head),
        rho=options.radii(state.count),
        adaptive=adaptive,
        norm=norm,
        eps=eps,
      )

      def own_loss(shared, head):
        return losses_of(shared, {**heads, names[i]: head})[0][i]

      return jax.grad(own_loss, argnums=(0, 1))(moved, moved_head)

    def loss_gradient(i):
      return pull_back(i)[0]

    def flat_gradient(i):
      of_shared, of_head = pull_back(i)
      sam, _ = sam_gradient(i, of_shared, of_head)
      return jax.tree.map(jnp.subtract, sam, of_shared)

    stacked = jnp.stack(losses)
    known = jnp.where(present, stacked, 1)
    gram = _by_pairs(loss_gradient, present)
    loss_state = gram_based.weights_for(inner, gram, state.loss, known, present)
    w = gram_based.unless_broken(loss_state.task_weights, gram, present)
    flat_state = state.flat
    scale = w if options.head_scale == 'weights' else jnp.ones_like(w)
    scale = jnp.where(present, scale, 0)
    times = lambda x, factor: (factor * x).astype(x.dtype)
    if not options.is_flat:
      # A weighted sum of the losses, with what the forward pass has left.
      used = [w[i].astype(loss.dtype) for i, loss in enumerate(losses)]
      transposed = jax.linear_transpose(pull, shared, heads)
      of_shared, _ = transposed(tuple(used))
      own = {
        task: [
          jnp.where(present[i], times(x, scale[i]), 0) for x in pull_back(i)[1]
        ]
        for i, task in enumerate(names)
      }
    else:
      gram_of_flat = _by_pairs(flat_gradient, present)
      v, flat_state = gram_based.weights_of_flat(
        inner, gram_of_flat, gram, state.flat, known, present, shared
      )

      def add(i, total, own):
        g, of_head = pull_back(i)
        s, of_head = sam_gradient(i, g, of_head)
        more = lambda t, g, s: (
          t + ((w[i] - v[i]) * g + v[i] * s).astype(t.dtype)
        )
        total = jax.tree.map(
          lambda t, g, s: jnp.where(present[i], more(t, g, s), t), total, g, s
        )
        head = [jnp.where(present[i], times(x, scale[i]), 0) for x in of_head]
        return total, {**own, names[i]: head}

      def step(i, carry):
        branches = [lambda c, k=k: add(k, *c) for k in range(size)]
        return jax.lax.switch(i, branches, carry)

      start = jax.tree.map(jnp.zeros_like, shared), dict(heads)
      of_shared, own = jax.lax.fori_loop(0, size, step, start)
    zeros = jax.tree.map(jnp.zeros_like, frozen)
    grads = parts.join(of_shared, own, zeros)
    return (stacked, aux), grads, options.next(loss_state, flat_state, state)

  return gram_based.GramUpdate(options.init, update)


def _by_pairs(gradient: Callable[[int], Any], present: jax.Array) -> jax.Array:
  """Gram matrix [T, T] from two gradients at a time."""
  size = present.shape[0]

  def of(i):
    return jax.lax.switch(i, [lambda k=k: gradient(k) for k in range(size)])

  def inner_product(a, b):
    total = jnp.zeros((), jnp.float32)
    for x, y in zip(a, b, strict=True):
      wide = jnp.promote_types(x.dtype, jnp.float32)
      total += jnp.sum(x.astype(wide) * y.astype(wide))
    return total

  def row(i, gram):
    g = of(i)
    gram = gram.at[i, i].set(inner_product(g, g))
    return jax.lax.fori_loop(
      0, i, lambda j, gram: gram.at[i, j].set(inner_product(g, of(j))), gram
    )

  lower = jax.lax.fori_loop(0, size, row, jnp.zeros((size, size)))
  gram = jnp.where(jnp.tri(size, dtype=bool), lower, lower.T)
  return jnp.where(present[:, None] & present[None, :], gram, 0)
