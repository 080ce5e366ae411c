"""The gradient of a weighted loss: one backward pass, whatever T is.

What loss weightings need, and all they need. The weights may depend on the
losses of the same forward pass; they are constants of the differentiation.
"""

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtl_jax import gradients
from mtl_jax import slices as slicing
from mtl_jax import types
from mtl_jax.transforms.contract import labels


class WeightedGrad(NamedTuple):
  """What `weighted_grad` returns.

  Attributes:
    losses: `(params, batch, *args) -> losses [T]`; forward passes alone.
    at: `(weigh, params, batch, *args) -> ((losses [T], aux, weighed), grads)`
      with `weigh(losses [T]) -> (weights [T], anything)`. `weighed` is what
      `weigh` returned; aux is None without `has_aux`. grads, laid out as the
      parameters, is the gradient of the sum of weights times losses.
  """

  losses: Callable[..., jax.Array]
  at: Callable[..., tuple[tuple[jax.Array, Any, Any], types.Params]]


def weighted_grad(
  loss_fn: Callable[..., Any],
  task_names: Sequence[str],
  *,
  micro_batches: int = 1,
  has_aux: bool = False,
) -> WeightedGrad:
  r"""The gradient of a weighted sum of task losses.

  .. math:: \nabla_\theta \sum_i w_i(L)\, L_i(\theta)

  One forward and one backward pass; with micro-batches one more forward pass,
  because weights need the losses of the whole batch before any gradient is
  scaled by them.

  Args:
    loss_fn: `(params, batch, *args) -> {task: scalar}` (or an array [T]), or
      `(losses, aux)` with `has_aux`.
    task_names: the tasks, in the order of every task axis.
    micro_batches: see `mtl_jax.task_grad`.
    has_aux: whether `loss_fn` returns `(losses, aux)`.

  Returns:
    `WeightedGrad(losses, at)`. The loss of a task whose weight is exactly 0 has
    no part in the gradient, whatever it is; a weight that is NaN makes the
    gradient NaN.

  Raises:
    ValueError: for `micro_batches` below 1 or that does not divide the batch,
      and for losses that are not one scalar per task.

  Examples:
    >>> import jax.numpy as jnp, mtl_jax
    >>> loss_fn = lambda params, batch: {'a': params**2, 'b': 3 * params}
    >>> weighting = mtl_jax.si()
    >>> grad = mtl_jax.weighted_grad(loss_fn, ('a', 'b'))
    >>> (losses, _, (weights, _)), grads = grad.at(
    ...   lambda losses: weighting.update(losses, weighting.init(2)),
    ...   jnp.array(2.0), None)
    >>> print(losses, grads)  # d/dx [log x^2 + log 3x] = 3 / x
    [4. 6.] 1.5
  """
  names = labels.check_task_names(task_names)
  if micro_batches < 1:
    raise ValueError(f'micro_batches must be at least 1, got {micro_batches}')

  def losses_of(params, batch, *args):
    out = loss_fn(params, batch, *args)
    losses, aux = out if has_aux else (out, None)
    return jnp.stack(gradients.as_scalars(losses, names)), aux

  def weighted_sum(weights, losses):
    weights = jax.lax.stop_gradient(weights)
    # A product with 0 would let the NaN of an absent task through.
    used = weights != 0
    return jnp.sum(jnp.where(used, weights * jnp.where(used, losses, 0), 0))

  if micro_batches == 1:

    def at(weigh, params, batch, *args):
      def total(params):
        losses, aux = losses_of(params, batch, *args)
        weighed = weigh(jax.lax.stop_gradient(losses))
        return weighted_sum(weighed[0], losses), (losses, aux, weighed)

      grads, found = jax.grad(total, has_aux=True)(params)
      return found, grads

    return WeightedGrad(lambda *args: losses_of(*args)[0], at)

  def shares(batch):
    """The slices, and the share of each task's labels that each holds."""
    pieces = slicing.cut(batch, micro_batches)
    counts = slicing.label_counts(pieces, names, micro_batches)
    total = jnp.sum(counts, axis=0, keepdims=True)
    return pieces, counts / jnp.maximum(total, 1)

  def whole_losses(params, batch, *args):
    def one(piece_and_share):
      piece, share = piece_and_share
      losses, _ = losses_of(params, piece, *args)
      return jnp.where(share > 0, share * losses, 0)

    # A sum in order, as over the slices of the second pass.
    return jnp.sum(jax.lax.map(one, shares(batch)), axis=0)

  def sliced_at(weigh, params, batch, *args):
    weighed = weigh(jax.lax.stop_gradient(whole_losses(params, batch, *args)))

    def one(piece_and_share):
      piece, share = piece_and_share

      def total(params):
        losses, aux = losses_of(params, piece, *args)
        own = jnp.where(share > 0, share * weighed[0], 0)
        return weighted_sum(own, losses), (losses, aux)

      grads, (losses, aux) = jax.grad(total, has_aux=True)(params)
      return (jnp.where(share > 0, share * losses, 0), grads), aux

    def step(sums, piece_and_share):
      more, aux = one(piece_and_share)
      return jax.tree.map(jnp.add, sums, more), aux

    pieces = shares(batch)
    first = jax.tree.map(lambda x: x[0], pieces)
    start = jax.tree.map(jnp.zeros_like, jax.eval_shape(one, first)[0])
    (losses, grads), aux = jax.lax.scan(step, start, pieces)
    return (losses, aux, weighed), grads

  return WeightedGrad(whole_losses, sliced_at)
