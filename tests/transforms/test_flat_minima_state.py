"""What `flat_minima` remembers: two states, and what goes into which."""

from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import methods
import numpy as np
import optax
import pytest
import quadratics
import quick_compile
import references

import mtl_jax

NAMES = quadratics.NAMES
PROBLEM = quadratics.Quadratics.random()


class Memory(NamedTuple):
  """Sum of all gradients seen, and the keywords of the last call."""

  total: Any
  losses: Any
  active: Any


def remembering():
  """The mean over tasks of all gradients so far."""
  zeros = lambda p: jnp.zeros((quadratics.SIZE, *p.shape))

  def init(params):
    return Memory(
      jax.tree.map(zeros, params),
      jnp.zeros(quadratics.SIZE),
      jnp.zeros(quadratics.SIZE, bool),
    )

  def update(grads, state, params=None, *, losses=None, active=None, **_):
    del params
    total = jax.tree.map(jnp.add, state.total, grads)
    mean = jax.tree.map(lambda x: jnp.mean(x, axis=0), total)
    return mean, Memory(total, losses, active)

  return mtl_jax.Aggregator(init, update)


def gradients(rho):
  """Loss and flat gradients [T, 6] of the shared part, in NumPy."""
  g = PROBLEM.gradient(PROBLEM.perturbed(rho=0, rho_heads=0))
  s = PROBLEM.gradient(PROBLEM.perturbed(rho=rho, rho_heads=rho))
  return g[:, :6], s[:, :6] - g[:, :6]


def shared_vector(leaves):
  """[..., 6] of a state's tree, in which heads are masked."""
  shared = leaves['shared']
  kernel = shared['kernel'].reshape(*shared['bias'].shape[:-1], 4)
  return np.concatenate([kernel, shared['bias']], axis=-1)


def updates_of(tx, steps, **extra_args):
  """Updates and states of some steps at the same parameters."""
  step = quick_compile.jit(
    lambda state: tx.update(
      PROBLEM.task_grads,
      state,
      PROBLEM.params,
      grad_fn=PROBLEM.grad_fn,
      **extra_args,
    )
  )
  state = tx.init(PROBLEM.params)
  for _ in range(steps):
    updates, state = step(state)
    yield updates, state


@pytest.mark.parametrize('combine', ['separate', 'second'])
def test_loss_and_flat_gradients_are_remembered_apart(combine):
  tx = mtl_jax.flat_minima(remembering(), NAMES, 0.3, combine=combine)
  g, h = gradients(0.3)
  for step, (updates, state) in enumerate(updates_of(tx, 3), start=1):
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    close(shared_vector(state.loss.total), step * g)
    close(shared_vector(state.flat.total), step * h)
    close(shared_vector(updates), step * (g + h).mean(axis=0))


@pytest.mark.parametrize('combine', ['direct', 'each'])
def test_one_aggregation_has_one_state(combine):
  tx = mtl_jax.flat_minima(remembering(), NAMES, 0.3, combine=combine)
  g, h = gradients(0.3)
  for step, (_, state) in enumerate(updates_of(tx, 2), start=1):
    np.testing.assert_allclose(
      shared_vector(state.loss.total), step * (g + h), rtol=1e-4, atol=1e-5
    )
    assert not jax.tree.leaves(state.flat)


@pytest.mark.parametrize('combine', ['separate', 'second'])
def test_both_parts_get_the_same_losses_and_active_tasks(combine):
  tx = mtl_jax.flat_minima(remembering(), NAMES, combine=combine)
  losses = jnp.array([3.0, 1.0, 2.0])
  active = jnp.array([True, True, False])
  ((_, state),) = updates_of(tx, 1, losses=losses, active=active)
  for part in (state.loss, state.flat):
    np.testing.assert_array_equal(part.losses, losses)
    np.testing.assert_array_equal(part.active, active)


# Loss gradients whose projections differ in every order, and losses so simple
# (a_i / 2 |x - c_i|^2) that the flat gradient of a task is parallel to its loss
# gradient: the orders of both parts can then be told from the update.
PCGRAD_GRADS = np.array([[3.0, 0.0, 1.0], [-2.0, 1.5, 0.5], [0.5, -1.0, -2.0]])
PCGRAD_CURVATURES = np.array([1.0, 3.0, 0.4])


