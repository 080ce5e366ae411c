"""Whether a perturbation is large enough for what computes with it."""

import logging
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from mtl_jax.train import distributed

_logger = logging.getLogger(__name__)

# Bits of the mantissa, to which a model's passes round the parameters.
_BFLOAT16, _TENSORFLOAT32, _FLOAT32 = 7, 10, 23

# Of the length of rounding that a radius must have.
_SHARE = 1 / 3


def rounding(shared: Any, bits: int, adaptive: bool) -> float:
  r"""How far rounding moves the parameters, in the measure of a radius.

  Args:
    shared: the shared parameters w.
    bits: bits of the mantissa that rounding leaves, such as 7 for bfloat16.
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
  """Bits of the mantissa with which a config's passes see the parameters.

  Args:
    config: reads `compute_dtype` and `precision`.
    platform: of JAX; that of this process by default.

  Returns:
    Their number. CPUs compute with all that float32 has, whatever `precision`.
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

  The passes round the parameters, and what a perturbation makes of them. Of one
  much shorter than what rounding alone moves them by, the flat gradients show
  rounding more than anything else. Where "much" begins is measured, by
  benchmarks/flat_precision.py: with new parameters the cosine of flat gradients
  to those of float32 falls below 0.9 at about a third of that length. Training
  moves that point down.

  Args:
    config: of `configs/`; its radius is one number for the whole run.
    shared: the shared parameters at the start.
  """
  flat = config.method.flat
  # A radius of zero is meant.
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
