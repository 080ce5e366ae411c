"""Maximum pooling that is fast on XLA's CPU backend.

The gradient of `reduce_window` takes a slow path there. The derivative here is
for reverse mode only and uses the places of the maxima.
"""

import functools

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from mtl_jax.models.cpu import spans


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def max_pool(x: jax.Array, window: int, stride: int, padding: int) -> jax.Array:
  """Maximum over square windows, see `layers.max_pool`."""
  return _max_and_place(x, window, stride, padding)[0]


def _max_and_place(x, window, stride, padding):
  """The maximum of every window, and its first place in the window."""
  shape = (window,) * 2
  strides, pads = (stride,) * 2, ((padding,) * 2,) * 2
  out_size = spans.out_size(x.shape, shape, strides, pads)
  x = jnp.pad(x, ((0, 0), *pads, (0, 0)), constant_values=-jnp.inf)
  first, *rest = spans.windows(x, shape, strides, out_size)
  place = jnp.zeros(first.shape, jnp.int16)
  for number, value in enumerate(rest, 1):
    larger = (value > first) | (jnp.isnan(value) & ~jnp.isnan(first))
    first = jnp.where(larger, value, first)
    place = jnp.where(larger, jnp.int16(number), place)
  return first, place


def _max_pool_forward(x, window, stride, padding):
  out, place = _max_and_place(x, window, stride, padding)
  return out, (place, x)


def _max_pool_backward(window, stride, padding, saved, cotangent):
  place, x = saved
  sizes = [n + 2 * padding for n in x.shape[1:3]]
  total = jnp.zeros((x.shape[0], *sizes, x.shape[3]), cotangent.dtype)
  for number, lows in enumerate(np.ndindex(window, window)):
    space = [
      (
        low,
        sizes[i] - low - (cotangent.shape[1 + i] - 1) * stride - 1,
        stride - 1,
      )
      for i, low in enumerate(lows)
    ]
    total += spans.pad(jnp.where(place == number, cotangent, 0), space)
  ends = [padding + n for n in x.shape[1:3]]
  inside = (0, padding, padding, 0), (x.shape[0], *ends, x.shape[3])
  return (lax.slice(total, *inside),)


max_pool.defvjp(_max_pool_forward, _max_pool_backward)
