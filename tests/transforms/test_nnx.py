"""States inside `flax.nnx.Optimizer`, which wraps every array."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtl_jax

NAMES = ('a', 'b')


class TwoHeads(nnx.Module):
  def __init__(self):
    rngs = nnx.Rngs(0)
    self.trunk = nnx.Linear(2, 2, rngs=rngs)
    self.a = nnx.Linear(2, 1, rngs=rngs)
    self.b = nnx.Linear(2, 1, rngs=rngs)


def _label(params):
  """By path, of variables and of plain arrays."""

  def label(path, _):
    return path[0].key if path[0].key in NAMES else 'shared'

  return jax.tree_util.tree_map_with_path(label, params)


def _losses(params, x):
  features = x @ params['trunk']['kernel'] + params['trunk']['bias'][None]
  return {
    name: jnp.mean((features @ params[name]['kernel'] - i - 1) ** 2)
    for i, name in enumerate(NAMES)
  }


GRAD = mtl_jax.task_grad(_losses, NAMES, param_labels=_label)
X = jnp.array([[1.0, 2.0], [-1.0, 0.5]])
FAMO = mtl_jax.famo(learning_rate=0.5)
OPTIONS = {'param_labels': _label}
TRANSFORMATIONS = {
  'shared_only': lambda: mtl_jax.shared_only(
    mtl_jax.cagrad(), NAMES, **OPTIONS
  ),
  'flat_minima': lambda: mtl_jax.flat_minima(mtl_jax.moco(), NAMES, **OPTIONS),
  'skip_nonfinite': lambda: mtl_jax.skip_nonfinite(
    mtl_jax.shared_only(mtl_jax.pcgrad(), NAMES, **OPTIONS)
  ),
  'per_group by leaf': lambda: mtl_jax.shared_only(
    mtl_jax.per_group(mtl_jax.moco(num_tasks=2), 'leaf'), NAMES, **OPTIONS
  ),
  'per_group by path': lambda: mtl_jax.shared_only(
    mtl_jax.per_group(
      mtl_jax.cagrad(num_tasks=2),
      lambda tree: jax.tree_util.tree_map_with_path(
        lambda path, _: jax.tree_util.keystr(path), tree
      ),
    ),
    NAMES,
    **OPTIONS,
  ),
  'weighted': lambda: mtl_jax.shared_only(
    mtl_jax.weighted(FAMO), NAMES, **OPTIONS
  ),
}


@pytest.mark.parametrize('make', TRANSFORMATIONS.values(), ids=TRANSFORMATIONS)
def test_an_nnx_optimizer_moves_and_shows_what_plain_optax_does(make):
  model = TwoHeads()
  tx = optax.chain(make(), optax.sgd(0.1))
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
  params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  state = tx.init(params)

  for _ in range(2):
    (losses, _), grads = GRAD.at(params, X)
    extra = {'losses': losses, 'grad_fn': lambda own: GRAD.at_each(own, X)[1]}
    updates, state = tx.update(grads, state, params, **extra)
    params = optax.apply_updates(params, updates)

    wrapped = nnx.state(model, nnx.Param)
    (losses, _), grads = GRAD.at(wrapped, X)
    optimizer.update(model, grads, **{**extra, 'losses': losses})

  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
  jax.tree.map(close, nnx.to_pure_dict(nnx.state(model, nnx.Param)), params)
  shown, expected = map(mtl_jax.diagnostics, (optimizer.opt_state, state))
  assert shown.keys() == expected.keys() != set()
  jax.tree.map(close, shown, expected)
  assert not mtl_jax.left_out(optimizer.opt_state)


def test_after_step_keeps_the_variables_of_nnx():
  model = TwoHeads()
  tx = TRANSFORMATIONS['weighted']()
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
  (losses, _), grads = GRAD.at(nnx.state(model, nnx.Param), X)
  optimizer.update(model, grads, losses=losses)
  moved = mtl_jax.after_step(
    FAMO, losses * jnp.array([0.5, 1.0]), optimizer.opt_state
  )
  assert jax.tree.structure(moved) == jax.tree.structure(optimizer.opt_state)
  logits = moved.memory.weighting.logits.get_value()
  # Away from the task that gained, by Adam's first step.
  np.testing.assert_allclose(logits, [-0.5, 0.5], rtol=1e-4)
