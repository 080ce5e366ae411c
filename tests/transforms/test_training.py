"""Three steps of training on scanned digits, against training in NumPy.

The model is the smallest with a shared part and heads: tanh(x W) H for each
task, with cross-entropy. Its gradients, the perturbation and the methods are
all done again in float64, without automatic differentiation.
"""

import functools

import jax
import jax.numpy as jnp
import methods
import numpy as np
import optax
import pytest
import weighting_references
import weighting_rows

import mtl_jax
from mtl_jax import problems
from mtl_jax import types
from mtl_jax.train import objective as objectives
from mtl_jax.train import step as steps

WIDTH, ROWS, RATE, RHO = 6, 48, 0.5, 0.1
STEPS = 3


@functools.cache
def problem():
  return problems.by_name('multi_digits')


@functools.cache
def batch():
  found = dict(problem().load('train').__getitems__(np.arange(ROWS)))
  found['mask'] = {task: np.ones(ROWS, np.float32) for task in names()}
  return jax.tree.map(jnp.asarray, found)


def names():
  return problem().task_names


@functools.cache
def pixels():
  image = problem().preprocess(batch())['image']
  return np.asarray(image, np.float64).reshape(ROWS, -1)


@functools.cache
def start():
  """Shared parameters [100 x 6] as one vector, and heads [T, 6, 10]."""
  rng = np.random.default_rng(0)
  shared = 0.2 * rng.standard_normal(pixels().shape[1] * WIDTH)
  return shared, rng.standard_normal((len(names()), WIDTH, 10))


def model():
  def init(key, batch):
    del key, batch
    shared, heads = start()
    as_float = lambda x: jnp.asarray(x, jnp.float32)
    own = {task: as_float(h) for task, h in zip(names(), heads, strict=True)}
    return {'shared': as_float(shared), 'heads': own}, {}

  def apply(params, state, batch, *, train=False, key=None):
    del train, key
    x = batch['image'].reshape(batch['image'].shape[0], -1)
    hidden = jnp.tanh(x @ params['shared'].reshape(-1, WIDTH))
    heads = params['heads']
    return {task: hidden @ heads[task] for task in names()}, state

  return types.Model(init, apply)


def loss_and_gradient(shared, head, labels):
  """By hand: the mean cross-entropy, and its two gradients."""
  x = pixels()
  hidden = np.tanh(x @ shared.reshape(-1, WIDTH))
  logits = hidden @ head
  powers = np.exp(logits - logits.max(axis=1, keepdims=True))
  share = powers / powers.sum(axis=1, keepdims=True)
  right = share[np.arange(ROWS), labels]
  share[np.arange(ROWS), labels] -= 1
  of_logits = share / ROWS
  of_hidden = of_logits @ head.T * (1 - hidden**2)
  loss = -np.log(right).mean()
  return loss, (x.T @ of_hidden).ravel(), hidden.T @ of_logits


def all_gradients(shared, heads):
  """Losses [T], shared gradients [T, D] and heads' [T, 6, 10]; each at its own
  row of `shared` [T, D].
  """
  labels = [np.asarray(batch()['labels'][task]) for task in names()]
  found = [
    loss_and_gradient(*at) for at in zip(shared, heads, labels, strict=True)
  ]
  return tuple(np.stack(part) for part in zip(*found, strict=True))


class Reference:
  """A method in NumPy, from step to step."""

  def __init__(self, method):
    self.method, self.memory = method, None
    self.key = (
      method.make(range(2)).init(jnp.zeros(1)).key if (method.random) else None
    )

  def __call__(self, J, losses):
    right, self.memory = self.method.right_step(
      J, losses, range(2), self.memory, key=self.key
    )
    if self.key is not None:
      self.key = jax.random.split(self.key)[0]
    return right[0]


def in_numpy(method, flat):
  shared, heads = start()
  of_loss, of_flat = Reference(method), Reference(method)
  for _ in range(STEPS):
    losses, J, own = all_gradients(np.stack([shared, shared]), heads)
    update = of_loss(J, losses)
    if flat:
      unit = lambda g: (
        g / np.sqrt((g**2).sum(axis=tuple(range(1, g.ndim)), keepdims=True))
      )
      _, S, own = all_gradients(shared + RHO * unit(J), heads + RHO * unit(own))
      update = update + of_flat(S - J, losses)
    shared, heads = shared - RATE * update, heads - RATE * own
  return shared, heads


