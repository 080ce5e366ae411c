"""Loss weightings: their numbers and what every one of them promises.

One program a method runs all hard sequences of losses there are; the tests ask
what it found.
"""

import functools
import inspect
import re
from typing import Any
from typing import NamedTuple

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
STEPS = 9
WEIGHTINGS = {row.name: row.make(range(2)) for row in rows.ROWS}


def sequence(size, seed=0):
  """Losses before and after each step, positive: [steps, 2, T]."""
  rng = np.random.default_rng(seed)
  return np.exp(rng.uniform(-1.5, 1.0, (STEPS, 2, size))).astype(np.float32)


class Course(NamedTuple):
  """What happens to the tasks of a run.

  Attributes:
    losses: [steps, 2, T], before and after each step.
    active: bool [steps, T].
  """

  losses: np.ndarray
  active: np.ndarray


ORDER = [1, 2, 0]
ABSENT = [(1,), (0,), (0, 1), (1, 2)]
# What stands where a loss would: none of them may matter.
INSTEAD = [1.0, 0.0, -1.0, 1e30, NAN, INF, -INF]
# Below all of the bounds too.
WITHOUT_LOGARITHM = [2 * min(BOUNDS), -1.0, NAN, INF, -INF]
NOT_FINITE = WITHOUT_LOGARITHM[2:]


@functools.cache
def courses(size):
  """All courses of so many tasks, by what they are."""
  everyone = np.ones((STEPS, size), bool)
  found = {'all there': Course(sequence(size), everyone)}
  losses, active = sequence(size), everyone.copy()
  losses[2:], active[2:] = NAN, False
  found['nobody after 2 steps'] = Course(losses, active)
  if size != 3:
    return found

  found['another order'] = Course(sequence(3)[..., ORDER], everyone)
  for absent in ABSENT:
    active = np.broadcast_to(~np.isin(np.arange(3), absent), (STEPS, 3))
    for loss in INSTEAD:
      losses = np.where(active[:, None], sequence(3), np.float32(loss))
      found[f'{absent} absent, loss {loss}'] = Course(losses, active)
  for loss in [0.0, *WITHOUT_LOGARITHM]:
    losses = sequence(3)
    # Once before a step and once after one.
    losses[2, 0, 1] = losses[4, 1, 1] = loss
    found[f'a loss of {loss}'] = Course(losses, everyone)
  active = everyone.copy()
  active[2:6, 1] = False
  found['away for 4 steps'] = Course(sequence(3, seed=2), active)
  return found


class Found(NamedTuple):
  """What a weighting made of a course.

  Attributes:
    weights: [steps, T].
    slopes: [steps, T], their derivative along the losses.
    states: after each step, leaves [steps, ...].
  """

  weights: Any
  slopes: Any
  states: Any


def step_of(weighting):
  """`(losses [2, T], state, active) -> (weights, slopes, state)`."""

  def step(losses, state, active):
    update = lambda losses: weighting.update(losses, state, active=active)
    weights, slopes, new_state = jax.jvp(
      update, (losses[0],), (jnp.ones_like(losses[0]),), has_aux=True
    )
    if weighting.after_step is not None:
      new_state = weighting.after_step(losses[1], new_state, active=active)
    return weights, slopes, new_state

  return step


@functools.cache
def run(name):
  """Of each course of 1, 3 and 40 tasks by its name what a method found."""
  (row,) = (r for r in rows.ROWS if r.name == name)

  def one(weighting, state, course):
    def step(state, now):
      weights, slopes, state = step_of(weighting)(now.losses, state, now.active)
      return state, Found(weights, slopes, state)

    # A state of another structure, shape or type cannot be carried.
    return jax.lax.scan(step, state, course)[1]

  weightings = {size: row.make(range(size)) for size in (1, 3, 40)}
  starts = {size: w.init(size) for size, w in weightings.items()}
  stacks = {
    size: Course(*map(np.stack, zip(*courses(size).values(), strict=True)))
    for size in weightings
  }
  batched = quick_compile.jit(
    lambda starts, stacks: {
      size: jax.vmap(functools.partial(one, weighting, starts[size]))(
        stacks[size]
      )
      for size, weighting in weightings.items()
    }
  )
  found = batched(starts, stacks)
  return {
    (size, course): jax.tree.map(lambda x, i=i: host(x[i]), found[size])
    for size in weightings
    for i, course in enumerate(courses(size))
  }


def host(leaf):
  if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    leaf = jax.random.key_data(leaf)
  return np.asarray(leaf)


def learnt(row, states):
  """The leaves of a state that hold numbers, not a key."""
  if row.reference is not None:
    return jax.tree.leaves(states)
  return jax.tree.leaves(states._replace(key=None))


def of_reference(row, tasks, losses):
  """Weights [steps, T] in float64."""
  reference, weights = row.reference(tasks), []
  for before, after in losses.astype(np.float64):
    weights.append(reference.update(before))
    reference.after_step(after)
  return np.stack(weights)


