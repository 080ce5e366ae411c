"""Bytes that each device sends in one joint update, with their lower bound.

  python -m benchmarks.communication --out=results/benchmarks/communication.json

Steps are compiled for eight virtual CPU devices but not run. Collectives are
counted in the compiled programs, with the costs of ring algorithms. XLA's CPU
backend has no reduce-scatter: it sums whole arrays, of which every device keeps
its share. A second count assumes reduce-scatter, which XLA uses for these sums
on TPU and GPU.

`bound` is the least that a mode has to send. Let S be the bytes of shared
parameters and H of all heads, with T tasks, d devices along 'data' and t along
'task'. A sum of X bytes that all devices need whole costs each 2 (d - 1) / d X.
A sum of which each needs a share, or the gathering of shares, costs (d - 1) / d
X. Hence:

- replicated: the sum of the stack, T S + H; twice for a flat update.
- sharded: parameters are gathered, S + H; a flat update also gathers the
  parameters of every task, T S + H. The stack is summed to shares: T S + H a
  pass.
- tasks: as before for the T / t rows of a group. Then a device exchanges
  (t - 1) / t of its rows' entries for the same entries of other rows, once in
  a plain update and three times in a flat one (loss gradients, task parameters
  and back, SAM gradients); updates, S + H, and in a flat update perturbed
  heads, H, are gathered along 'task'. Each of those rows and updates is 1 / d
  of the whole if parameters are sharded.

Steps are traced as for a GPU, with the Gram matrices and convolutions for any
accelerator: the forms for the CPU backend would gather shards. Scalars and [T,
T] matrices are not counted, and leaves count as if all were cut. LeNet's are
not cut, because none of its longer leaves has an axis that 8 divides. A
convolution that is batched over tasks has groups, whose inputs XLA gathers.
"""

import argparse
import collections
import datetime
import importlib.metadata
import json
import os
import pathlib
from unittest import mock

# Before JAX is imported.
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = (
  os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'
)

import jax
import optax

from benchmarks import hlo_collectives
import mtl_jax
from mtl_jax import models
from mtl_jax.problems import pairs
from mtl_jax.train import distributed
from mtl_jax.train import objective as objectives
from mtl_jax.train import sharding
from mtl_jax.train import step as steps

DEVICES = 8
BATCH = 256
METHOD = 'cagrad'

# name: (parallel.parameters, parallel.task_devices)
MODES = {
  'replicated': ('replicated', 1),
  'sharded': ('sharded', 1),
  'tasks over 2': ('replicated', 2),
  'tasks over 4': ('replicated', 4),
  'tasks over 8': ('replicated', 8),
  'sharded, tasks over 2': ('sharded', 2),
}
MODELS = {
  'mlp': {'widths': (1024, 512)},
  'lenet': {},
  'resnet18': {},
}


def problem_of(num_tasks):
  """A problem with the size of Multi-MNIST and any number of tasks."""
  return pairs.pair_problem(
    'pairs',
    image_shape=(36, 36, 1),
    task_names=tuple(f'task_{i}' for i in range(num_tasks)),
    num_classes=10,
    max_pixel=255,
    load_real=lambda split, **options: None,
  )


def compiled_step(problem, model, mode, kind):
  """The text of a compiled step, and the bytes of shared part and heads."""
  parameters, task_devices = MODES[mode]
  mesh = distributed.make_mesh(task_devices=task_devices)
  names = problem.task_names
  layout = sharding.Layout(mesh, names, parameters)
  aggregator = getattr(mtl_jax, METHOD)(num_tasks=len(names))
  if kind == 'flat':
    aggregator = mtl_jax.flat_minima(aggregator, names, 0.05)
  else:
    aggregator = mtl_jax.shared_only(aggregator, names)
  losses = layout.around(
    mtl_jax.task_losses(
      objectives.objective(problem, model),
      names,
      engine='vmap' if task_devices > 1 else 'unroll',
    )
  )
  joint, adam = mtl_jax.stack_update(aggregator), optax.adam(1e-3)
  step = steps.make_train_step(problem, losses, joint, adam)
  source = problem.load('train', kind='synthetic')
  batch = source.__getitems__(range(BATCH))
  state = jax.eval_shape(
    lambda: steps.init_state(problem, model, joint, adam, seed=0, batch=batch)
  )
  shards = layout.of_state(state)
  with mock.patch.object(jax, 'default_backend', lambda: 'gpu'):
    lowered = jax.jit(
      step,
      donate_argnums=0,
      in_shardings=(shards, distributed.batch_sharded(mesh)),
      out_shardings=(shards, distributed.replicated(mesh)),
      # The machine code is not run; the collectives are fixed before it is
      # made.
      compiler_options={'xla_backend_optimization_level': 0},
    ).lower(state, batch)
  compiled = lowered.compile()
  size = lambda tree: sum(x.size * 4 for x in jax.tree.leaves(tree))
  params = state.params
  return compiled, size(params['shared']), size(params['heads'])


