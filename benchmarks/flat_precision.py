"""Flat gradients in bfloat16 against float32, over the radius.

  python benchmarks/flat_precision.py \
    --out=results/benchmarks/flat_precision.json

For each radius, adaptive or not: the cosine of the shared part's flat gradients
(mean over tasks) when the model's passes run in bfloat16 and in float32, with
the same parameters and batch, at the start and after some steps of training.
The length of the parameters' rounding error is listed too;
`mtl_jax.train.radius` compares a radius with it. Nothing here is a test.
"""

import argparse
import datetime
import importlib.metadata
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mtl_jax
from mtl_jax import models
from mtl_jax import problems
from mtl_jax.train import objective as objectives
from mtl_jax.train import radius
from mtl_jax.train import step as steps

RADII = (1e-3, 1e-2, 0.05, 0.1, 0.2, 0.5, 2.0)


def flat_gradients(problem, model):
  """`(params, model_state, batch, rho, adaptive) -> [T, parameters]`."""

  def gradients(params, model_state, batch, rho, adaptive):
    batch = problem.preprocess(batch)

    def loss_fn(params):
      predictions, _ = model.apply(params, model_state, batch, train=True)
      return objectives.task_losses(problem, predictions, batch)

    at, at_each = mtl_jax.task_grad(loss_fn, problem.task_names)
    (losses, _), grads = at(params)
    size = len(losses)
    flat = lambda tree: jnp.concatenate(
      [x.reshape(size, -1) for x in jax.tree.leaves(tree)], axis=1
    )
    stretch = jax.tree.map(
      lambda w: jnp.where(adaptive, jnp.abs(w), 1)[None], params['shared']
    )
    scaled = jax.tree.map(jnp.multiply, stretch, grads['shared'])
    scale = rho / jnp.linalg.norm(flat(scaled), axis=1)

    def move(w, s, g):
      return w[None] + scale.reshape(-1, *(1,) * w.ndim) * s * g

    moved = jax.tree.map(move, params['shared'], stretch, scaled)
    _, sam = at_each({**params, 'shared': moved})
    return flat(sam['shared']) - flat(grads['shared'])

  return jax.jit(gradients)


def trained(problem, model, batches, seed):
  """The states before and after training on the batches."""
  names = problem.task_names
  losses = mtl_jax.task_losses(objectives.objective(problem, model), names)
  joint = mtl_jax.weighted_update(mtl_jax.equal_weights(), names)
  adam = optax.adam(1e-3)
  step = jax.jit(steps.make_train_step(problem, losses, joint, adam))
  first = state = steps.init_state(
    problem, model, joint, adam, seed=seed, batch=batches[0]
  )
  for batch in batches:
    state, _ = step(state, batch)
  return {'at the start': first, f'after {len(batches)} steps': state}


def measure(name, batch_size, num_steps, seed=0):
  """One row for each state, kind of perturbation and radius."""
  problem = problems.by_name('multi_mnist')
  model = models.make_model(models.by_name(name), problem.tasks)
  source = problem.load('train', kind='synthetic')
  rng = np.random.default_rng(seed)
  batches = [
    jax.tree.map(
      jnp.asarray,
      source.__getitems__(rng.choice(len(source), batch_size, replace=False)),
    )
    for _ in range(num_steps)
  ]
  in_float32 = flat_gradients(problem, model)
  in_bfloat16 = flat_gradients(problem, models.in_dtype(model, 'bfloat16'))
  rows = []
  for when, state in trained(problem, model, batches, seed).items():
    for adaptive in (False, True):
      moved = radius.rounding(state.params['shared'], 7, adaptive)
      for rho in RADII:
        args = (state.params, state.model_state, batches[-1], rho, adaptive)
        a, b = np.asarray(in_float32(*args)), np.asarray(in_bfloat16(*args))
        norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        rows.append(
          {
            'when': when,
            'adaptive': adaptive,
            'rho': rho,
            'cosine': round(float(np.mean((a * b).sum(1) / norms)), 4),
            'rounding': round(moved, 4),
          }
        )
  return rows


def markdown(name, rows):
  """The rows of one model as a Markdown table."""
  lines = [
    f'### {name}',
    '',
    '| parameters | radius | '
    + ' | '.join(f'{rho:g}' for rho in RADII)
    + ' | rounding |',
    '|---' * (len(RADII) + 3) + '|',
  ]
  for first in range(0, len(rows), len(RADII)):
    part = rows[first : first + len(RADII)]
    kind = 'adaptive' if part[0]['adaptive'] else 'plain'
    cosines = ' | '.join(f'{row["cosine"]:.3f}' for row in part)
    moved = part[0]['rounding']
    lines.append(f'| {part[0]["when"]} | {kind} | {cosines} | {moved:.3g} |')
  return '\n'.join(lines)


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--out', type=pathlib.Path, required=True)
  parser.add_argument('--models', default='lenet:256')
  parser.add_argument('--steps', type=int, default=100)
  args = parser.parse_args()
  result = {
    'what': 'cosine of flat gradients, bfloat16 passes against float32',
    'device': jax.devices()[0].device_kind,
    'versions': {
      name: importlib.metadata.version(name)
      for name in ('jax', 'jaxlib', 'flax', 'optax')
    },
    'date': datetime.date.today().isoformat(),
    'models': {},
  }
  with jax.default_matmul_precision('highest'):
    for entry in args.models.split(','):
      name, _, size = entry.partition(':')
      rows = measure(name, int(size), args.steps)
      result['models'][f'{name}, batch {size}'] = rows
      print(markdown(f'{name}, batch {size}', rows), flush=True)
      print()
  args.out.parent.mkdir(parents=True, exist_ok=True)
  args.out.write_text(json.dumps(result, indent=2) + '\n')


if __name__ == '__main__':
  main()
