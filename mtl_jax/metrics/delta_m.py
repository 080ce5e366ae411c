"""The gain of multi-task learning over single-task baselines."""

from collections.abc import Mapping
import math


def relative_gain(
  scores: Mapping[str, float],
  baselines: Mapping[str, float],
  higher_is_better: Mapping[str, bool],
) -> dict[str, float]:
  """The relative gain of each score over its baseline, in per cent.

  It is 100 (M - M_stl) / |M_stl| if a higher score is better, and minus that if
  a lower one is. Positive is better, also for negative scores.

  Args:
    scores: `{'task/metric': value}`.
    baselines: single-task values of at least these metrics.
    higher_is_better: direction of at least these metrics.

  Returns:
    `{'task/metric': per cent}`, in the order of `scores`.

  Raises:
    ValueError: if a baseline or a direction is missing, or if a baseline is
      zero or not finite, for which there is no relative gain.

  Examples:
    >>> from mtl_jax import metrics
    >>> metrics.relative_gain(
    ...   {'seg/accuracy': 66.0, 'depth/error': 0.75},
    ...   {'seg/accuracy': 60.0, 'depth/error': 0.5},
    ...   {'seg/accuracy': True, 'depth/error': False},
    ... )
    {'seg/accuracy': 10.0, 'depth/error': -50.0}
  """
  gains = {}
  for key, score in scores.items():
    for name, table in (
      ('baselines', baselines),
      ('higher_is_better', higher_is_better),
    ):
      if key not in table:
        raise ValueError(f'{name} must have {key!r}, got {sorted(table)}')
    baseline = baselines[key]
    if baseline == 0 or not math.isfinite(baseline):
      raise ValueError(
        f'baselines[{key!r}] must be finite and not zero, got {baseline}'
      )
    gain = 100 * (score - baseline) / abs(baseline)
    gains[key] = gain if higher_is_better[key] else -gain
  return gains


def delta_m(
  scores: Mapping[str, float],
  baselines: Mapping[str, float],
  higher_is_better: Mapping[str, bool],
) -> float:
  r"""Mean relative drop against single-task baselines: lower is better.

  .. math::
    \Delta m = \frac{100}{K} \sum_k (-1)^{h_k}
      \frac{M_k - M_{k,stl}}{|M_{k,stl}|}

  with :math:`h_k = 1` if a higher :math:`M_k` is better and 0 otherwise. A
  negative value thus means better than single-task learning. Maninis et al.,
  who proposed the number, give it the other sign; papers on gradient
  aggregation use this one. It is minus the mean of `relative_gain`.

  Args:
    scores: `{'task/metric': value}`, K at least 1. All have equal weight, so a
      task with more metrics counts more.
    baselines: single-task values of at least these metrics.
    higher_is_better: direction of at least these metrics.

  Returns:
    The mean, in per cent.

  Raises:
    ValueError: if `scores` is empty, or as in `relative_gain`.

  References:
    Maninis et al., `Attentive Single-Tasking of Multiple Tasks
    <https://arxiv.org/abs/1904.08918>`_, 2019
  """
  gains = relative_gain(scores, baselines, higher_is_better)
  if not gains:
    raise ValueError('scores must not be empty')
  return -sum(gains.values()) / len(gains)
