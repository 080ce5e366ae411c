"""Joint updates that are to be the same, compared step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import quick_compile

import mtl_jax


def batches_of(names, actives, **leaves):
  """A batch for each set of tasks that have labels, with the same leaves."""
  return [
    {
      **leaves,
      'mask': {
        task: jnp.full(2, is_active, jnp.float32)
        for task, is_active in zip(names, active, strict=True)
      },
    }
    for active in actives
  ]


def assert_same_updates(losses, pairs, params, batches, tolerance=1e-4):
  """Raises unless the updates of each pair agree at every step.

  Both are asked at the same parameters, which follow the second one. All pairs
  are one program.

  Args:
    losses: a `TaskLosses`.
    pairs: {name: (joint update, the right one)}.
    params: where they start.
    batches: one a step.
    tolerance: for parts of the gradient, relative to the longest of its entries
      in shared leaves, or in a head.
  """

  @quick_compile.jit
  def step(carried, batch):
    here, after, answers = losses.on(batch), {}, {}
    for name, (joint, right) in pairs.items():
      place, state, right_state = carried[name]
      found, state = joint.update(here, place, state)
      wanted, right_state = right.update(here, place, right_state)
      place = jax.tree.map(lambda p, g: p - 0.1 * g, place, wanted.grads)
      after[name] = place, state, right_state
      answers[name] = found, wanted
    return after, answers

  carried = {
    name: (params, joint.init(params), right.init(params))
    for name, (joint, right) in pairs.items()
  }
  for batch in batches:
    carried, answers = step(carried, batch)
    for name, (found, wanted) in answers.items():
      np.testing.assert_allclose(
        found.losses, wanted.losses, rtol=1e-5, err_msg=name
      )
      for part in wanted.grads:
        _assert_close(found.grads[part], wanted.grads[part], tolerance, name)
  for name, (_, *states) in carried.items():
    shown, wanted = map(mtl_jax.diagnostics, states)
    assert wanted, name
    for key, value in wanted.items():
      if key in shown:
        np.testing.assert_allclose(
          shown[key], value, rtol=1e-3, atol=1e-4, err_msg=f'{name} {key}'
        )
    assert any(key.endswith('task_weights') for key in shown), name


def _assert_close(found, wanted, tolerance, name):
  size = max(np.max(np.abs(x)) for x in jax.tree.leaves(wanted))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      a, b, rtol=0, atol=tolerance * size, err_msg=name
    ),
    found,
    wanted,
  )