def close(found, expected, course):
  np.testing.assert_allclose(
    found, expected, rtol=2e-4, atol=1e-5, err_msg=str(course)
  )


def test_first_weights_are_those_by_hand():
  @quick_compile.jit
  def all_weights(losses):
    return {
      name: weighting.update(losses, weighting.init(2))[0]
      for name, weighting in WEIGHTINGS.items()
    }

  weights = all_weights(np.array([1.0, 2.0], np.float32))
  for row in rows.ROWS:
    if row.golden is not None:
      np.testing.assert_allclose(
        weights[row.name], row.golden, atol=1e-5, err_msg=row.name
      )


@pytest.mark.parametrize('row', rows.DETERMINISTIC)
def test_weights_follow_the_reference_step_by_step(row):
  for size in (1, 3, 40):
    weights = run(row.name)[size, 'all there'].weights
    close(weights, of_reference(row, range(size), sequence(size)), size)


@pytest.mark.parametrize('row', rows.DETERMINISTIC)
def test_absent_task_is_as_if_it_were_not_there(row):
  for absent in ABSENT:
    present = [i for i in range(3) if i not in absent]
    expected = of_reference(row, present, sequence(3)[..., present])
    for loss in INSTEAD:
      course = f'{absent} absent, loss {loss}'
      weights, _, states = run(row.name)[3, course]
      np.testing.assert_array_equal(weights[:, list(absent)], 0, err_msg=course)
      close(weights[:, present], expected, course)
      for leaf in jax.tree.leaves(states):
        assert np.all(np.isfinite(leaf)), course


@pytest.mark.parametrize('row', rows.ALL)
def test_state_of_absent_task_stays_to_the_bit(row):
  # Long enough for an epoch or a warm-up to end.
  states = run(row.name)[3, 'away for 4 steps'].states
  for leaf in learnt(row, states):
    if leaf.ndim > 1 and leaf.dtype != bool:
      np.testing.assert_array_equal(leaf[5, 1], leaf[1, 1])


@pytest.mark.parametrize('row', rows.INDEPENDENT)
def test_task_that_was_away_goes_on_where_it_stopped(row):
  losses, active = courses(3)['away for 4 steps']
  weights = run(row.name)[3, 'away for 4 steps'].weights
  expected = of_reference(row, range(3), losses[active[:, 1]])
  close(weights[active[:, 1], 1], expected[:, 1], 'away for 4 steps')


@pytest.mark.parametrize('row', rows.ALL)
def test_no_active_task_means_zero_weights_and_no_change(row):
  for size in (1, 3):
    weights, _, states = run(row.name)[size, 'nobody after 2 steps']
    np.testing.assert_array_equal(weights[2:], 0)
    for leaf in jax.tree.leaves(states):
      for now in leaf[2:]:
        np.testing.assert_array_equal(now, leaf[1])


@pytest.mark.parametrize('row', rows.SYMMETRIC)
def test_tasks_in_another_order_have_the_same_weights(row):
  expected = run(row.name)[3, 'all there'].weights[:, ORDER]
  weights = run(row.name)[3, 'another order'].weights
  np.testing.assert_allclose(weights, expected, rtol=1e-4)


@pytest.mark.parametrize('row', rows.POSITIVE)
def test_loss_without_a_logarithm_gives_nan_weights_and_does_no_harm(row):
  for loss in WITHOUT_LOGARITHM:
    weights, _, states = run(row.name)[3, f'a loss of {loss}']
    assert np.isnan(weights[2, 1]), loss
    assert np.all(np.isfinite(np.delete(weights, 2, axis=0))), loss
    for leaf in jax.tree.leaves(states):
      assert np.all(np.isfinite(leaf[-1])), loss


@pytest.mark.parametrize('row', rows.ALL)
def test_loss_of_zero_gives_finite_weights(row):
  weights, _, states = run(row.name)[3, 'a loss of 0.0']
  for leaf in (weights, *jax.tree.leaves(states)):
    assert np.all(np.isfinite(leaf))


@pytest.mark.parametrize('row', rows.ALL)
def test_loss_that_is_not_finite_does_not_stay_in_the_state(row):
  for loss in NOT_FINITE:
    weights, _, states = run(row.name)[3, f'a loss of {loss}']
    assert np.all(np.isfinite(weights[3:])), loss
    for leaf in learnt(row, states):
      assert np.all(np.isfinite(leaf[-1])), loss


@pytest.mark.parametrize('row', rows.ALL)
def test_weights_are_constants_to_differentiation(row):
  for course, found in run(row.name).items():
    np.testing.assert_array_equal(found.slopes, 0, err_msg=str(course))


