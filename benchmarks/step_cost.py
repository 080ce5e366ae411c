"""Time and memory of one joint update: methods x engines x models.

  python benchmarks/step_cost.py --out=results/benchmarks/step_cost.json

Every variant is compiled once and warmed up; then all variants of a model take
turns, so that what else the machine does falls on all of them alike. Reported
are the median time of a step and its quartiles, the ratio of medians to plain
`linear` with the same engine, the temporary memory of the compiled step, and
its floating-point operations. Nothing here is a test.
"""

import argparse
import datetime
import importlib.metadata
import json
import pathlib
import platform
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mtl_jax
from mtl_jax import models
from mtl_jax import problems
from mtl_jax.train import step as step_lib

METHODS = ('linear', 'cagrad', 'f_cagrad')
ENGINES = ('unroll', 'vmap', 'scan')


def make_tx(method, names):
  """The transformation of a benchmarked method, with Adam after it."""
  factory = getattr(mtl_jax, method.removeprefix('f_'))
  aggregator = factory(num_tasks=len(names))
  if method.startswith('f_'):
    aggregator = mtl_jax.flat_minima(aggregator, names, 0.05, norm='joint')
  else:
    aggregator = mtl_jax.shared_only(aggregator, names)
  return optax.chain(aggregator, optax.adam(1e-3))


def batch_of(problem, size):
  """A batch of the problem's synthetic stand-in, on the device."""
  source = problem.load('train', kind='synthetic')
  index = np.arange(size) % len(source)
  batch = dict(source.__getitems__(index))
  batch.setdefault(
    'mask', {task: np.ones(size, np.float32) for task in problem.task_names}
  )
  return jax.tree.map(jnp.asarray, batch)


def compiled_step(problem, model, method, engine, batch):
  """Compiles a step; returns it with its state, compile time and analysis."""
  tx = make_tx(method, problem.task_names)
  step = step_lib.make_train_step(problem, model, tx, engine=engine)
  state = step_lib.init_state(problem, model, tx, seed=0, batch=batch)
  start = time.perf_counter()
  compiled = jax.jit(step, donate_argnums=0).lower(state, batch).compile()
  seconds = time.perf_counter() - start
  memory = compiled.memory_analysis()
  cost = compiled.cost_analysis()
  return {
    'step': compiled,
    'state': state,
    'compile_s': seconds,
    'temporary_bytes': int(memory.temp_size_in_bytes),
    'argument_bytes': int(memory.argument_size_in_bytes),
    'flops': float(cost.get('flops', float('nan'))),
    'times': [],
  }


def measure(problem, model, batch, repeats, warm_up):
  """One row per method and engine; variants take turns."""
  variants = {
    (method, engine): compiled_step(problem, model, method, engine, batch)
    for method in METHODS
    for engine in ENGINES
  }
  for turn in range(warm_up + repeats):
    for variant in variants.values():
      start = time.perf_counter()
      variant['state'], _ = jax.block_until_ready(
        variant['step'](variant['state'], batch)
      )
      if turn >= warm_up:
        variant['times'].append(time.perf_counter() - start)
  rows = []
  for (method, engine), variant in variants.items():
    low, median, high = np.percentile(variant['times'], (25, 50, 75)) * 1e3
    plain = np.median(variants['linear', engine]['times']) * 1e3
    rows.append(
      {
        'method': method,
        'engine': engine,
        'median_ms': round(float(median), 3),
        'quartiles_ms': [round(float(low), 3), round(float(high), 3)],
        'ratio_to_linear': round(float(median / plain), 3),
        'temporary_mib': round(variant['temporary_bytes'] / 2**20, 2),
        'argument_mib': round(variant['argument_bytes'] / 2**20, 2),
        'gflop': round(variant['flops'] / 1e9, 3),
        'compile_s': round(variant['compile_s'], 2),
      }
    )
  return rows


def markdown(name, rows):
  """The rows of one model as a Markdown table."""
  lines = [
    f'### {name}',
    '',
    '| method | engine | step, ms (quartiles) | x linear | temporary MiB '
    '| GFLOP | compile, s |',
    '|---|---|---|---|---|---|---|',
  ]
  for row in rows:
    low, high = row['quartiles_ms']
    lines.append(
      f'| {row["method"]} | {row["engine"]} '
      f'| {row["median_ms"]:.1f} ({low:.1f}-{high:.1f}) '
      f'| {row["ratio_to_linear"]:.2f} | {row["temporary_mib"]:.1f} '
      f'| {row["gflop"]:.2f} | {row["compile_s"]:.1f} |'
    )
  return '\n'.join(lines)


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--out', type=pathlib.Path, required=True)
  parser.add_argument('--models', default='lenet:256,resnet18:64')
  parser.add_argument('--repeats', type=int, default=15)
  parser.add_argument('--warm_up', type=int, default=3)
  args = parser.parse_args()

  problem = problems.by_name('multi_mnist')
  result = {
    'what': 'one joint update, two tasks, 36x36 images, float32 highest',
    'device': jax.devices()[0].device_kind,
    'num_devices': jax.device_count(),
    'machine': f'{platform.machine()}, {platform.processor()}',
    'versions': {
      name: importlib.metadata.version(name)
      for name in ('jax', 'jaxlib', 'flax', 'optax')
    },
    'date': datetime.date.today().isoformat(),
    'repeats': args.repeats,
    'models': {},
  }
  with jax.default_matmul_precision('highest'):
    for entry in args.models.split(','):
      name, _, size = entry.partition(':')
      model = models.make_model(models.by_name(name), problem.tasks)
      batch = batch_of(problem, int(size))
      rows = measure(problem, model, batch, args.repeats, args.warm_up)
      result['models'][f'{name}, batch {size}'] = rows
      print(markdown(f'{name}, batch {size}', rows), flush=True)
      print()
  args.out.parent.mkdir(parents=True, exist_ok=True)
  args.out.write_text(json.dumps(result, indent=2) + '\n')


if __name__ == '__main__':
  main()
