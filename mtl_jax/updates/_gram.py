"""Updates from Gram-based methods without a stack of task gradients.

A map from the Gram matrix to weights does not need T gradients at once: an
entry of the matrix takes two, and the update is one gradient of the weighted
loss. This saves memory at the price of backward passes.
"""

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mtl_jax.transforms import Perturbation
from mtl_jax.transforms.contract import heads
from mtl_jax.transforms.contract import labels
from mtl_jax.transforms.wrappers import ball
from mtl_jax.updates import _earlier
from mtl_jax.updates import _gram_based
from mtl_jax.updates import _joint


@_earlier.with_loss_fn
def gram_update(
  aggregator: optax.GradientTransformation,
  task_names: Sequence[str],
  *,
  flat: Perturbation | None = None,
  head_scale: str | None = None,
) -> _joint.JointUpdate:
  r"""The update from a Gram-based method, for models too large for a stack.

  .. math::
    G_{ij} = \langle g_i, g_j \rangle, \qquad
    d = \nabla_\theta \sum_i w_i(G)\, L_i

  with each :math:`g_i` pulled back again for every entry. With `flat` it is the
  update of `flat_minima(combine='separate')`: the same with the flat gradients
  :math:`h_i`, whose weights :math:`v` make :math:`\sum_i v_i h_i` the second
  part.

  The costs are below, with a forward pass as 1 and a backward pass as 2. Memory
  is in copies of the shared parameters, besides activations and the result:

  * the stack: time :math:`1 + 2 T`, memory :math:`T` copies;
    in `flat_minima` :math:`1 + 5 T` and :math:`2 T + 1`;
  * here: time :math:`3 + T (T + 1)`, memory 2;
    with `flat` :math:`1 + 7 T (T + 1) / 2 + 5 T` and 4.

  It is for few tasks, and for parameters that leave no room for T gradients.

  Args:
    aggregator: one that uses only inner products (`Aggregator.weigh`): all
      except `graddrop`, `trimmed_mean`, those that track gradients, and those
      with `extra_grads`.
    task_names: the tasks, in the order of every task axis.
    flat: the perturbation of flat minima; None for a plain update.
    head_scale: see `shared_only` or, with `flat`, `flat_minima`; the defaults
      are theirs.

  Returns:
    A joint update with a `GramUpdateState`.

  Raises:
    ValueError: for an aggregator that needs more than inner products; at
      `update` for losses that give no single pull-backs.

  Examples:
    >>> import jax.numpy as jnp, mtl_jax
    >>> losses = mtl_jax.task_losses(
    ...   lambda p, x: {'a': 3 * p[0], 'b': 4 * p[1]}, ('a', 'b'))
    >>> joint = mtl_jax.gram_update(mtl_jax.mgda(), ('a', 'b'))
    >>> params = jnp.ones(2)
    >>> found, _ = joint.update(losses.on(None), params, joint.init(params))
    >>> print(found.grads)
    [1.92 1.44]

  References:
    Sener and Koltun, `Multi-Task Learning as Multi-Objective Optimization
    <https://arxiv.org/abs/1810.04650>`_, 2018 (the update as a weighted loss)
  """
  names = labels.check_task_names(task_names)
  size = len(names)
  method = _gram_based.GramMethod(
    'gram_update', aggregator, size, flat, head_scale
  )

  def update(losses, params, state):
    found = losses.pull_backs(
      params, asker='gram_update', elsewhere=flat is not None
    )
    linear = found.linear
    shared, own_heads, frozen = found.params
    present = losses.active
    known = jnp.where(present, linear.losses, 1)
    given = _gram_based.Given(known, present)

    def sam_gradient(i, of_shared, of_head):
      """Task i's gradient at its own worst point of the ball."""
      moved = ball.perturbed_task(
        (of_shared, of_head), (shared, own_heads[names[i]]), flat, state.count
      )
      return linear.elsewhere(i, *moved)

    def flat_gradient(i):
      of_shared, of_head = linear.task(i)
      sam, _ = sam_gradient(i, of_shared, of_head)
      return jax.tree.map(jnp.subtract, sam, of_shared)

    dtype = _gram_based.dtype_of(shared)
    gram = _by_pairs(lambda i: linear.task(i)[0], present, dtype)
    w, loss_state = method.weights(gram, state.loss, given)
    scale = w if method.head_scale == 'weights' else None
    of_head = lambda i, leaves: [
      heads.scale_head(x, i, scale, present) for x in leaves
    ]
    flat_state = state.flat
    if flat is None:
      # A weighted sum of the losses, from the stored forward pass.
      of_shared = linear.weighted(w)
      own = {t: of_head(i, linear.task(i)[1]) for i, t in enumerate(names)}
    else:
      gram_of_flat = _by_pairs(flat_gradient, present, dtype)
      v, flat_state = method.flat_weights(
        gram_of_flat, gram, state.flat, given, shared
      )

      def add(i, total, own):
        g, head = linear.task(i)
        s, head = sam_gradient(i, g, head)
        more = lambda t, g, s: (
          t + ((w[i] - v[i]) * g + v[i] * s).astype(t.dtype)
        )
        total = jax.tree.map(
          lambda t, g, s: jnp.where(present[i], more(t, g, s), t), total, g, s
        )
        return total, {**own, names[i]: of_head(i, head)}

      def step(i, carry):
        branches = [lambda c, k=k: add(k, *c) for k in range(size)]
        return jax.lax.switch(i, branches, carry)

      start = jax.tree.map(jnp.zeros_like, shared), dict(own_heads)
      of_shared, own = jax.lax.fori_loop(0, size, step, start)
    zeros = jax.tree.map(jnp.zeros_like, frozen)
    grads = found.join(of_shared, own, zeros)
    count = optax.safe_increment(state.count)
    state = _gram_based.GramUpdateState(loss_state, flat_state, count)
    return _joint.Found(grads, linear.losses, linear.aux), state

  return _joint.JointUpdate(method.init, update, method.after_step)


def _by_pairs(
  gradient: Callable[[int], Any], present: jax.Array, dtype: Any
) -> jax.Array:
  """Gram matrix [T, T] from two gradients at a time."""
  size = present.shape[0]

  def of(i):
    return jax.lax.switch(i, [lambda k=k: gradient(k) for k in range(size)])

  def inner_product(a, b):
    total = jnp.zeros((), dtype)
    for x, y in zip(a, b, strict=True):
      total += jnp.sum(x.astype(dtype) * y.astype(dtype))
    return total

  def row(i, gram):
    g = of(i)
    gram = gram.at[i, i].set(inner_product(g, g))
    return jax.lax.fori_loop(
      0, i, lambda j, gram: gram.at[i, j].set(inner_product(g, of(j))), gram
    )

  lower = jax.lax.fori_loop(0, size, row, jnp.zeros((size, size), dtype))
  gram = jnp.where(jnp.tri(size, dtype=bool), lower, lower.T)
  return jnp.where(present[:, None] & present[None, :], gram, 0)
