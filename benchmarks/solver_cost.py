"""Time of each Gram-based method's solver, compared with a ResNet-18 step.

  python -m benchmarks.solver_cost --out=results/benchmarks/solver_cost.json

For each method the whole update of gradients with 64 coordinates is timed, for
T = 2, 10 and 40 tasks; methods take turns. This is little more than its map
from the Gram matrix to weights at its default iterations. The comparison is a
plain step (`linear`, T pull-backs, Adam) with ResNet-18 on 36x36 images and the
same number of tasks. CAGrad's whole update on a stack of ResNet-18's gradients
is also timed: Gram matrix, solver and weighted sum. A T without a measured step
(`--step_tasks`) is compared with the step of the next smaller T, which gives an
upper bound. Nothing here is a test.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import timing
import mtl_jax
from mtl_jax import models
from mtl_jax import problems
from mtl_jax.train import objective as objectives
from mtl_jax.train import step as step_lib

METHODS = {
  'linear': mtl_jax.linear,
  'mgda': mtl_jax.mgda,
  'pcgrad': mtl_jax.pcgrad,
  'gradvac': mtl_jax.gradvac,
  'cagrad': functools.partial(mtl_jax.cagrad, c=0.4),
  'imtl_g': mtl_jax.imtl_g,
  'nash_mtl': mtl_jax.nash_mtl,
  'fairgrad': functools.partial(mtl_jax.fairgrad, alpha=2.0),
  'aligned_mtl': mtl_jax.aligned_mtl,
  'upgrad': mtl_jax.upgrad,
  'dualproj': mtl_jax.dualproj,
  'con_fig': mtl_jax.con_fig,
  'conicgrad': mtl_jax.conicgrad,
  'sdmgrad': mtl_jax.sdmgrad,
  'modo': mtl_jax.modo,
  'cr_mogm': mtl_jax.cr_mogm,
  'gradnorm': mtl_jax.gradnorm,
  'krum': functools.partial(mtl_jax.krum, num_byzantine=0),
  'random_weights': mtl_jax.random_weights,
}
SIZES = (2, 10, 40)
DIMENSIONS = 64


def compiled_solver(name, size):
  """A method's update for gradients with few coordinates, and its arguments.

  The Gram matrix of 64 coordinates costs microseconds; the rest is the solver.
  """
  tx = METHODS[name](num_tasks=size)
  rng = np.random.default_rng(size)
  lengths = 10.0 ** rng.uniform(-1, 1, (size, 1))
  stacks = [
    jnp.asarray(lengths * rng.standard_normal((size, DIMENSIONS)), jnp.float32)
    for _ in range(1 + tx.extra_batches)
  ]
  args = (stacks, tx.init(jnp.zeros(DIMENSIONS)), jnp.linspace(1, 2, size))

  def update(stacks, state, losses):
    return tx.update(
      stacks[0], state, losses=losses, extra_grads=tuple(stacks[1:])
    )

  start = time.perf_counter()
  compiled = jax.jit(update).lower(*args).compile()
  return compiled, args, time.perf_counter() - start


def many_tasks(problem, size):
  """A problem with `size` tasks that share the given problem's labels."""
  first = problem.tasks[0]
  names = [f'task_{i}' for i in range(size)]
  tasks = tuple(dataclasses.replace(first, name=name) for name in names)
  return dataclasses.replace(problem, tasks=tasks)


def compiled_step(size, batch_size):
  """A plain ResNet-18 step with `size` tasks, and its arguments."""
  base = problems.by_name('multi_mnist')
  problem = many_tasks(base, size)
  model = models.make_model(models.by_name('resnet18'), problem.tasks)
  rng = np.random.default_rng(0)
  batch = {
    'image': jnp.asarray(
      rng.integers(0, 256, (batch_size, *base.image_shape)), jnp.uint8
    ),
    'labels': {
      task: jnp.asarray(rng.integers(0, 10, batch_size), jnp.int32)
      for task in problem.task_names
    },
    'mask': {task: jnp.ones(batch_size) for task in problem.task_names},
  }
  names = problem.task_names
  losses = mtl_jax.task_losses(objectives.objective(problem, model), names)
  joint = mtl_jax.stack_update(mtl_jax.shared_only(mtl_jax.linear(), names))
  adam = optax.adam(1e-3)
  step = step_lib.make_train_step(problem, losses, joint, adam)
  state = step_lib.init_state(problem, model, joint, adam, seed=0, batch=batch)
  compiled = jax.jit(step).lower(state, batch).compile()
  return compiled, (state, batch)


