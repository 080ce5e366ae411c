"""Loss weightings: their numbers and what every one of them promises."""

import functools
import inspect

import jax
import jax.numpy as jnp
import methods
import numpy as np
import orbax.checkpoint as ocp
import pytest
import quick_compile
from weighting_row import BOUNDS
import weighting_rows as rows

import mtl_jax

NAN, INF = float('nan'), float('inf')


def sequence(steps, size, seed=0):
  """Losses before and after each of some steps, positive: [steps, 2, T]."""
  rng = np.random.default_rng(seed)
  return np.exp(rng.uniform(-1.5, 1.0, (steps, 2, size))).astype(np.float32)


@functools.cache
def _compiled(name, tasks):
  (row,) = (r for r in rows.ROWS if r.name == name)
  weighting = row.make(tasks)

  def step(losses, new_losses, state, active):
    weights, state = weighting.update(losses, state, active=active)
    if weighting.after_step is not None:
      state = weighting.after_step(new_losses, state, active=active)
    return weights, state

  return weighting, quick_compile.jit(step)


def run(row, losses, *, active=None, tasks=None, state=None):
  """All steps of a sequence; weights [steps, T] and the last state.

  Args:
    row: of the table.
    losses: [steps, 2, T].
    active: [steps, T]; all if None.
    tasks: which tasks they are; the first T if None.
    state: to go on from.
  """
  size = losses.shape[-1]
  if tasks is None or row.symmetric:
    tasks = range(size)
  tasks = tuple(tasks)
  weighting, step = _compiled(row.name, tasks)
  state = weighting.init(size) if state is None else state
  if active is None:
    active = np.ones((len(losses), size), bool)
  weights = []
  for (before, after), present in zip(losses, active, strict=True):
    found, state = step(before, after, state, present)
    weights.append(np.asarray(found))
  return np.stack(weights), state


@pytest.mark.parametrize('row', rows.DETERMINISTIC)
def test_golden_weights(row):
  weighting = row.make(range(2))
  weights, _ = weighting.update(jnp.array([1.0, 2.0]), weighting.init(2))
  np.testing.assert_allclose(weights, row.golden, atol=1e-5)


@pytest.mark.parametrize('row', rows.DETERMINISTIC)
@pytest.mark.parametrize('size', [1, 2, 3, 40])
def test_weights_follow_the_reference_step_by_step(row, size):
  losses = sequence(9, size)
  weights, _ = run(row, losses)
  reference = row.reference(range(size))
  for found, (before, after) in zip(weights, losses, strict=True):
    expected = reference.update(before.astype(np.float64))
    reference.after_step(after.astype(np.float64))
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize('row', rows.WITH_OBJECTIVE)
@pytest.mark.parametrize('size', [2, 3, 40])
def test_weights_are_the_gradient_of_the_objective(row, size):
  with jax.enable_x64(True):
    losses = jnp.asarray(sequence(1, size, seed=1)[0, 0], jnp.float64)
    weighting = row.make(range(size))
    weights, _ = weighting.update(losses, weighting.init(size))
    assert weights.dtype == jnp.float64
    np.testing.assert_allclose(
      weights, jax.grad(row.objective)(losses), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize('row', rows.ALL)
def test_weights_are_constants_to_differentiation(row):
  losses, state = jnp.array([0.5, 1.5, 2.5]), row.make(range(3)).init(3)

  def total(losses):
    weights, _ = row.make(range(3)).update(losses, state)
    return jnp.sum(weights * losses), weights

  gradient, weights = jax.grad(total, has_aux=True)(losses)
  np.testing.assert_array_equal(gradient, weights)


@pytest.mark.parametrize('row', rows.ALL)
def test_jit_equals_eager(row):
  losses = sequence(3, 3)
  jitted, jitted_state = run(row, losses)
  weighting = row.make(range(3))
  state = weighting.init(3)
  for expected, (before, after) in zip(jitted, losses, strict=True):
    weights, state = weighting.update(before, state)
    if weighting.after_step is not None:
      state = weighting.after_step(after, state)
    np.testing.assert_allclose(weights, expected, rtol=1e-5, atol=1e-6)
  assert methods.structure(state) == methods.structure(jitted_state)


@pytest.mark.parametrize('row', rows.ALL)
@pytest.mark.parametrize('dtype', ['bfloat16', 'float16', 'float32', 'float64'])
def test_state_keeps_structure_shape_and_dtype(row, dtype):
  with jax.enable_x64(dtype == 'float64'):
    weighting = row.make(range(3))
    state = weighting.init(3)
    losses = jnp.array([1.0, 2.0, 0.5], dtype)
    for active in (None, jnp.array([True, False, True])):
      step = functools.partial(weighting.update, active=active)
      weights, new_state = jax.eval_shape(step, losses, state)
      assert weights.shape == (3,)
      assert weights.dtype == jnp.result_type(float)
      assert methods.structure(new_state) == methods.structure(state)
      if weighting.after_step is not None:
        new_state = jax.eval_shape(
          functools.partial(weighting.after_step, active=active), losses, state
        )
        assert methods.structure(new_state) == methods.structure(state)


@pytest.mark.parametrize('row', rows.ALL)
def test_second_call_does_not_compile_again(row):
  _, state = run(row, sequence(1, 3))
  _, step = _compiled(row.name, (0, 1, 2))
  before = step._cache_size()
  run(row, sequence(3, 3), state=state)
  assert step._cache_size() == before


@pytest.mark.parametrize('row', rows.ALL)
def test_state_can_be_donated_again_and_again(row):
  weighting = row.make(range(2))
  update = jax.jit(weighting.update, donate_argnums=1, keep_unused=True)
  states = [weighting.init(2), weighting.init(2)]
  for state in states:
    for _ in range(2):
      old = state
      _, state = update(jnp.array([1.0, 2.0]), old)
      assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))


