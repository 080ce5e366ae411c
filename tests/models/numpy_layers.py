"""Convolution, pooling and dense layers in NumPy, float64, as loops."""

import numpy as np


def conv(x, kernel, stride=1, padding=0):
  x = _pad(x, padding, 0.0)
  height, width, _, features = kernel.shape
  out_size = _out_size(x, height, width, stride)
  out = np.zeros((x.shape[0], *out_size, features))
  for i, j in np.ndindex(*out_size):
    window = _window(x, i, j, height, width, stride)
    out[:, i, j] = np.einsum('bhwc,hwcf->bf', window, np.float64(kernel))
  return out


def max_pool(x, window, stride, padding=0):
  x = _pad(x, padding, -np.inf)
  out_size = _out_size(x, window, window, stride)
  out = np.zeros((x.shape[0], *out_size, x.shape[3]))
  for i, j in np.ndindex(*out_size):
    out[:, i, j] = _window(x, i, j, window, window, stride).max((1, 2))
  return out


def max_pool_gradient(x, cotangent, window, stride, padding=0):
  """Each window's cotangent goes to its first maximum in row-major order."""
  padded = _pad(x, padding, -np.inf)
  gradient = np.zeros(padded.shape)
  for b, i, j, c in np.ndindex(*cotangent.shape):
    patch = _window(padded[b : b + 1, :, :, c], i, j, window, window, stride)
    row, column = np.unravel_index(patch[0].argmax(), patch[0].shape)
    gradient[b, i * stride + row, j * stride + column, c] += cotangent[
      b, i, j, c
    ]
  end_h, end_w = padding + x.shape[1], padding + x.shape[2]
  return gradient[:, padding:end_h, padding:end_w]


def dense(x, params):
  return x @ np.float64(params['kernel']) + np.float64(params['bias'])


def relu(x):
  return np.maximum(x, 0)


def _pad(x, padding, value):
  pads = ((0, 0), (padding,) * 2, (padding,) * 2, (0, 0))
  return np.pad(np.float64(x), pads, constant_values=value)


def _out_size(x, height, width, stride):
  return (
    (x.shape[1] - height) // stride + 1,
    (x.shape[2] - width) // stride + 1,
  )


def _window(x, i, j, height, width, stride):
  i, j = i * stride, j * stride
  return x[:, i : i + height, j : j + width]