def bound(mode, kind, *, shared, heads, num_tasks):
  """Bytes that each device has to send; derived above."""
  parameters, t = MODES[mode]
  d = DEVICES // t
  sharded, flat = parameters == 'sharded', kind == 'flat'
  along_data, along_tasks = (d - 1) / d, (t - 1) / t
  # The share of its rows, and of the parameters, that a device in a group
  # holds.
  part = 1 / d if sharded else 1
  rows = num_tasks // t * shared
  passes = 2 if flat else 1
  total = passes * (1 if sharded else 2) * along_data * (rows + heads)
  if sharded:
    total += along_data * (shared + heads)
    total += along_data * (rows + heads) if flat else 0
  if t > 1:
    total += along_tasks * (3 if flat else 1) * rows * part
    total += along_tasks * (shared + heads) * part
    total += along_tasks * heads * part if flat else 0
  return total


def measure(problem, model, mode, kind):
  """One row of the table."""
  compiled, shared, heads = compiled_step(problem, model, mode, kind)
  found = hlo_collectives.collectives(compiled.as_text())
  by_kind = collections.Counter()
  for c in found:
    by_kind[c.kind] += c.sent
  least = bound(
    mode, kind, shared=shared, heads=heads, num_tasks=len(problem.tasks)
  )
  scattered = sum(c.sent_with_reduce_scatter for c in found)
  return {
    'mode': mode,
    'update': kind,
    'sent_bytes': round(sum(by_kind.values())),
    'sent_bytes_with_reduce_scatter': round(scattered),
    'bound_bytes': round(least),
    'over_bound': round(scattered / least, 3),
    'sent_bytes_by_kind': {k: round(v) for k, v in sorted(by_kind.items())},
    'shared_bytes': shared,
    'head_bytes': heads,
    'flops_per_device': float(compiled.cost_analysis()['flops']),
    'argument_bytes_per_device': int(
      compiled.memory_analysis().argument_size_in_bytes
    ),
    'temporary_bytes_per_device': int(
      compiled.memory_analysis().temp_size_in_bytes
    ),
  }


def markdown(title, rows):
  """The rows of one model as a Markdown table."""
  lines = [
    f'### {title}',
    '',
    '| mode | update | sent, MiB | with reduce-scatter | bound | over bound '
    '| state and batch, MiB | GFLOP a device |',
    '|---|---|---|---|---|---|---|---|',
  ]
  mib = lambda n: f'{n / 2**20:.2f}'
  lines += [
    f'| {r["mode"]} | {r["update"]} | {mib(r["sent_bytes"])} '
    f'| {mib(r["sent_bytes_with_reduce_scatter"])} '
    f'| {mib(r["bound_bytes"])} | {r["over_bound"]:.2f} '
    f'| {mib(r["argument_bytes_per_device"])} '
    f'| {r["flops_per_device"] / 1e9:.3f} |'
    for r in rows
  ]
  return '\n'.join(lines)


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--out', type=pathlib.Path, required=True)
  parser.add_argument('--cases', default='mlp:2,mlp:8,lenet:2')
  parser.add_argument('--modes', default=','.join(MODES).replace(', ', '; '))
  args = parser.parse_args()
  modes = [mode.replace('; ', ', ') for mode in args.modes.split(',')]

  result = {
    'what': f'{METHOD} and Adam, 36x36 images, batch {BATCH}, float32; bytes '
    'sent by each device in one step',
    'devices': f'{DEVICES} virtual CPU devices',
    'versions': {
      name: importlib.metadata.version(name) for name in ('jax', 'jaxlib')
    },
    'date': datetime.date.today().isoformat(),
    'models': {},
  }
  for case in args.cases.split(','):
    name, _, number = case.partition(':')
    problem = problem_of(int(number))
    trunk = models.by_name(name, **MODELS[name])
    model = models.make_model(trunk, problem.tasks)
    rows = [
      measure(problem, model, mode, kind)
      for mode in modes
      if int(number) % MODES[mode][1] == 0
      for kind in ('plain', 'flat')
    ]
    title = f'{name}, {number} tasks'
    result['models'][title] = rows
    print(markdown(title, rows), end='\n\n', flush=True)
    # Saved after each, because a large model takes minutes to compile.
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + '\n')


if __name__ == '__main__':
  main()