@pytest.mark.parametrize('row', rows.DETERMINISTIC)
@pytest.mark.parametrize('order', [(1, 0, 2), (1, 2, 0), (2, 1, 0)])
def test_tasks_in_another_order_have_the_same_weights(row, order):
  losses = sequence(5, 3)
  expected, _ = run(row, losses)
  weights, _ = run(row, losses[..., list(order)], tasks=order)
  np.testing.assert_allclose(weights, expected[:, list(order)], rtol=1e-4)
  if row.symmetric:
    weights, _ = run(row, losses[..., list(order)])
    np.testing.assert_allclose(weights, expected[:, list(order)], rtol=1e-4)


ABSENT = [(1,), (0,), (0, 1), (1, 2)]


@pytest.mark.parametrize('row', rows.DETERMINISTIC)
@pytest.mark.parametrize('absent', ABSENT, ids=str)
def test_absent_task_is_as_if_it_were_not_there(row, absent):
  present = [i for i in range(3) if i not in absent]
  active = np.isin(np.arange(3), present)
  losses = sequence(7, 3)
  expected, _ = run(row, losses[..., present], tasks=present)
  for loss in (1.0, 0.0, -1.0, 1e30, NAN, INF, -INF):
    weights, state = run(
      row,
      np.where(active, losses, np.float32(loss)),
      active=np.broadcast_to(active, (7, 3)),
    )
    np.testing.assert_array_equal(weights[:, list(absent)], 0)
    np.testing.assert_allclose(weights[:, present], expected, rtol=2e-5)
    for leaf in jax.tree.leaves(state):
      assert np.all(np.isfinite(leaf))


@pytest.mark.parametrize('row', rows.ALL)
def test_state_of_absent_task_stays_to_the_bit(row):
  _, state = run(row, sequence(4, 3))
  active = np.array([[True, False, True]])
  # Long enough for an epoch or a warm-up to end.
  _, after = run(
    row, sequence(4, 3, seed=2), active=np.repeat(active, 4, 0), state=state
  )
  for new, old in zip(
    jax.tree.leaves(after), jax.tree.leaves(state), strict=True
  ):
    if new.ndim and old.dtype != bool:
      np.testing.assert_array_equal(new[1], old[1])


@pytest.mark.parametrize(
  'row', [r for r in rows.ALL if r.values[0].independent]
)
def test_task_that_was_away_goes_on_where_it_stopped(row):
  losses = sequence(8, 2)
  active = np.ones((8, 2), bool)
  active[2:5, 1] = False
  weights, _ = run(row, losses, active=active)
  expected, _ = run(row, losses[active[:, 1]])
  np.testing.assert_allclose(weights[active[:, 1], 1], expected[:, 1], 1e-6)


@pytest.mark.parametrize('row', rows.ALL)
@pytest.mark.parametrize('size', [1, 3])
def test_no_active_task_means_zero_weights_and_no_change(row, size):
  _, state = run(row, sequence(2, size))
  weights, after = run(
    row,
    np.full((2, 2, size), NAN, np.float32),
    active=np.zeros((2, size), bool),
    state=state,
  )
  np.testing.assert_array_equal(weights, 0)
  for new, old in zip(
    jax.tree.leaves(after), jax.tree.leaves(state), strict=True
  ):
    assert jnp.array_equal(new, old)


