"""Dense layers without task gradients of their weights, for `ghost_update`."""

from collections.abc import Collection
from collections.abc import Mapping
import math
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtl_jax.gradients import dependencies
from mtl_jax.transforms.contract import algebra

_HIGHEST = jax.lax.Precision.HIGHEST


class Gradient(NamedTuple):
  """A task's gradient.

  Attributes:
    others: gradients of shared leaves, `{number: array}`.
    cotangents: cotangents at the outputs of layers without weight gradients.
    head: gradients of the leaves in the task's own head.
  """

  others: Mapping[int, jax.Array]
  cotangents: Mapping[int, jax.Array]
  head: Any


class Layers:
  """The `dense` argument of a loss function.

  Attributes:
    inputs: {number of the shared leaf: x}, from all calls.
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
      # Its gradient comes from the cotangents at the tap.
      w = jax.lax.stop_gradient(w)
    y = x @ w.astype(x.dtype)
    self.outputs[number] = y
    return y + self._taps[number] if number in self._taps else y


class Kernel:
  """Products of a layer's inputs with each other, and their uses.

  Attributes:
    x: inputs [..., in] of the layer, as rows [N, in].
    products: [N, N], float32 at least.
  """

  def __init__(self, x: jax.Array):
    self.x = x.reshape(-1, x.shape[-1])
    rows = self.x.astype(algebra.wide(x.dtype))
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


def ghosts_of(evaluate, shared, heads, size, is_flat):
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
  # Flat: products with both cotangents, against two gradients and a product
  # with perturbed weights.
  passes, formed = (2, 3) if is_flat else (1, 1)
  with_kernel = rows * (inputs + passes * size * outputs)
  return with_kernel <= (formed * size - 1) * inputs * outputs


def gram_of(kernels, grads):
  """Gram matrix [T, T] of task gradients, and the outputs' shifts by them.

  Args:
    kernels: `{layer: Kernel}`.
    grads: a `Gradient` of every task.

  Returns:
    The matrix; `{layer: [inputs times the gradient of each task]}`; and [T],
    sums of the magnitudes whose sums are the diagonal.
  """
  stack = lambda trees: jax.tree.map(lambda *rows: jnp.stack(rows), *trees)
  size = len(grads)
  gram = algebra.gram(stack([g.others for g in grads]), size)
  sizes = jnp.diagonal(gram)
  all_moved = {}
  for i, kernel in kernels.items():
    rows = [g.cotangents[i] for g in grads]
    moved = [kernel.moved(row) for row in rows]
    gram += algebra.cross(jnp.stack(moved), jnp.stack(rows), (size, size))
    sizes += jnp.stack(
      [jnp.sum(jnp.abs(a * b)) for a, b in zip(moved, rows, strict=True)]
    )
    all_moved[i] = moved
  return gram, all_moved, sizes


def weighted_sum(weights, grads):
  """The weighted sum over tasks, without heads."""

  def combine(*rows):
    wide = algebra.wide(rows[0].dtype)
    total = sum(w * x.astype(wide) for w, x in zip(weights, rows, strict=True))
    return total.astype(rows[0].dtype)

  return jax.tree.map(combine, *(g._replace(head=()) for g in grads))
