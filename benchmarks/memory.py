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

import jax
import jax.numpy as jnp

from benchmarks import timing
import mtl_jax

_WIDTH, _LAYERS, _ROWS = 1024, 4, 4
_TASKS = (2, 8, 20)
_METHODS = ('linear', 'pcgrad', 'cagrad')
_ENGINES = ('scan', 'unroll', 'vmap')


def _features(params, x):
  for kernel in params['shared'].values():
    x = jnp.tanh(x @ kernel)
  return x


def _losses(params, features):
  return {
    task: jnp.mean((features @ head) ** 2)
    for task, head in params['heads'].items()
  }


def _loss_fn(params, x):
  return _losses(params, _features(params, x))


def _parameters(names):
  shape = jax.ShapeDtypeStruct((_WIDTH, _WIDTH), jnp.float32)
  return {
    'shared': {f'layer_{i}': shape for i in range(_LAYERS)},
    'heads': {
      task: jax.ShapeDtypeStruct((_WIDTH, 1), jnp.float32) for task in names
    },
  }


def _of_stack(names, method, flat, engine):
  at, at_each = mtl_jax.task_grad(_loss_fn, names, engine=engine)
  aggregator = getattr(mtl_jax, method)(num_tasks=len(names))
  if flat:
    tx = mtl_jax.flat_minima(aggregator, names, 0.05)
  else:
    tx = mtl_jax.shared_only(aggregator, names)

  def update(params, state, x, active):
    (losses, _), grads = at(params, x)
    return tx.update(
      grads,
      state,
      params,
      losses=losses,
      active=active,
      grad_fn=lambda moved: at_each(moved, x)[1],
    )

  return tx.init, update


def _of_pairs(names, method, flat):
  step = mtl_jax.gram_update(
    _loss_fn,
    getattr(mtl_jax, method)(),
    names,
    rho=0.05 if flat else None,
  )

  def update(params, state, x, active):
    return step.update(params, state, x, active=active)[1:]

  return step.init, update


def _of_features(names, method):
  step = mtl_jax.feature_update(
    _features,
    lambda params, features, x: _losses(params, features),
    getattr(mtl_jax, method)(),
    names,
  )

  def update(params, state, x, active):
    return step.update(params, state, x, active=active)[1:]

  return lambda params: step.init(params, jnp.zeros((_ROWS, _WIDTH))), update


def _modes(names) -> dict[str, tuple[Callable[..., Any], float]]:
  """`{(mode, kind): (method -> (init, update), promised copies)}`."""
  tasks = len(names)
  modes: dict[Any, Any] = {}
  for engine in _ENGINES:
    for flat in (False, True):
      promise = None
      if engine == 'scan':
        promise = 2 * tasks + 3 if flat else tasks + 2
      modes[f'stack, {engine}', flat] = (
        lambda method, flat=flat, engine=engine: _of_stack(
          names, method, flat, engine
        ),
        promise,
      )
  for flat in (False, True):
    modes['gram_update', flat] = (
      lambda method, flat=flat: _of_pairs(names, method, flat),
      4 if flat else 2,
    )
  modes['feature_update', False] = (
    lambda method: _of_features(names, method),
    1,
  )
  return modes


def _copies(init, update, params, tasks):
  """Temporary memory of the compiled update, over the shared parameters'."""
  x = jax.ShapeDtypeStruct((_ROWS, _WIDTH), jnp.float32)
  active = jax.ShapeDtypeStruct((tasks,), bool)
  state = jax.eval_shape(init, params)
  compiled = jax.jit(update).lower(params, state, x, active).compile()
  shared = jax.tree.leaves(params['shared'])
  size = sum(leaf.size * leaf.dtype.itemsize for leaf in shared)
  return compiled.memory_analysis().temp_size_in_bytes / size


def measure(task_counts=_TASKS) -> list[dict[str, Any]]:
  """A row for every mode, plain and flat, and number of tasks."""
  rows = []
  for tasks in task_counts:
    names = tuple(f'task_{i}' for i in range(tasks))
    params = _parameters(names)
    for (mode, flat), (make, promise) in _modes(names).items():
      found = {}
      for method in _METHODS:
        # vmap and pairs with many tasks compile long and show nothing new.
        if tasks > _TASKS[1] and mode != 'stack, scan':
          continue
        init, update = make(method)
        found[method] = timing.significant(
          _copies(init, update, params, tasks), 3
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
    f'{_ROWS} rows, float32, with `active`',
    'machine': timing.machine(),
    'rows': measure(),
  }
  args.out.parent.mkdir(parents=True, exist_ok=True)
  args.out.write_text(json.dumps(result, indent=2) + '\n')


if __name__ == '__main__':
  main()
