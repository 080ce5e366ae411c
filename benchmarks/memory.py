"""Temporary memory of one joint update, in copies of the shared parameters.

  python -m benchmarks.memory --out=results/benchmarks/memory.json

Programs are compiled but not run: XLA reports the memory of each. The model is
a perceptron with wide layers on a batch of a few rows, so activations are
negligible and copies of the parameters remain. Each number is shown with the
mode's promise: one stack of T rows and two more copies when plain, two stacks
and three more copies when flat, and less without a stack.
"""

import argparse
from collections.abc import Callable
import json
import pathlib
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp

from benchmarks import timing
import mtl_jax

_WIDTH, _LAYERS, _ROWS = 1024, 4, 4
_TASKS = (2, 8, 20)
_METHODS = ('linear', 'pcgrad', 'cagrad')
_ENGINES = ('scan', 'unroll', 'vmap')


def _features(params, batch):
  x = batch['x']
  for kernel in params['shared'].values():
    x = jnp.tanh(x @ kernel)
  return x


def _losses(params, features, batch):
  del batch
  return {
    task: jnp.mean((features @ head) ** 2)
    for task, head in params['heads'].items()
  }


_OBJECTIVE = mtl_jax.Objective(
  lambda params, batch: _losses(params, _features(params, batch), batch),
  _features,
  _losses,
)


def _parameters(names):
  shape = jax.ShapeDtypeStruct((_WIDTH, _WIDTH), jnp.float32)
  return {
    'shared': {f'layer_{i}': shape for i in range(_LAYERS)},
    'heads': {
      task: jax.ShapeDtypeStruct((_WIDTH, 1), jnp.float32) for task in names
    },
  }


def _of_stack(names, method, flat):
  aggregator = getattr(mtl_jax, method)(num_tasks=len(names))
  if flat:
    return mtl_jax.stack_update(mtl_jax.flat_minima(aggregator, names, 0.05))
  return mtl_jax.stack_update(mtl_jax.shared_only(aggregator, names))


def _of_pairs(names, method, flat):
  return mtl_jax.gram_update(
    getattr(mtl_jax, method)(),
    names,
    flat=mtl_jax.Perturbation(0.05) if flat else None,
  )


def _of_features(names, method):
  return mtl_jax.feature_update(getattr(mtl_jax, method)(), names)


class _Mode(NamedTuple):
  """A way to evaluate an update.

  Attributes:
    engine: see `mtl_jax.task_losses`.
    make: `method -> JointUpdate`.
    promise: the largest number of copies that it promises; None without one.
  """

  engine: str
  make: Callable[[str], mtl_jax.JointUpdate]
  promise: int | None


def _modes(names) -> dict[tuple[str, bool], _Mode]:
  """The modes by name and kind of update, flat or not."""
  tasks = len(names)
  modes = {}
  for engine in _ENGINES:
    for flat in (False, True):
      promise = None
      if engine == 'scan':
        promise = 2 * tasks + 3 if flat else tasks + 2
      make = lambda method, flat=flat: _of_stack(names, method, flat)
      modes[f'stack, {engine}', flat] = _Mode(engine, make, promise)
  for flat in (False, True):
    make = lambda method, flat=flat: _of_pairs(names, method, flat)
    modes['gram_update', flat] = _Mode('auto', make, 4 if flat else 2)
  make = lambda method: _of_features(names, method)
  modes['feature_update', False] = _Mode('auto', make, 1)
  return modes


def _copies(joint, engine, names):
  """Temporary memory of the compiled update, over the shared parameters'."""
  losses = mtl_jax.task_losses(_OBJECTIVE, names, engine=engine)

  def update(params, state, batch):
    found, state = joint.update(losses.on(batch), params, state)
    return found.grads, state

  rows = jax.ShapeDtypeStruct((_ROWS,), jnp.float32)
  batch = {
    'x': jax.ShapeDtypeStruct((_ROWS, _WIDTH), jnp.float32),
    'mask': dict.fromkeys(names, rows),
  }
  params = _parameters(names)
  state = jax.eval_shape(joint.init, params)
  compiled = jax.jit(update).lower(params, state, batch).compile()
  shared = jax.tree.leaves(params['shared'])
  size = sum(leaf.size * leaf.dtype.itemsize for leaf in shared)
  return compiled.memory_analysis().temp_size_in_bytes / size


def measure(task_counts=_TASKS) -> list[dict[str, Any]]:
  """A row for every mode, plain and flat, and number of tasks."""
  rows = []
  for tasks in task_counts:
    names = tuple(f'task_{i}' for i in range(tasks))
    for (mode, flat), (engine, make, promise) in _modes(names).items():
      found = {}
      for method in _METHODS:
        # vmap and pairs with many tasks compile long and show nothing new.
        if tasks > _TASKS[1] and mode != 'stack, scan':
          continue
        found[method] = timing.significant(
          _copies(make(method), engine, names), 3
        )
      if found:
        rows.append(
          {
            'mode': mode,
            'update': 'flat' if flat else 'plain',
            'tasks': tasks,
            'copies': found,
            'promised_at_most': promise,
          }
        )
        print(_line(rows[-1]), flush=True)
  return rows


def _line(row):
  promise = row['promised_at_most']
  cells = (
    row['mode'],
    row['update'],
    row['tasks'],
    *(f'{row["copies"][method]:.2f}' for method in _METHODS),
    '' if promise is None else promise,
  )
  return f'| {" | ".join(map(str, cells))} |'


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--out', type=pathlib.Path, required=True)
  args = parser.parse_args()
  header = ('mode', 'update', 'tasks', *_METHODS, 'promised at most')
  print(f'| {" | ".join(header)} |\n|{"---|" * len(header)}')
  result = {
    'what': 'temporary memory of one compiled update, in copies of the shared '
    f'parameters; perceptron of {_LAYERS} layers of {_WIDTH}x{_WIDTH}, '
    f'{_ROWS} rows, float32, with masks',
    'machine': timing.machine(),
    'rows': measure(),
  }
  args.out.parent.mkdir(parents=True, exist_ok=True)
  args.out.write_text(json.dumps(result, indent=2) + '\n')


if __name__ == '__main__':
  main()
