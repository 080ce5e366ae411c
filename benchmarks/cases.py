"""Cases to measure, and this project's train step on them.

A case is a model, a number of tasks and a batch. All variants of a case start
from the same parameters and get the same batch, so that their results can be
compared before they are timed.
"""

from collections.abc import Callable
from collections.abc import Mapping
import dataclasses
import functools
import time
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mtl_jax
from mtl_jax import models
from mtl_jax import types
from mtl_jax.data import synthetic
from mtl_jax.losses import classification as losses
from mtl_jax.metrics import classification as metrics
from mtl_jax.train import objective as objectives
from mtl_jax.train import step as step_lib

NUM_CLASSES = 10
RHO = 0.05
C = 0.4
LEARNING_RATE = 1e-3
# Adam's first moment after one step, over this, is the gradient of that step.
FIRST_MOMENT = 0.1

_TORCH_NAMES = {'kernel': 'weight', 'scale': 'weight'}
_TORCH_AXES = {2: (1, 0), 4: (3, 2, 0, 1)}

AGGREGATORS = {
  'linear': mtl_jax.linear,
  'cagrad': functools.partial(mtl_jax.cagrad, c=C),
  'mgda': mtl_jax.mgda,
  'pcgrad': mtl_jax.pcgrad,
  'upgrad': mtl_jax.upgrad,
}


@dataclasses.dataclass(frozen=True)
class Case:
  """A model, its tasks and its batch.

  Attributes:
    model: name of the trunk, for `mtl_jax.models.by_name`.
    tasks: T.
    batch: B.
    image_shape: (height, width, channels).
    options: attributes of the trunk.
  """

  model: str
  tasks: int
  batch: int
  image_shape: tuple[int, int, int] = (36, 36, 1)
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def label(self) -> str:
    widths = '-'.join(map(str, self.options.get('widths', ())))
    name = f'{self.model} {widths}'.strip()
    return f'{name}, T={self.tasks}, batch {self.batch}'


class Spec(NamedTuple):
  """A variant of a case.

  Attributes:
    library: `'ours'`, `'pytorch'`, `'torchjd'` or `'optax'`.
    method: `'plain'`, the mean loss by one backward pass; an aggregator of
      `AGGREGATORS`; one with `'flat '` before it; or `'sam'`, which for one
      task is `'flat linear'` with one norm over all parameters.
    engine: the engine in `'ours'`; see `mtl_jax.task_grad`, or `'ghost'` for
      `mtl_jax.ghost_update`.
    dtype: the dtype in which `'ours'` computes; parameters are always float32.
  """

  library: str
  method: str
  engine: str = 'auto'
  dtype: str = 'float32'

  @property
  def label(self) -> str:
    extras = [
      value
      for value, usual in ((self.engine, 'auto'), (self.dtype, 'float32'))
      if value != usual
    ]
    return ' '.join([self.library, self.method, *extras])


class First(NamedTuple):
  """Results of the first step: losses [T] and the gradient for Adam."""

  losses: np.ndarray
  update: types.Params


class Variant(NamedTuple):
  """A function to be timed.

  Attributes:
    spec: the specification of the variant.
    first: does the first step and returns its results; called once.
    run: `run(n)` does n steps and blocks until they are done.
    facts: facts from the compilation, for the results; empty if nothing is
      compiled.
  """

  spec: Spec
  first: Callable[[], First]
  run: Callable[[int], None]
  facts: dict[str, Any]


def is_flat(method: str) -> bool:
  """Whether a method has a second pass, at perturbed parameters."""
  return method == 'sam' or method.startswith('flat ')


def problem_of(case: Case) -> types.Problem:
  """Classification tasks on one image, all labels present."""
  tasks = tuple(
    types.Task(
      f'task_{i}', NUM_CLASSES, losses.cross_entropy, (metrics.accuracy(),)
    )
    for i in range(case.tasks)
  )
  return types.Problem(
    name=case.label,
    tasks=tasks,
    image_shape=case.image_shape,
    load=lambda split: synthetic.synthetic_source(
      case.image_shape, [t.name for t in tasks], NUM_CLASSES, case.batch
    ),
    preprocess=lambda batch: batch,
  )


def batch_of(case: Case) -> dict[str, Any]:
  """The batch as NumPy arrays: images float32, labels int32, masks of ones."""
  problem = problem_of(case)
  batch = dict(problem.load('train').__getitems__(np.arange(case.batch)))
  # Centred, as a net's inputs usually are.
  image = batch['image'].astype(np.float32) / 255 - 0.5
  ones = np.ones(case.batch, np.float32)
  return {
    'image': image,
    'labels': batch['labels'],
    'mask': {task: ones for task in problem.task_names},
  }


def model_of(case: Case, dtype: str = 'float32') -> types.Model:
  """The model; in another dtype it casts float32 parameters and images."""
  trunk = models.by_name(case.model, **case.options)
  model = models.make_model(trunk, problem_of(case).tasks)
  return models.in_dtype(model, dtype)


