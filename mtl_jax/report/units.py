"""Units for the display of metrics; logs, CSV and JSON stay unscaled."""

import math
from typing import NamedTuple

# Logged as fractions of one, shown in per cent as in papers.
_FRACTIONS = ('accuracy',)


class Unit(NamedTuple):
  """The display of a metric as `scale * value`, with `name` as its unit."""

  scale: float
  name: str


def unit_of(metric: str) -> Unit:
  """The unit of a metric, from its name with or without the task's."""
  is_fraction = metric.rpartition('/')[2] in _FRACTIONS
  return Unit(100.0, '%') if is_fraction else Unit(1.0, '')


def titled(text: str, metric: str) -> str:
  """`text` with the metric's unit behind it, if it has one."""
  name = unit_of(metric).name
  return f'{text} ({name})' if name else text


def decimals_for(values: list[float], metric: str) -> int:
  """Decimals for a column: two in per cent, else four significant digits."""
  if unit_of(metric).name == '%':
    return 2
  largest = max((abs(v) for v in values if math.isfinite(v)), default=0.0)
  if largest == 0:
    return 2
  return min(max(3 - math.floor(math.log10(largest)), 0), 8)
