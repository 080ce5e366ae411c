"""Time, memory and operations of one joint update, compared with the peers.

  python -m benchmarks.joint_update --out=results/benchmarks/joint_update.json

The variants of a case take turns in one process. Before that their first steps
are compared, and a different result stops the run. The peers (`pip install -r
benchmarks/requirements.txt`) run in PyTorch's eager mode on all cores; without
them only this project's variants run. Each section is saved into the same file
when it is done, so sections can be run at different times. On a GPU, set
XLA_PYTHON_CLIENT_PREALLOCATE=false so that PyTorch finds memory too. The
machine should be otherwise idle: PyTorch's threads wait for each other at every
operation, and lose more than JAX's if a core is busy.

Nothing here is a test. `--quick` shows in two minutes that everything works.
"""

import argparse
import gc
import importlib.util
import pathlib
import resource
import sys
import time
from typing import Any

import jax

from benchmarks import cases
from benchmarks import optax_peer
from benchmarks import records
from benchmarks import sections as section_lib
from benchmarks import timing
from mtl_jax import types

# Relative differences of gradients. Float32 gives 1e-7 to 1e-6 in shallow nets;
# in a deep net two roundings can be on different sides of a ReLU's kink.
_LARGEST_DIFFERENCE = 1e-3
_TIMES_AS_FAR = 20
# A larger model in float64, besides all variants, would not fit in 20 GiB.
_LARGEST_IN_FLOAT64 = 3e7


def device_of_peers(threads: int) -> str | None:
  """PyTorch's device, or None if it is missing or lacks JAX's device."""
  if any(importlib.util.find_spec(n) is None for n in ('torch', 'torchjd')):
    return None
  import torch

  torch.set_num_threads(threads)
  if jax.default_backend() == 'cpu':
    return 'cpu'
  return 'cuda' if torch.cuda.is_available() else None


def make_variant(
  case: cases.Case, spec: cases.Spec, params: types.Params, device: str | None
) -> cases.Variant | None:
  """The variant, or None if its library or its model is missing."""
  if spec.library == 'ours':
    return cases.ours(case, spec)
  if spec.library == 'optax':
    return optax_peer.variant(case, spec, params)
  if device is None:
    return None
  from benchmarks import torch_models
  from benchmarks import torch_peers

  if not torch_models.has_model(case.model):
    return None
  return torch_peers.variant(case, spec, params, device)


def compared(
  case: cases.Case, variants: dict[str, cases.Variant], params: types.Params
) -> list[dict[str, Any]]:
  """The first step of each variant, compared with its reference.

  The project's and PyTorch's variants are compared with PyTorch in float64. The
  flat gradient of a deep net amplifies rounding, so the project's error may be
  some times as large as PyTorch's in float32. A large PyTorch model, and all
  others, are compared with the project's variant of the same method: SAM and
  'ghost' must agree; TorchJD's solvers, other engines and bfloat16 are
  reported.

  Args:
    case: the case.
    variants: the variants by label.
    params: the initial parameters.

  Returns:
    Records, see `records.agreement`.

  Raises:
    RuntimeError: if the project's result differs from PyTorch's or optax's.
  """
  first = {
    label: _named(variant.first()) for label, variant in variants.items()
  }
  size = cases.num_parameters(params)['parameters']
  found = []
  for label, variant in variants.items():
    spec = variant.spec
    reference = cases.Spec('ours', spec.method).label
    if spec.library == 'pytorch' and size <= _LARGEST_IN_FLOAT64:
      from benchmarks import torch_peers

      exact = torch_peers.in_float64(case, spec, params)
      pair = [
        records.agreement(which, first[which], f'{label} float64', exact)
        for which in (label, reference)
      ]
      found += pair
      rounding, ours = (record['relative_difference'] for record in pair)
      limit = _LARGEST_DIFFERENCE + _TIMES_AS_FAR * rounding
      _check(ours < limit, pair[1])
    elif reference in variants and reference != label:
      record = records.agreement(
        label, first[label], reference, first[reference]
      )
      found.append(record)
      alike = record['relative_difference'] < _LARGEST_DIFFERENCE
      must = spec.library in ('optax', 'pytorch') or spec.engine == 'ghost'
      _check(alike or not must, record)
  return found


