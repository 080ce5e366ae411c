"""Multi-Digits and small models, and steps of several cases as one program."""

from collections.abc import Mapping
import functools
from typing import Any
from typing import NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from mtl_jax import gradients
from mtl_jax import models
from mtl_jax import problems
from mtl_jax import types
from mtl_jax import updates
from mtl_jax.train import build
from mtl_jax.train import objective as objectives
from mtl_jax.train import step as steps

_FLAT = {
  'rho': 0.1,
  'rho_heads': None,
  'adaptive': False,
  'norm': 'separate',
  'combine': 'separate',
  'head_scale': 'none',
}


@functools.cache
def problem():
  return problems.by_name('multi_digits')


def names():
  return problem().task_names


@functools.cache
def batch(size=16):
  found = dict(problem().load('train').__getitems__(np.arange(size)))
  found['mask'] = {task: np.ones(size, np.float32) for task in names()}
  return jax.tree.map(jnp.asarray, found)


def masked(task, mask, size=16):
  """A batch in which labels of a task are missing."""
  found = batch(size)
  mask = jnp.asarray(mask, jnp.float32)
  return {**found, 'mask': {**found['mask'], task: mask}}


def model(trunk='mlp', sharing='shared', **kwargs):
  kwargs = kwargs or {'widths': (12,)}
  trunk = models.by_name(trunk, **kwargs)
  return models.make_model(trunk, problem().tasks, sharing=sharing)


class Normalised(nn.Module):
  """The smallest trunk with running statistics."""

  batch_norm_axis: str | None = None

  @nn.compact
  def __call__(self, image, *, train):
    x = nn.Dense(6)(image.reshape(image.shape[0], -1))
    x = nn.BatchNorm(
      use_running_average=not train, axis_name=self.batch_norm_axis
    )(x)
    return nn.tanh(x)


def normalised(sharing='shared', axis_name=None):
  trunk = Normalised(batch_norm_axis=axis_name)
  return models.make_model(trunk, problem().tasks, sharing=sharing)


def config(name='linear', *, joint_update='stack', flat=None, **optimizer):
  """A config of a method: an aggregator, `stl`, or either with `f_` before."""
  aggregator = name.removeprefix('f_').replace('stl', 'linear')
  return ml_collections.ConfigDict(
    {
      'method': {
        'aggregator': aggregator,
        'weighting': None,
        'kwargs': {'c': 0.4} if aggregator == 'cagrad' else {},
        'head_scale': 'none' if name == 'stl' else None,
        'flat': {**_FLAT, **(flat or {})} if name.startswith('f_') else None,
      },
      'joint_update': joint_update,
      'perturbation': 'global',
      'optimizer': {
        'learning_rate': 1e-2,
        'schedule': 'constant',
        'clip': None,
        'weight_decay': 0.0,
        'skip_nonfinite': None,
        **optimizer,
      },
      'seed': 0,
    }
  )


class Case(NamedTuple):
  """All that a step is made of, besides the problem."""

  model: types.Model
  losses: gradients.TaskLosses
  joint: updates.JointUpdate
  tx: optax.GradientTransformation


def case(joint, tx=None, *, its_model=None, axis_name=None, **options):
  """A case of any joint update; SGD where no optimizer is given.

  Args:
    joint: the joint update.
    tx: the optimizer.
    its_model: the model; a small perceptron if None.
    axis_name: the mapped axis of replicas.
    **options: of `task_losses`; the engine is the quickest to compile.
  """
  its_model = model() if its_model is None else its_model
  losses = gradients.task_losses(
    objectives.objective(problem(), its_model, axis_name=axis_name),
    names(),
    axis_name=axis_name,
    **{'engine': 'unroll', **options},
  )
  return Case(its_model, losses, joint, optax.sgd(0.1) if tx is None else tx)


def of_config(name, *, joint_update='stack', flat=None, **options):
  """The case of a method's config, with the config's optimizer."""
  made = config(name, joint_update=joint_update, flat=flat)
  return case(
    build.joint_update(made, names()),
    build.optimizer(made, total_steps=10),
    **options,
  )


def start(cases: Mapping[str, Case], of_batch=None) -> dict[str, Any]:
  """The first state of each case."""
  of_batch = batch() if of_batch is None else of_batch
  make = functools.partial(steps.init_state, problem(), seed=0, batch=of_batch)
  return {k: make(c.model, c.joint, c.tx) for k, c in cases.items()}


def step_of(cases: Mapping[str, Case]):
  """`(states, batch) -> (states, metrics)` by name: one program for all."""

  def step(states, of_batch):
    found = {}
    for name, (_, losses, joint, tx) in cases.items():
      one = steps.make_train_step(problem(), losses, joint, tx)
      found[name] = one(states[name], of_batch)
    return (
      {name: state for name, (state, _) in found.items()},
      {name: metrics for name, (_, metrics) in found.items()},
    )

  return step


def numbers(tree):
  """The tree with keys as numbers."""
  is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
  return jax.tree.map(
    lambda x: jax.random.key_data(x) if is_key(x) else x, tree
  )


def close(actual, expected, rtol=2e-5, atol=2e-6, err_msg=''):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      a, b, rtol=rtol, atol=atol, err_msg=err_msg
    ),
    numbers(actual),
    numbers(expected),
  )