@pytest.mark.parametrize('seed', [0, 7])
def test_pcgrad_draws_one_order_for_both_parts_and_another_at_each_update(seed):
  tx = mtl_jax.flat_minima(mtl_jax.pcgrad(seed=seed), NAMES, rho=1.0)
  theta = jnp.zeros(3)
  curvatures = jnp.asarray(PCGRAD_CURVATURES, jnp.float32)[:, None]
  grads = jnp.asarray(PCGRAD_GRADS, jnp.float32)
  grad_fn = lambda rows: grads + curvatures * rows

  J = PCGRAD_GRADS
  H = PCGRAD_CURVATURES[:, None] * J / np.linalg.norm(J, axis=1, keepdims=True)
  of_loss = references.pcgrad('sum')(J, None)
  of_flat = references.pcgrad('sum')(H, None)
  # Every pair of outcomes has a sum of its own: the pair can be told.
  sums = of_loss[:, None] + of_flat[None, :]
  apart = np.linalg.norm(
    sums.reshape(-1, 1, 3) - sums.reshape(1, -1, 3), axis=2
  )
  assert np.min(apart + np.eye(len(apart))) > 1e-3

  drawn = []
  state = tx.init(theta)
  step = quick_compile.jit(
    lambda state: tx.update(grads, state, theta, grad_fn=grad_fn)
  )
  for _ in range(6):
    updates, state = step(state)
    misses = np.linalg.norm(sums - np.asarray(updates), axis=2)
    assert misses.min() < 1e-4 * np.linalg.norm(updates)
    drawn.append(np.unravel_index(misses.argmin(), misses.shape))
  assert all(loss == flat for loss, flat in drawn)
  assert len({loss for loss, _ in drawn}) > 1


def test_no_two_leaves_of_a_new_state_share_a_buffer():
  key = jax.random.key(3)
  tx = mtl_jax.flat_minima(mtl_jax.pcgrad(seed=key), NAMES)
  state = tx.init(PROBLEM.params)
  jax.jit(lambda state: state, donate_argnums=0)(state)
  # The user's own key is still there.
  jax.random.split(key)


def training(method, combine):
  """A step of training, its parameters and its state."""
  tx = optax.chain(
    mtl_jax.flat_minima(
      method.make_alone(range(quadratics.SIZE)),
      NAMES,
      optax.linear_schedule(0.1, 0.3, 10),
      combine=combine,
    ),
    optax.clip_by_global_norm(1.0),
    optax.adam(1e-3),
  )

  def step(params, state, losses):
    task_params = {
      **params,
      'shared': jax.tree.map(lambda p: jnp.stack([p] * 3), params['shared']),
    }
    updates, state = tx.update(
      PROBLEM.grad_fn(task_params),
      state,
      params,
      grad_fn=PROBLEM.grad_fn,
      losses=losses,
    )
    return optax.apply_updates(params, updates), state

  return step, PROBLEM.params, tx.init(PROBLEM.params)


@pytest.mark.parametrize('method', **quadratics.by_name(quadratics.FACTORIES))
def test_state_keeps_its_form(method):
  for combine in ('separate', 'each'):
    step, *before = training(method, combine)
    after = jax.eval_shape(step, *before, quadratics.losses())
    assert methods.structure(after) == methods.structure(tuple(before)), combine


@pytest.mark.parametrize('combine', ['separate', 'each'])
@pytest.mark.parametrize('name', ['linear', 'pcgrad', 'moco'])
def test_a_step_is_donated_and_compiled_once(name, combine):
  (method,) = (m for m in methods.METHODS if m.name == name)
  step, params, state = training(method, combine)
  traces = []

  def counting(*args):
    traces.append(None)
    return step(*args)

  jitted = quick_compile.jit(counting, donate_argnums=(0, 1))
  before = methods.structure((params, state))
  for _ in range(3):
    old = params
    params, state = jitted(params, state, quadratics.losses())
    assert methods.structure((params, state)) == before
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
  assert len(traces) == 1
  assert state[0].count == 3


def test_weights_of_both_parts_can_be_seen():
  tx = mtl_jax.flat_minima(mtl_jax.mgda(), NAMES, rho=0.3)
  ((_, state),) = updates_of(tx, 1)
  shown = mtl_jax.diagnostics(state)
  for part, rows in zip(('loss', 'flat'), gradients(0.3), strict=True):
    np.testing.assert_allclose(
      shown[f'{part}/gram'], rows @ rows.T, rtol=1e-3, atol=1e-4
    )
    np.testing.assert_allclose(
      shown[f'{part}/task_weights'],
      references.least_norm_weights(rows),
      atol=1e-3,
    )


def test_nothing_is_seen_of_a_part_that_is_not_aggregated():
  tx = mtl_jax.flat_minima(mtl_jax.linear(), NAMES, combine='direct')
  ((_, state),) = updates_of(tx, 1)
  shown = mtl_jax.diagnostics(state)
  assert {name.split('/')[0] for name in shown} == {'loss'}
