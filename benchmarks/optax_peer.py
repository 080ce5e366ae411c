"""The peer for one task, `optax.contrib.sam`."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import cases
from mtl_jax import types
from mtl_jax.train import objective as objectives


class _State(NamedTuple):
  params: optax.Params
  opt_state: optax.OptState


def variant(
  case: cases.Case, spec: cases.Spec, params: types.Params
) -> cases.Variant:
  """A train step with SAM for one task and a model without BatchNorm.

  Its result equals `flat_minima` around `linear` with `norm='joint'`.

  Args:
    case: the case, with one task.
    spec: the specification of the variant.
    params: the initial parameters.

  Returns:
    The variant.

  Raises:
    ValueError: for several tasks, or a model with a state.
  """
  problem, model = cases.problem_of(case), cases.model_of(case)
  batch = jax.tree.map(jnp.asarray, cases.batch_of(case))
  _, model_state = model.init(jax.random.key(0), batch)
  if case.tasks != 1 or jax.tree.leaves(model_state):
    raise ValueError(f'case must have one task and no state, got {case.label}')
  tx = optax.contrib.sam(
    optax.adam(cases.LEARNING_RATE),
    optax.chain(optax.contrib.normalize(), optax.sgd(cases.RHO)),
    opaque_mode=True,
  )

  def loss_fn(params, batch):
    predictions, _ = model.apply(params, model_state, batch, train=True)
    return objectives.task_losses(problem, predictions, batch)['task_0']

  def step(state, batch):
    loss, grads = jax.value_and_grad(loss_fn)(state.params, batch)
    updates, opt_state = tx.update(
      grads,
      state.opt_state,
      state.params,
      grad_fn=lambda params, _: jax.grad(loss_fn)(params, batch),
    )
    params = optax.apply_updates(state.params, updates)
    return _State(params, opt_state), loss

  params = jax.tree.map(jnp.asarray, params)
  state = _State(params, tx.init(params))
  compiled, facts = cases.compile_step(step, state, batch)
  held = {'state': state, 'loss': jnp.zeros(())}

  def run(count):
    for _ in range(count):
      held['state'], held['loss'] = compiled(held['state'], batch)
    jax.block_until_ready(held)

  def first():
    run(1)
    moment = optax.tree.get(held['state'].opt_state, 'mu')
    return cases.First(
      np.asarray(held['loss'])[None],
      jax.tree.map(lambda m: np.asarray(m) / cases.FIRST_MOMENT, moment),
    )

  return cases.Variant(spec, first, run, facts)
