"""One step of training, from a state and a batch to the next state."""

from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtl_jax import gradients
from mtl_jax import transforms
from mtl_jax import types
from mtl_jax import updates
from mtl_jax.train import step_metrics


class TrainState(NamedTuple):
  """All that changes from step to step.

  Attributes:
    step: number of updates so far, int32.
    params: parameters.
    model_state: further state of the model, such as running statistics.
    joint: the joint update's state.
    opt_state: the optimizer's state.
  """

  step: jax.Array
  params: types.Params
  model_state: types.ModelState
  joint: Any
  opt_state: Any


def init_state(
  problem: types.Problem,
  model: types.Model,
  joint: updates.JointUpdate,
  tx: optax.GradientTransformation,
  *,
  seed: int,
  batch: types.Batch,
) -> TrainState:
  """The initial state of training, a function of the seed.

  Args:
    problem: the problem.
    model: the model.
    joint: the joint update.
    tx: the optimizer.
    seed: determines the initial parameters.
    batch: any batch; only its shapes matter.

  Returns:
    A `TrainState` at step 0.
  """
  key = jax.random.fold_in(jax.random.key(seed), 0)
  params, model_state = model.init(key, problem.preprocess(batch))
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    model_state=model_state,
    joint=joint.init(params),
    opt_state=tx.init(params),
  )


def make_train_step(
  problem: types.Problem,
  losses: gradients.TaskLosses,
  joint: updates.JointUpdate,
  tx: optax.GradientTransformation,
  *,
  seed: int = 0,
) -> Callable[
  [TrainState, types.Batch], tuple[TrainState, dict[str, jax.Array]]
]:
  """Makes a step: the losses of all tasks, one gradient, one step of optax.

  Args:
    problem: the problem.
    losses: its losses, whose functions take the model's state and a key after
      the batch, and whose aux averages the model's state and adds up sums of
      metrics; see `objective`.
    joint: makes one gradient from them.
    tx: the optimizer for that gradient.
    seed: determines the dropout masks, together with the step.

  Returns:
    A pure function `(state, batch) -> (state, metrics)`, to be jitted with the
    state donated. All quantities refer to the global batch, so under `jit` the
    result does not depend on the sharding. With the `axis_name` of `losses` it
    differs only through per-replica perturbations, BatchNorm statistics and
    dropout masks, and through which rows form a micro-batch. `metrics` are
    scalars: `'loss'`,
    the mean over the tasks that have labels in this batch; per task
    `'<task>/loss'` and its metrics at the unperturbed parameters,
    `'<task>/present'`, which is 0 if the task has no labels in this batch or if
    the optimizer skipped the step, and otherwise 1 (at 0 the task's other
    numbers have no meaning); and the results of `mtl_jax.diagnostics`.
  """

  def step(state: TrainState, batch: types.Batch):
    batch = problem.preprocess(batch)
    # One key for both passes and all tasks: the same dropout masks.
    key = jax.random.fold_in(jax.random.key(seed), state.step + 1)
    here = losses.on(batch, state.model_state, key)

    found, joint_state = joint.update(here, state.params, state.joint)
    changes, opt_state = tx.update(found.grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, changes)

    # A step that the optimizer skips counts as one without any task.
    skipped = transforms.left_out(opt_state)
    active = here.active & ~skipped
    joint_state, model_state = jax.tree.map(
      lambda new, old: jnp.where(skipped, old, new),
      (joint_state, found.aux.mean),
      (state.joint, state.model_state),
    )
    if joint.after_step is not None:  # One more forward pass.
      joint_state = joint.after_step(
        here.values(params), joint_state, active=active
      )
    metrics = step_metrics.of_step(
      problem, losses.param_labels, found, active, (joint_state, opt_state)
    )
    return TrainState(
      state.step + 1, params, model_state, joint_state, opt_state
    ), metrics

  return step
