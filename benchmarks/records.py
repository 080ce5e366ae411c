"""Records of a measurement: yardstick, rows, agreement and merging.

A forward pass is one unit and a backward pass two. One plain update of all
tasks is then 3 units, one by an aggregator 1 + 2T (one forward pass, T backward
passes), and one flat update 5T + 1: 1 + 2T, then 3T at perturbed parameters.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import json
import pathlib
from typing import Any

import numpy as np

from benchmarks import cases
from benchmarks import timing


def units(method: str, tasks: int) -> int:
  """The least cost of an update, in forward passes."""
  if method == 'plain':
    return 3
  return 5 * tasks + 1 if cases.is_flat(method) else 1 + 2 * tasks


def yardstick(method: str, tasks: int) -> float:
  """The least cost of an update, in plain updates of all tasks."""
  return units(method, tasks) / units('plain', tasks)


def rows(
  case: cases.Case,
  variants: Mapping[str, cases.Variant],
  times: Mapping[str, Sequence[float]],
  sizes: Mapping[str, int],
  forward_flops: float,
) -> list[dict[str, Any]]:
  """The rows of one case.

  Args:
    case: the case.
    variants: the variants by label.
    times: seconds a step in every turn, by label.
    sizes: `parameters` and `shared_bytes` of the model.
    forward_flops: operations of a compiled forward pass, the unit.

  Returns:
    A row for each variant. `ratio_to_plain` is relative to the plain step with
    the same library and dtype, `ratio_to_peer` to the same method elsewhere,
    and `ratio_to_usual` to the same variant with the usual engine and dtype.
    Each is a median over turns and is present if its reference is.
    `flops_over_yardstick` is null if a loop over tasks may run, of which XLA
    counts one round.
  """
  found = []
  for label, variant in variants.items():
    spec, facts = variant.spec, variant.facts
    row = {
      'case': case.label,
      'model': case.model,
      'tasks': case.tasks,
      'batch': case.batch,
      'parameters': sizes['parameters'],
      **spec._asdict(),
      **timing.summary(times[label]),
    }
    for key, reference in _references(spec, variants).items():
      row[f'ratio_to_{key}'] = timing.ratio(times[label], times[reference])
      if key == 'peer':
        row['peer'] = reference
      if key == 'plain':
        row['yardstick'] = timing.significant(
          yardstick(spec.method, case.tasks)
        )
        row['over_yardstick'] = timing.significant(
          row['ratio_to_plain'] / yardstick(spec.method, case.tasks)
        )
    row |= facts
    if facts:
      row['temporary_copies'] = timing.significant(
        facts['temporary_bytes'] / sizes['shared_bytes']
      )
      may_loop = spec.method != 'plain' and spec.engine in ('auto', 'scan')
      ideal = units(spec.method, case.tasks) * forward_flops
      row['flops_over_yardstick'] = (
        None
        if may_loop or not ideal > 0
        else timing.significant(facts['flops'] / ideal)
      )
    found.append(row)
  return found


def _references(spec, variants):
  """`{kind of ratio: label}`, for existing references except the variant."""
  specs = {label: variant.spec for label, variant in variants.items()}
  peers = [
    label
    for label, other in specs.items()
    if other.method == spec.method
    and other.library not in (spec.library, 'ours')
  ]
  references = {
    'plain': cases.Spec(spec.library, 'plain', dtype=spec.dtype).label,
    'usual': cases.Spec(spec.library, spec.method).label,
  }
  if spec.library == 'ours' and peers:
    references['peer'] = peers[0]
  return {
    key: label
    for key, label in references.items()
    if label in specs and label != spec.label
  }


def agreement(
  label: str, found: cases.First, reference_label: str, reference: cases.First
) -> dict[str, Any]:
  """The agreement between two variants of a method in the first step.

  Args:
    label: name of the variant.
    found: its results, with the update by name in arrays of equal layout.
    reference_label: name of the other variant.
    reference: results of the other variant.

  Returns:
    The largest relative difference of a loss; cosine and relative difference of
    the gradients for Adam, with all parameters as one vector.
  """
  names = sorted(reference.update)
  if set(names) != set(found.update):
    raise ValueError(
      f'{label} and {reference_label} have other parameters: '
      f'{sorted(set(names) ^ set(found.update))}'
    )
  ours, theirs = (
    np.concatenate([np.ravel(first.update[n]) for n in names]).astype(float)
    for first in (found, reference)
  )
  lengths = np.linalg.norm(ours), np.linalg.norm(theirs)
  return {
    'variant': label,
    'reference': reference_label,
    'losses_relative_difference': timing.significant(
      np.max(np.abs(found.losses / reference.losses - 1)), 2
    ),
    'cosine': timing.significant(ours @ theirs / (lengths[0] * lengths[1]), 8),
    'relative_difference': timing.significant(
      np.linalg.norm(ours - theirs) / lengths[1], 2
    ),
  }


def merged(saved: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
  """The saved result with its sections replaced by a new result's.

  Args:
    saved: an earlier result, or an empty dictionary.
    new: a result with some of the sections.

  Returns:
    The new result, with the earlier sections that it lacks.
  """
  sections = {**saved.get('sections', {}), **new['sections']}
  return {**saved, **new, 'sections': sections}


def save(path: pathlib.Path, new: Mapping[str, Any]) -> None:
  """Merges a result into the file, which need not exist."""
  saved = json.loads(path.read_text()) if path.exists() else {}
  path.parent.mkdir(parents=True, exist_ok=True)
  # Written beside it first, so that a stopped run leaves no partial file.
  beside = path.with_suffix('.partial')
  beside.write_text(json.dumps(merged(saved, new), indent=1) + '\n')
  beside.replace(path)


def markdown(found: Sequence[Mapping[str, Any]]) -> str:
  """Rows as Markdown tables, with one table a case."""
  lines = []
  for case in dict.fromkeys(row['case'] for row in found):
    lines += [
      f'**{case}**',
      '',
      '| variant | step, ms (quartiles) | x plain | over yardstick | x peer '
      '| compile, s | temporary, MiB | copies | FLOPs over yardstick |',
      '|---|---|---|---|---|---|---|---|---|',
    ]
    for row in found:
      if row['case'] == case:
        lines.append(_line(row))
    lines.append('')
  return '\n'.join(lines)


def _line(row):
  spec = cases.Spec(*(row[key] for key in cases.Spec._fields))
  low, high = row['quartiles_ms']
  temporary = row.get('temporary_bytes')
  cells = [
    spec.label,
    f'{row["median_ms"]} ({low}-{high})',
    *(
      row.get(key)
      for key in ('ratio_to_plain', 'over_yardstick', 'ratio_to_peer')
    ),
    row.get('compile_s'),
    None if temporary is None else round(temporary / 2**20, 1),
    row.get('temporary_copies'),
    row.get('flops_over_yardstick'),
  ]
  texts = ['' if cell is None else str(cell) for cell in cells]
  return '| ' + ' | '.join(texts) + ' |'