def compiled_aggregation(size):
  """CAGrad's update for the gradients of ResNet-18, and its arguments."""
  image = jnp.zeros((1, *problems.by_name('multi_mnist').image_shape))
  shapes = jax.eval_shape(
    models.by_name('resnet18').init, jax.random.key(0), image
  )['params']
  leaves, structure = jax.tree.flatten(shapes)
  keys = jax.random.split(jax.random.key(0), len(leaves))
  stack = jax.tree.unflatten(
    structure,
    [
      jax.random.normal(key, (size, *leaf.shape))
      for key, leaf in zip(keys, leaves, strict=True)
    ],
  )
  tx = METHODS['cagrad'](num_tasks=size)
  args = stack, tx.init(shapes)
  return jax.jit(tx.update).lower(*args).compile(), args


def run_of(compiled, args):
  """`run(n)` for `timing.take_turns`, always from the same arguments."""

  def run(count):
    for _ in range(count):
      out = compiled(*args)
    jax.block_until_ready(out)

  return run


def quartiles(times):
  return [
    timing.significant(float(x) * 1e3)
    for x in np.percentile(times, (25, 50, 75))
  ]


def measure_solvers(size, repeats):
  """{method: {'ms_quartiles': [3], 'compile_s': seconds}}, taking turns."""
  solvers = {name: compiled_solver(name, size) for name in METHODS}
  times = timing.take_turns(
    {name: run_of(*solver[:2]) for name, solver in solvers.items()},
    least=repeats,
    most=repeats,
  )
  return {
    name: {
      'ms_quartiles': quartiles(times[name]),
      'compile_s': round(solvers[name][2], 2),
    }
    for name in solvers
  }


def measure_step(size, batch_size, repeats):
  """Quartiles of a step, and of the aggregation alone, taking turns."""
  times = timing.take_turns(
    {
      'step': run_of(*compiled_step(size, batch_size)),
      'aggregation': run_of(*compiled_aggregation(size)),
    },
    warm_up=1,
    least=repeats,
    most=repeats,
  )
  ratios = np.asarray(times['aggregation']) / np.asarray(times['step'])
  return {
    'step_ms_quartiles': quartiles(times['step']),
    'aggregation_ms_quartiles': quartiles(times['aggregation']),
    'aggregation_percent': timing.significant(100 * np.median(ratios), 3),
  }


def markdown(result):
  lines = [
    '| method | '
    + ' | '.join(f'T = {s}, ms | % of a step' for s in SIZES)
    + ' |',
    '|---|' + '---|---|' * len(SIZES),
  ]
  for name in METHODS:
    cells = []
    for size in SIZES:
      row = result['solvers'][str(size)][name]
      mark = '' if row['beside_tasks'] == size else '< '
      cells += [
        f'{row["ms_quartiles"][1]:.2f}',
        f'{mark}{row["share_percent"]:.2g}',
      ]
    lines.append(f'| `{name}` | ' + ' | '.join(cells) + ' |')
  lines += [
    f'T = {size}: aggregation by CAGrad {row["aggregation_ms_quartiles"][1]} '
    f'ms, {row["aggregation_percent"]} % of a step'
    for size, row in result['steps'].items()
  ]
  return '\n'.join(lines)


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--out', type=pathlib.Path, required=True)
  parser.add_argument('--batch', type=int, default=256)
  parser.add_argument('--repeats', type=int, default=30)
  parser.add_argument('--step_repeats', type=int, default=3)
  parser.add_argument('--step_tasks', default='2,10,40')
  args = parser.parse_args()
  step_tasks = [int(size) for size in args.step_tasks.split(',')]
  if min(step_tasks) > min(SIZES):
    parser.error(f'step_tasks must begin at {min(SIZES)} at most')

  result = {
    'what': 'solver of each method, beside a plain ResNet-18 step, 36x36',
    'batch': args.batch,
    'machine': timing.machine(),
    'repeats': args.repeats,
    'step_repeats': args.step_repeats,
  }
  result['solvers'] = {
    str(size): measure_solvers(size, args.repeats) for size in SIZES
  }
  with jax.default_matmul_precision('highest'):
    result['steps'] = {
      str(size): measure_step(size, args.batch, args.step_repeats)
      for size in step_tasks
    }
  steps = {
    int(k): v['step_ms_quartiles'][1] for k, v in result['steps'].items()
  }
  for size in SIZES:
    # A step with more tasks takes longer.
    beside = max(tasks for tasks in steps if tasks <= size)
    for row in result['solvers'][str(size)].values():
      share = 100 * row['ms_quartiles'][1] / steps[beside]
      row['beside_tasks'] = beside
      row['share_percent'] = float(f'{share:.3g}')
  args.out.parent.mkdir(parents=True, exist_ok=True)
  args.out.write_text(json.dumps(result, indent=2) + '\n')
  print(markdown(result))


if __name__ == '__main__':
  main()