def _check(alike, record):
  if not alike:
    raise RuntimeError(f'variants that should agree do not: {record}')


def _named(first: cases.First) -> cases.First:
  """The update by PyTorch's names for parameters."""
  if set(first.update) != {'shared', 'heads'}:
    return first
  return first._replace(update=cases.by_name(first.update))


def run_group(
  group: section_lib.Group, device: str | None, limits: dict[str, Any]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[str]]:
  """Rows, agreement and the skipped variants of one group."""
  case = group.case
  params = cases.initial_params(case)
  made = {
    spec.label: make_variant(case, spec, params, device) for spec in group.specs
  }
  left_out = [label for label, variant in made.items() if variant is None]
  variants = {
    label: variant for label, variant in made.items() if variant is not None
  }
  agreement = compared(case, variants, params)
  times = timing.take_turns(
    {label: variant.run for label, variant in variants.items()}, **limits
  )
  sizes = cases.num_parameters(params)
  rows = records.rows(case, variants, times, sizes, cases.forward_flops(case))
  return rows, [{'case': case.label, **a} for a in agreement], left_out


def run_section(
  groups: list[section_lib.Group], device: str | None, limits: dict[str, Any]
) -> dict[str, Any]:
  """The saved content of a section; prints it case by case."""
  start = time.perf_counter()
  result: dict[str, Any] = {
    'machine': timing.machine(),
    'peers': 'eager PyTorch' if device else 'not installed: ours alone',
    'rows': [],
    'agreement': [],
    'left_out': [],
  }
  for group in groups:
    rows, agreement, left_out = run_group(group, device, limits)
    result['rows'] += rows
    result['agreement'] += agreement
    result['left_out'] += [f'{group.case.label}: {x}' for x in left_out]
    print(records.markdown(rows))
    for record in agreement:
      print(
        f'{record["variant"]} beside {record["reference"]}: losses differ by '
        f'{record["losses_relative_difference"]}, gradients by '
        f'{record["relative_difference"]}, cosine {record["cosine"]}'
      )
    if left_out:
      print(f'skipped, not installed or not written: {", ".join(left_out)}')
    print(flush=True)
    gc.collect()  # Frees a case before the next one is made.
  stats = jax.devices()[0].memory_stats() or {}
  # Linux counts in KiB, macOS in bytes. Both are the peak of the process, which
  # includes the sections before this one.
  unit = 1 if sys.platform == 'darwin' else 1024
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
  return {
    **result,
    'device_peak_bytes': stats.get('peak_bytes_in_use'),
    'process_peak_rss_bytes': peak,
    'seconds': round(time.perf_counter() - start, 1),
  }


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--out', type=pathlib.Path, required=True)
  parser.add_argument(
    '--sections', default='', help='names with commas between; all by default'
  )
  parser.add_argument(
    '--budget_s',
    type=float,
    default=15.0,
    help='no further turn of a case begins after so many seconds',
  )
  parser.add_argument(
    '--quick', action='store_true', help='tiny sizes, to see that it works'
  )
  args = parser.parse_args()

  jax.config.update('jax_default_matmul_precision', 'highest')
  groups = section_lib.all_sections()
  names = args.sections.split(',') if args.sections else list(groups)
  unknown = set(names) - set(groups)
  if unknown:
    parser.error(
      f'unknown sections {sorted(unknown)}, there are {list(groups)}'
    )
  limits = {'budget_s': args.budget_s}
  if args.quick:
    groups = section_lib.quick(groups)
    limits = {'warm_up': 1, 'least': 2, 'most': 2}
    jax.config.update('jax_disable_most_optimizations', True)
  # A single thread does not wait for others, even on a busy machine.
  device = device_of_peers(1 if args.quick else timing.cores())
  for name in names:
    print(f'## {name}\n', flush=True)
    section = run_section(groups[name], device, limits)
    if args.quick:
      section['quick'] = 'tiny sizes, hardly optimized: times mean nothing'
    records.save(
      args.out,
      {
        'what': 'one joint update: float32, precision highest, Adam; '
        f'rho {cases.RHO}, CAGrad c {cases.C}',
        'command': 'python -m benchmarks.joint_update',
        'sections': {name: section},
      },
    )
    print(f'{name}: {section["seconds"]} s\n', flush=True)


if __name__ == '__main__':
  main()
