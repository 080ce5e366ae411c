"""The look of a method, with the same colour and line in every figure."""

from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import math

from mtl_jax.report.summary import Row
from mtl_jax.report.summary import Summary
from mtl_jax.report.variants import family
from mtl_jax.report.variants import is_flat

# Okabe and Ito, "Color Universal Design" (2008), without the yellow that
# vanishes on white, then two from Paul Tol's "muted" scheme (2021).
PALETTE = (
  '#0072B2',
  '#D55E00',
  '#009E73',
  '#CC79A7',
  '#E69F00',
  '#56B4E9',
  '#882255',
  '#999933',
)
_CONTROL_COLOURS = {'stl': '#000000', 'linear': '#7A7A7A'}

# The colour of methods that are drawn without a name.
OTHERS = '#C4C4C4'


@dataclasses.dataclass(frozen=True)
class Look:
  """The style in which a method is drawn.

  Attributes:
    colour: the same for a plain method and its flat version.
    line: solid; dashed for plain methods in a summary with flat ones.
    filled: whether markers are filled; a plain method's are not if there are
      flat ones.
    named: whether it has its own colour; with very many methods only the
      controls and the best do.
  """

  colour: str
  line: str
  filled: bool
  named: bool


def looks(summary: Summary) -> dict[str, Look]:
  """The look of every row in a summary, by label.

  Args:
    summary: the rows to be drawn.

  Returns:
    `{label: look}`. Controls are black and grey. The other methods take the
    palette in the order of the rows; if it is too short, only the best ones do.
  """
  rows = summary.rows
  any_flat = any(is_flat(row.label) for row in rows)
  colours = _family_colours(summary)
  return {
    row.label: Look(
      colour=colours.get(family(row.label), OTHERS),
      line='--' if any_flat and not is_flat(row.label) else '-',
      filled=is_flat(row.label) or not any_flat,
      named=family(row.label) in colours,
    )
    for row in rows
  }


def _family_colours(summary: Summary) -> Mapping[str, str]:
  colours = {}
  families: dict[str, list[Row]] = {}
  for row in summary.rows:
    name = family(row.label)
    if name in _CONTROL_COLOURS:
      colours[name] = _CONTROL_COLOURS[name]
    else:
      families.setdefault(name, []).append(row)
  chosen: Sequence[str] = list(families)
  if len(chosen) > len(PALETTE):
    best = sorted(
      chosen,
      key=lambda name: max(_quality(row, summary) for row in families[name]),
      reverse=True,
    )[: len(PALETTE)]
    chosen = [name for name in chosen if name in best]
  return colours | dict(zip(chosen, PALETTE, strict=False))


def _quality(row: Row, summary: Summary) -> float:
  """The relative gain, or else the average; larger is better."""
  value = 0.0
  if row.delta_m is not None:
    value = -row.delta_m.mean
  elif row.average is not None:
    better = summary.higher_is_better[summary.first_metrics[0]]
    value = row.average.mean if better else -row.average.mean
  return value if math.isfinite(value) else -math.inf