def test_weights_are_the_gradient_of_the_objective():
  objectives = [row for row in rows.ROWS if row.objective is not None]

  @quick_compile.jit
  def both(losses):
    return {
      row.name: (
        row.make(range(3)).update(losses, row.make(range(3)).init(3))[0],
        jax.grad(row.objective)(losses),
      )
      for row in objectives
    }

  with jax.enable_x64(True):
    losses = np.asarray(sequence(3, seed=1)[0, 0], np.float64)
    for name, (weights, gradient) in both(losses).items():
      assert weights.dtype == np.float64
      np.testing.assert_allclose(
        weights, gradient, rtol=1e-9, atol=1e-12, err_msg=name
      )


@pytest.mark.parametrize('row', rows.ALL)
def test_state_keeps_structure_shape_and_dtype(row):
  for dtype in ('bfloat16', 'float16', 'float64'):
    with jax.enable_x64(dtype == 'float64'):
      weighting = row.make(range(3))
      state = weighting.init(3)
      weights, _, new_state = jax.eval_shape(
        step_of(weighting),
        jax.ShapeDtypeStruct((2, 3), dtype),
        state,
        jax.ShapeDtypeStruct((3,), bool),
      )
      assert weights.shape == (3,)
      assert weights.dtype == jnp.result_type(float)
      assert methods.structure(new_state) == methods.structure(state)


def initial_states():
  return {name: weighting.init(2) for name, weighting in WEIGHTINGS.items()}


@functools.partial(quick_compile.jit, donate_argnums=0, keep_unused=True)
def all_update(states):
  """The states of all methods after a step more."""
  losses = jnp.array([[1.0, 2.0], [0.5, 2.5]])
  return {
    name: step_of(weighting)(losses, states[name], jnp.ones(2, bool))[2]
    for name, weighting in WEIGHTINGS.items()
  }


def test_states_can_be_donated_again_and_again():
  # The second ones share nothing with the first.
  for states in [initial_states(), initial_states()]:
    for _ in range(2):
      old, states = states, all_update(states)
      for path, leaf in jax.tree.leaves_with_path(old):
        assert leaf.is_deleted(), path


def assert_refused(name, message, function, *args, **kwargs):
  with pytest.raises(ValueError) as error:
    function(*args, **kwargs)
    pytest.fail(f'{name} does not refuse {args} {kwargs}')
  assert re.search(message, str(error.value)), name


def test_other_shapes_than_one_entry_a_task_raise():
  for name, weighting in WEIGHTINGS.items():
    state = weighting.init(2)
    looks = [weighting.update]
    if weighting.after_step is not None:
      looks.append(weighting.after_step)
    for look in looks:
      for shape in ((), (2, 1)):
        message = r'losses must have .* \[tasks\]'
        assert_refused(name, message, look, np.ones(shape), state)
      for shape in (1, 3, (2, 1)):
        message, active = r'active must have shape \(2,\)', np.ones(shape)
        assert_refused(name, message, look, np.ones(2), state, active=active)
      if any(leaf.ndim for leaf in jax.tree.leaves(state)):
        for size in (1, 3):
          message = r'losses must have shape \(2,\)'
          assert_refused(name, message, look, np.ones(size), state)
    assert_refused(name, r'num_tasks must .* 1, got 0', weighting.init, 0)


def test_arguments_of_another_number_of_tasks_raise():
  for row in rows.ROWS:
    if row.reference is None or row.symmetric:
      continue
    weighting = row.make(range(3))
    assert_refused(row.name, '2', weighting.init, 2)
    state = weighting.init(3)
    if not jax.tree.leaves(state):
      update = weighting.update
      assert_refused(row.name, '2 tasks', update, np.ones(2), state)


@pytest.mark.parametrize('row', rows.PICKY)
def test_factory_names_argument_and_value_it_refuses(row):
  for argument, value in row.wrong:
    with pytest.raises((ValueError, TypeError)) as error:
      row.factory(**{**row.arguments, argument: value})
      pytest.fail(f'{argument}={value!r} was taken')
    message = str(error.value)
    assert argument in message, (argument, value)
    assert repr(value) in message or str(value) in message, (argument, value)


def test_states_survive_a_checkpoint(tmp_path):
  states = all_update(all_update(initial_states()))
  kept = lambda states: {n: s for n, s in states.items() if jax.tree.leaves(s)}
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / 'states', kept(states))
    checkpointer.wait_until_finished()
    restored = checkpointer.restore(tmp_path / 'states', kept(initial_states()))
  for name, state in restored.items():
    assert methods.structure(state) == methods.structure(states[name]), name
  expected = kept(jax.tree.map(host, all_update(states)))
  found = jax.tree.map(host, all_update(states | restored))
  jax.tree.map(np.testing.assert_array_equal, kept(found), expected)


def test_every_weighting_has_a_row():
  names = [row.name for row in rows.ROWS]
  for name in mtl_jax.__all__:
    made = getattr(mtl_jax, name)
    if inspect.isfunction(made):
      if inspect.signature(made).return_annotation is mtl_jax.LossWeighting:
        assert any(n.startswith(name) for n in names), name