@pytest.mark.parametrize('row', rows.POSITIVE)
@pytest.mark.parametrize('loss', [0.0, -1.0, NAN, INF, -INF])
def test_loss_without_a_logarithm_gives_nan_weights_and_does_no_harm(row, loss):
  losses = sequence(6, 3)
  losses[2, 0, 1] = min(loss, BOUNDS[1]) if np.isfinite(loss) else loss
  # After the step too, where nothing is skipped.
  losses[4, 1, 1] = losses[2, 0, 1]
  weights, state = run(row, losses)
  assert np.isnan(weights[2, 1])
  for i in (0, 1, 3, 4, 5):
    assert np.all(np.isfinite(weights[i]))
  for leaf in jax.tree.leaves(state):
    assert np.all(np.isfinite(leaf))


@pytest.mark.parametrize('row', rows.ALL)
@pytest.mark.parametrize('loss', [NAN, INF, -INF])
def test_loss_that_is_not_finite_does_not_stay_in_the_state(row, loss):
  losses = sequence(6, 3)
  losses[2, 0, 1] = loss
  weights, state = run(row, losses)
  assert np.all(np.isfinite(weights[3:]))
  for leaf in jax.tree.leaves(state):
    if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      assert np.all(np.isfinite(leaf))


@pytest.mark.parametrize('row', rows.ALL)
def test_other_shapes_than_one_entry_a_task_raise(row):
  weighting = row.make(range(2))
  state = weighting.init(2)
  for losses in (jnp.ones(()), jnp.ones((2, 1))):
    with pytest.raises(ValueError, match=r'losses must have shape \[tasks\]'):
      weighting.update(losses, state)
  for active in (jnp.ones(1), jnp.ones(3), jnp.ones((2, 1))):
    with pytest.raises(ValueError, match=r'active must have shape \(2,\)'):
      weighting.update(jnp.ones(2), state, active=active)
  if any(leaf.ndim for leaf in jax.tree.leaves(state)):
    for losses in (jnp.ones(1), jnp.ones(3)):
      with pytest.raises(ValueError, match=r'losses must have shape \(2,\)'):
        weighting.update(losses, state)
  with pytest.raises(ValueError, match=r'num_tasks must .* 1, got 0'):
    weighting.init(0)


@pytest.mark.parametrize('row', rows.PER_TASK)
def test_arguments_of_another_number_of_tasks_raise(row):
  weighting = row.make(range(3))
  with pytest.raises(ValueError, match='2'):
    weighting.init(2)
  if not jax.tree.leaves(weighting.init(3)):
    with pytest.raises(ValueError, match='for 2 tasks'):
      weighting.update(jnp.ones(2), weighting.init(3))


WRONG = [
  pytest.param(row, argument, value, id=f'{row.name}-{argument}-{index}')
  for row in rows.ROWS
  # A value may print its address, which differs from worker to worker.
  for index, (argument, value) in enumerate(row.wrong)
]


@pytest.mark.parametrize(('row', 'argument', 'value'), WRONG)
def test_factory_names_argument_and_value_it_refuses(row, argument, value):
  with pytest.raises((ValueError, TypeError)) as error:
    row.factory(**{**row.arguments, argument: value})
  message = str(error.value)
  assert argument in message
  assert repr(value) in message or str(value) in message


def test_states_survive_a_checkpoint(tmp_path):
  states = {row.name: run(row, sequence(3, 3))[1] for row in rows.ROWS}
  states = {name: s for name, s in states.items() if jax.tree.leaves(s)}
  by_name = {row.name: row for row in rows.ROWS}
  templates = {name: by_name[name].make(range(3)).init(3) for name in states}
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / 'states', states)
    checkpointer.wait_until_finished()
    restored = checkpointer.restore(tmp_path / 'states', templates)
  for name, before in states.items():
    assert methods.structure(restored[name]) == methods.structure(before)
    expected, _ = run(by_name[name], sequence(3, 3, seed=5), state=before)
    weights, _ = run(
      by_name[name], sequence(3, 3, seed=5), state=restored[name]
    )
    np.testing.assert_array_equal(weights, expected)


def test_every_weighting_has_a_row():
  names = [row.name for row in rows.ROWS]
  for name in mtl_jax.__all__:
    made = getattr(mtl_jax, name)
    if inspect.isfunction(made):
      if inspect.signature(made).return_annotation is mtl_jax.LossWeighting:
        assert any(n.startswith(name) for n in names), name
