"""What the compiled programs compute, and that they compute nothing more."""

import functools

import jax
import jax.numpy as jnp
import pytest
import quick_compile

import mtl_jax

BATCH, INPUTS, HIDDEN, OUTPUTS = 16, 32, 64, 128
NAMES = tuple(f'task_{i}' for i in range(4))
SIZE = len(NAMES)

PARAMS = {
  'shared': {
    'first': jnp.ones((INPUTS, HIDDEN)),
    'second': jnp.ones((HIDDEN, HIDDEN)),
  },
  'heads': {task: jnp.ones((HIDDEN, OUTPUTS)) for task in NAMES},
}
IMAGE = jnp.ones((BATCH, INPUTS))

# Multiplications and additions of the matrix products. The inputs' gradient of
# the first layer is not needed.
FIRST = 2 * BATCH * INPUTS * HIDDEN
SECOND = 2 * BATCH * HIDDEN * HIDDEN
HEAD = 2 * BATCH * HIDDEN * OUTPUTS
FORWARD = FIRST + SECOND
BACKWARD = FIRST + 2 * SECOND


def loss_fn(params, image):
  hidden = jax.nn.relu(image @ params['shared']['first'])
  hidden = jax.nn.relu(hidden @ params['shared']['second'])
  return {
    task: jnp.mean((hidden @ params['heads'][task]) ** 2) for task in NAMES
  }


def flops(fn, *args):
  """Of the compiled program, the elementwise work included."""
  return (
    jax.jit(fn)
    .lower(*args)
    .compile(quick_compile.DEFAULTS)
    .cost_analysis()['flops']
  )


def own_parameters():
  # Rows of equal numbers would not do: they could be computed once.
  rows = lambda x: jnp.stack([x * (1 + i) for i in range(SIZE)])
  return {**PARAMS, 'shared': jax.tree.map(rows, PARAMS['shared'])}


# Elementwise work is about one per cent; the head of one other task would be
# far more.
CLOSE = 0.02


@functools.cache
def flops_of_at():
  pair = mtl_jax.task_grad(loss_fn, NAMES, engine='unroll')
  return flops(pair.at, PARAMS, IMAGE)


def test_at_runs_one_forward_pass_and_a_pull_back_a_task_of_its_own_head():
  expected = FORWARD + SIZE * HEAD + SIZE * (BACKWARD + 2 * HEAD)
  assert flops_of_at() == pytest.approx(expected, rel=CLOSE)


def test_at_each_runs_a_forward_and_a_pull_back_a_task_of_its_own_head():
  cost = flops(
    mtl_jax.task_grad(loss_fn, NAMES, engine='unroll').at_each,
    own_parameters(),
    IMAGE,
  )
  expected = SIZE * (FORWARD + HEAD + BACKWARD + 2 * HEAD)
  assert cost == pytest.approx(expected, rel=CLOSE)


def test_one_vector_of_losses_pulled_back_computes_heads_of_other_tasks():
  """The trap that 'unroll' avoids; without it the engine could be simpler."""

  def at(params, image):
    def stacked(params):
      losses = loss_fn(params, image)
      return jnp.stack([losses[task] for task in NAMES])

    losses, pull = jax.vjp(stacked, params)
    return losses, [pull(row)[0] for row in jnp.eye(SIZE)]

  cost = flops(at, PARAMS, IMAGE)
  expected = FORWARD + SIZE * HEAD + SIZE * (BACKWARD + 2 * HEAD)
  assert cost > (1 + CLOSE) * expected


def test_aux_costs_no_second_forward_pass():
  def with_aux(params, image):
    hidden = jax.nn.relu(image @ params['shared']['first'])
    return loss_fn(params, image), jnp.mean(hidden, axis=0)

  cost = flops(
    mtl_jax.task_grad(with_aux, NAMES, engine='unroll', has_aux=True).at,
    PARAMS,
    IMAGE,
  )
  assert cost == pytest.approx(flops_of_at(), rel=0.01)


def test_a_frozen_leaf_costs_no_gradient():
  labels = {
    'shared': {'first': 'frozen', 'second': 'shared'},
    'heads': {task: task for task in NAMES},
  }
  cost = flops(
    mtl_jax.task_grad(loss_fn, NAMES, engine='unroll', param_labels=labels).at,
    PARAMS,
    IMAGE,
  )
  # Nothing is pulled back below the second layer.
  expected = FORWARD + SIZE * HEAD + SIZE * (SECOND + 2 * HEAD)
  assert cost == pytest.approx(expected, rel=CLOSE)


def temporary_copies(method, engine, tasks):
  """Temporary memory of an update, in copies of the shared parameters."""
  width, names = 512, tuple(f'task_{i}' for i in range(tasks))
  params = {
    'shared': {f'layer_{i}': jnp.ones((width, width)) for i in range(3)},
    'heads': {task: jnp.ones((width, 1)) for task in names},
  }

  def losses(params, x):
    for kernel in params['shared'].values():
      x = jnp.tanh(x @ kernel)
    return {task: jnp.mean((x @ params['heads'][task]) ** 2) for task in names}

  at, at_each = mtl_jax.task_grad(losses, names, engine=engine)
  tx = method(names)

  def update(params, state, x, active):
    found, grads = at(params, x)
    updates, state = tx.update(
      grads,
      state,
      params,
      losses=found[0],
      active=active,
      grad_fn=lambda moved: at_each(moved, x)[1],
    )
    return jax.tree.map(jnp.add, params, updates), state

  # One row: activations are next to nothing.
  compiled = (
    jax.jit(update, donate_argnums=0)
    .lower(params, tx.init(params), jnp.ones((1, width)), jnp.ones(tasks, bool))
    .compile(quick_compile.DEFAULTS)
  )
  size = sum(x.nbytes for x in params['shared'].values())
  return compiled.memory_analysis().temp_size_in_bytes / size


@pytest.mark.parametrize(
  ('name', 'tasks'),
  # The last has more rows than are added up in one pass.
  [('pcgrad', 2), ('cagrad', 4), ('linear', 18)],
)
def test_a_flat_update_in_a_loop_holds_two_stacks_and_little_more(name, tasks):
  method = lambda names: mtl_jax.flat_minima(getattr(mtl_jax, name)(), names)
  # The half is a piece of every row, as inner products take them.
  assert temporary_copies(method, 'scan', tasks) <= 2 * tasks + 3.5


def test_a_plain_update_in_a_loop_holds_one_stack_and_little_more():
  method = lambda names: mtl_jax.shared_only(mtl_jax.cagrad(), names)
  assert temporary_copies(method, 'scan', SIZE) <= SIZE + 2