def initial_params(case: Case) -> types.Params:
  """The initial parameters of all variants of a case, NumPy arrays."""
  key = jax.random.fold_in(jax.random.key(0), 0)
  params, _ = model_of(case).init(key, batch_of(case))
  return jax.tree.map(np.asarray, params)


def joint_update_of(spec: Spec, names: tuple[str, ...]) -> mtl_jax.JointUpdate:
  """The joint update of a variant's method."""
  if spec.method == 'plain':
    return mtl_jax.weighted_update(mtl_jax.equal_weights(), names)
  inner = 'linear' if spec.method == 'sam' else spec.method.split()[-1]
  aggregator = AGGREGATORS[inner](num_tasks=len(names))
  norm = 'joint' if spec.method == 'sam' else 'separate'
  if spec.engine == 'ghost':
    flat = (
      mtl_jax.Perturbation(RHO, norm=norm) if is_flat(spec.method) else None
    )
    return mtl_jax.ghost_update(aggregator, names, flat=flat)
  if is_flat(spec.method):
    tx = mtl_jax.flat_minima(aggregator, names, RHO, norm=norm)
  else:
    tx = mtl_jax.shared_only(aggregator, names)
  return mtl_jax.stack_update(tx)


def ours(case: Case, spec: Spec) -> Variant:
  """The compiled train step, with its state donated as in training."""
  problem = problem_of(case)
  batch = jax.tree.map(jnp.asarray, batch_of(case))
  model, names = model_of(case, spec.dtype), problem.task_names
  losses = mtl_jax.task_losses(
    objectives.objective(problem, model),
    names,
    engine='auto' if spec.engine == 'ghost' else spec.engine,
  )
  joint, adam = joint_update_of(spec, names), optax.adam(LEARNING_RATE)
  step = step_lib.make_train_step(problem, losses, joint, adam)
  state = step_lib.init_state(problem, model, joint, adam, seed=0, batch=batch)
  compiled, facts = compile_step(step, state, batch)
  held = {'state': state, 'metrics': {}}

  def run(count):
    for _ in range(count):
      held['state'], held['metrics'] = compiled(held['state'], batch)
    jax.block_until_ready(held)

  def first():
    run(1)
    moment = optax.tree.get(held['state'].opt_state, 'mu')
    return First(
      np.stack(
        [np.asarray(held['metrics'][f'{t}/loss']) for t in problem.task_names]
      ),
      jax.tree.map(lambda m: np.asarray(m) / FIRST_MOMENT, moment),
    )

  return Variant(spec, first, run, facts)


def compile_step(step, state, batch) -> tuple[Callable[..., Any], dict]:
  """The compiled step, and facts from its compilation."""
  start = time.perf_counter()
  compiled = jax.jit(step, donate_argnums=0).lower(state, batch).compile()
  seconds = time.perf_counter() - start
  return compiled, {
    'compile_s': round(seconds, 2),
    'temporary_bytes': int(compiled.memory_analysis().temp_size_in_bytes),
    'flops': _flops(compiled),
  }


def forward_flops(case: Case) -> float:
  """Operations of one compiled forward pass of all tasks: the unit."""
  problem, model = problem_of(case), model_of(case)
  batch = jax.tree.map(jnp.asarray, batch_of(case))
  params, model_state = model.init(jax.random.key(0), batch)

  def forward(params, model_state, batch):
    predictions, _ = model.apply(params, model_state, batch, train=True)
    return objectives.task_losses(problem, predictions, batch)

  return _flops(jax.jit(forward).lower(params, model_state, batch).compile())


def _flops(compiled):
  # XLA counts the body of a loop once, for any number of runs.
  return float((compiled.cost_analysis() or {}).get('flops', float('nan')))


def num_parameters(params: types.Params) -> dict[str, int]:
  """The number of parameters, and the bytes of the shared ones."""
  return {
    'parameters': sum(int(x.size) for x in jax.tree.leaves(params)),
    'shared_bytes': sum(
      int(x.nbytes) for x in jax.tree.leaves(params['shared'])
    ),
  }


def by_name(tree: Any) -> dict[str, np.ndarray]:
  """A tree laid out like the parameters, in PyTorch's names and layouts.

  Models without a PyTorch version keep the entries that have no name there.
  """
  found = {}
  for path, leaf in jax.tree.leaves_with_path(tree):
    *parts, kind = [key.key for key in path]
    if parts[0] == 'heads':  # Head of 'task_3' is number 3 of the list.
      parts[1] = parts[1].removeprefix('task_')
    value = np.asarray(leaf)
    if kind == 'kernel' and value.ndim in _TORCH_AXES:
      value = value.transpose(_TORCH_AXES[value.ndim])
    found['.'.join([*parts, _TORCH_NAMES.get(kind, kind)])] = value
  return found
