"""Mean and spread of a few values, with one for each seed."""

from collections.abc import Sequence
import math
import statistics
from typing import NamedTuple


class Estimate(NamedTuple):
  """Values over seeds and the statistics from them.

  Attributes:
    values: one a seed, in the order of the seeds.
    mean: their mean.
    standard_deviation: with n - 1 in the denominator; None for a single seed.
    standard_error: of the mean; None for a single seed.
  """

  values: tuple[float, ...]
  mean: float
  standard_deviation: float | None
  standard_error: float | None


def estimate(values: Sequence[float]) -> Estimate:
  """Mean and spread of at least one value.

  Args:
    values: one a seed. A value that is not finite makes all of them NaN.

  Returns:
    The estimate.

  Raises:
    ValueError: if there is no value.
  """
  values = tuple(float(value) for value in values)
  if not values:
    raise ValueError(f'values must not be empty, got {values}')
  finite = all(math.isfinite(value) for value in values)
  mean = math.fsum(values) / len(values) if finite else math.nan
  if len(values) == 1:
    return Estimate(values, mean, None, None)
  deviation = statistics.stdev(values) if finite else math.nan
  return Estimate(values, mean, deviation, deviation / math.sqrt(len(values)))