def trained(joint):
  """Shared parameters and heads after some steps of a joint update and SGD."""
  tx = optax.sgd(RATE)
  losses = mtl_jax.task_losses(
    objectives.objective(problem(), model()), names()
  )
  state = steps.init_state(problem(), model(), joint, tx, seed=0, batch=batch())
  step = jax.jit(steps.make_train_step(problem(), losses, joint, tx))
  with jax.default_matmul_precision('highest'):
    for _ in range(STEPS):
      state, _ = step(state, batch())
  heads = np.stack([state.params['heads'][task] for task in names()])
  return np.asarray(state.params['shared']), heads


def in_jax(method, flat):
  aggregator = method.make_alone(range(2), num_tasks=2)
  if flat:
    tx = mtl_jax.flat_minima(aggregator, names(), rho=RHO)
  else:
    tx = mtl_jax.shared_only(aggregator, names(), head_scale='none')
  return trained(mtl_jax.stack_update(tx))


def assert_same_way(found, right, flat):
  """Relative to the way gone. Flat gradients are differences of float32
  numbers, which leaves them three to four digits.
  """
  tolerance = 2e-3 if flat else 2e-4
  for part, expected, begin in zip(found, right, start(), strict=True):
    way = np.linalg.norm(expected - begin)
    assert way > 0.01
    assert np.linalg.norm(part - expected) <= tolerance * way


# A row a method: its last one, in which most options are set.
EACH = methods.params({m.factory: m for m in methods.METHODS}.values())
# What a method may need of a step: nothing, losses, a key, and a memory of
# gradients.
NEEDS = methods.params(
  m
  for m in methods.METHODS
  if m.name in ('linear', 'mgda_loss+', 'pcgrad', 'db_mtl')
)


@pytest.mark.parametrize('method', EACH)
def test_three_flat_steps_of_training_are_those_of_training_in_numpy(method):
  assert_same_way(in_jax(method, True), in_numpy(method, True), True)


@pytest.mark.parametrize('method', NEEDS)
def test_three_plain_steps_of_training_are_those_of_training_in_numpy(method):
  assert_same_way(in_jax(method, False), in_numpy(method, False), False)


class Drawn(weighting_references.Reference):
  """Random weights, with the same draws."""

  def __init__(self, row):
    self.weighting = row.make(range(2))
    self.state = self.weighting.init(2)

  def update(self, losses):
    weights, self.state = self.weighting.update(
      jnp.asarray(losses, jnp.float32), self.state
    )
    return np.asarray(weights, np.float64)


def weighted_in_numpy(row, flat):
  shared, heads = start()
  reference = row.reference(range(2)) if row.reference else Drawn(row)
  unit = lambda g: (
    g / np.sqrt((g**2).sum(axis=tuple(range(1, g.ndim)), keepdims=True))
  )
  for _ in range(STEPS):
    losses, J, own = all_gradients(np.stack([shared, shared]), heads)
    # The loss part and the flat part have states of their own, but the same
    # losses and so the same weights.
    w = reference.update(losses)
    if flat:
      _, J, own = all_gradients(shared + RHO * unit(J), heads + RHO * unit(own))
    else:
      own = w[:, None, None] * own
    shared, heads = shared - RATE * w @ J, heads - RATE * own
    reference.after_step(all_gradients(np.stack([shared, shared]), heads)[0])
  return shared, heads


def weighted_in_jax(row, flat):
  weighting = row.make(range(2))
  if not flat:
    return trained(mtl_jax.weighted_update(weighting, names()))
  aggregator = mtl_jax.weighted(weighting, num_tasks=2)
  tx = mtl_jax.flat_minima(aggregator, names(), rho=RHO)
  return trained(mtl_jax.stack_update(tx))


# Without a state, learned, with a key, with a count, and with a look at the
# losses after the step.
ROWS_OF_KINDS = weighting_rows.params(
  row
  for row in weighting_rows.ROWS
  if row.name in ('si', 'uncertainty', 'rlw', 'stch_warm_up', 'famo')
)


@pytest.mark.parametrize('flat', [False, True], ids=['plain', 'flat'])
@pytest.mark.parametrize('row', ROWS_OF_KINDS)
def test_three_steps_with_a_loss_weighting_are_those_in_numpy(row, flat):
  assert_same_way(
    weighted_in_jax(row, flat), weighted_in_numpy(row, flat), flat
  )
