"""A convolution as a sum over the places in the kernel, without padding."""

import functools
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from mtl_jax.models.cpu import spans


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def conv_by_taps(x, kernel, strides, padding, precision):
  """The sum over places in the kernel, with one product for each.

  A product takes only the inputs at its place, so that nothing is multiplied by
  the zeros of the padding. Sums are float32 at least.

  Args:
    x: images [B, H, W, C].
    kernel: [height, width, C, features].
    strides: stride in each direction.
    padding: zeros before and behind, in each direction.
    precision: precision of the products.

  Returns:
    Images [B, H', W', features] in the dtype of x.
  """
  return _sum_over_taps(x, kernel, strides, padding, precision)


def _sum_over_taps(x, kernel, strides, padding, precision):
  wide = jnp.promote_types(x.dtype, jnp.float32)
  out_size = spans.out_size(x.shape, kernel.shape, strides, padding)
  out = jnp.zeros((x.shape[0], *out_size, kernel.shape[-1]), wide)
  for tap in _taps(x.shape, kernel.shape, strides, padding):
    value = jnp.matmul(
      tap.inputs_of(x),
      kernel[tap.place],
      precision=precision,
      preferred_element_type=wide,
    )
    out += tap.among_outputs(value, out_size)
  return out.astype(x.dtype)


def conv_by_taps_forward(x, kernel, strides, padding, precision):
  return _sum_over_taps(x, kernel, strides, padding, precision), (x, kernel)


def conv_by_taps_backward(strides, padding, precision, saved, cotangent):
  """Both gradients, tap by tap."""
  x, kernel = saved
  wide = jnp.promote_types(x.dtype, jnp.float32)
  product = functools.partial(
    jnp.matmul, precision=precision, preferred_element_type=wide
  )
  rows = lambda value: value.reshape(-1, value.shape[-1])
  of_x = jnp.zeros(x.shape, wide)
  of_kernel = {}
  for tap in _taps(x.shape, kernel.shape, strides, padding):
    outputs = tap.outputs_of(cotangent)
    of_kernel[tap.place] = product(rows(tap.inputs_of(x)).T, rows(outputs))
    value = product(outputs, kernel[tap.place].T)
    of_x += tap.among_inputs(value, x.shape)
  zeros = jnp.zeros(kernel.shape[2:], wide)
  places = np.ndindex(*kernel.shape[:2])
  stacked = jnp.stack([of_kernel.get(place, zeros) for place in places])
  return (
    of_x.astype(x.dtype),
    stacked.reshape(kernel.shape).astype(kernel.dtype),
  )


conv_by_taps.defvjp(conv_by_taps_forward, conv_by_taps_backward)


class _Tap(NamedTuple):
  """A place in the kernel, and the outputs that have an input there.

  Attributes:
    place: (row, column) in the kernel.
    first_in: the first of these inputs, (row, column).
    first_out: the first of these outputs.
    count: their number, by row and column.
    strides: the steps from one input to the next.
  """

  place: tuple[int, int]
  first_in: tuple[int, int]
  first_out: tuple[int, int]
  count: tuple[int, int]
  strides: tuple[int, int]

  def inputs_of(self, x):
    last = [self.first_in[i] + self._span(i) for i in range(2)]
    return lax.slice(
      x,
      (0, *self.first_in, 0),
      (x.shape[0], *last, x.shape[3]),
      (1, *self.strides, 1),
    )

  def outputs_of(self, out):
    last = [self.first_out[i] + self.count[i] for i in range(2)]
    return lax.slice(
      out, (0, *self.first_out, 0), (out.shape[0], *last, out.shape[3])
    )

  def among_inputs(self, value, shape):
    """`value` where `inputs_of` takes it from, zero elsewhere."""
    space = [
      (low, shape[1 + i] - low - self._span(i), self.strides[i] - 1)
      for i, low in enumerate(self.first_in)
    ]
    return spans.pad(value, space)

  def among_outputs(self, value, out_size):
    space = [
      (low, out_size[i] - low - self.count[i], 0)
      for i, low in enumerate(self.first_out)
    ]
    return spans.pad(value, space)

  def _span(self, i):
    return (self.count[i] - 1) * self.strides[i] + 1


def _taps(shape, kernel_shape, strides, padding):
  """Yields the taps that have any input."""
  out_size = spans.out_size(shape, kernel_shape, strides, padding)
  for place in np.ndindex(*kernel_shape[:2]):
    ends = []
    for i in range(2):
      offset = place[i] - padding[i][0]
      first = max(0, -(offset // strides[i]))
      last = min(out_size[i] - 1, (shape[1 + i] - 1 - offset) // strides[i])
      ends.append((offset + first * strides[i], first, last - first + 1))
    first_in, first_out, count = zip(*ends, strict=True)
    if min(count) > 0:
      yield _Tap(place, first_in, first_out, count, strides)
