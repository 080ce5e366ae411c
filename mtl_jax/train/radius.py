"""The check that a perturbation is large enough for the compute precision."""

import logging
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from mtl_jax.train import distributed

_logger = logging.getLogger(__name__)

# Mantissa bits to which a model's passes round the parameters.
_BFLOAT16, _TENSORFLOAT32, _FLOAT32 = 7, 10, 23

# The smallest radius, as a fraction of the length of the rounding error.
_SHARE = 1 / 3


def rounding(shared: Any, bits: int, adaptive: bool) -> float:
  r"""The length of the parameters' rounding error, measured like a radius.

  Args:
    shared: the shared parameters w.
    bits: mantissa bits after rounding, such as 7 for bfloat16.
    adaptive: whether the radius is ASAM's, measured against the parameters.

  Returns:
    :math:`|w - round(w)|`, or :math:`|(w - round(w)) / w|` if adaptive.
  """

  def squares(w):
    w = w.astype(jnp.float32)
    error = w - jax.lax.reduce_precision(w, exponent_bits=8, mantissa_bits=bits)
    if adaptive:
      error = error / jnp.where(w == 0, 1, w)
    return jnp.sum(error * error)

  return float(sum(map(squares, jax.tree.leaves(shared)))) ** 0.5


def mantissa_bits(
  config: ml_collections.ConfigDict, platform: str | None = None
) -> int:
  """Mantissa bits of the parameters in the passes of a config.

  Args:
    config: reads `compute_dtype` and `precision`.
    platform: JAX's platform; by default the one in this process.

  Returns:
    The number of bits. CPUs compute with all bits of float32 at any
    `precision`.
  """
  platform = platform or jax.default_backend()
  if config.compute_dtype == 'bfloat16':
    return _BFLOAT16
  if platform == 'tpu' and config.precision in ('default', 'bfloat16'):
    return _BFLOAT16
  if platform in ('gpu', 'cuda') and config.precision not in (
    *('highest', 'float32'),
  ):
    return _TENSORFLOAT32
  return _FLOAT32


def warn_if_too_small(config: ml_collections.ConfigDict, shared: Any) -> None:
  """Logs a warning if the passes do not resolve the config's perturbation.

  Both passes round the parameters, the second one after the perturbation. If
  the perturbation is much shorter than the rounding error, the flat gradients
  are mostly noise. benchmarks/flat_precision.py measures the limit: with new
  parameters the cosine between flat gradients and those in float32 falls below
  0.9 at about a third of that length. Training moves that point down.

  Args:
    config: of `configs/`; its radius is one number for the whole run.
    shared: the shared parameters at the start.
  """
  flat = config.method.flat
  # A radius of zero is intended.
  if flat is None or not flat.rho or not jax.tree.leaves(shared):
    return
  bits = mantissa_bits(config)
  moved = rounding(shared, bits, flat.adaptive)
  if flat.rho < _SHARE * moved and distributed.is_main():
    _logger.warning(
      'method.flat.rho is %g, below %g: rounding to %d bits (compute_dtype %s, '
      'precision %s) makes much of the flat gradients. Use a larger radius, or '
      'float32 at precision highest.',
      *(flat.rho, _SHARE * moved, bits),
      *(config.compute_dtype, config.precision),
    )
