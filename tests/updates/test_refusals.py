"""A question that an evaluation cannot answer is refused; both are named."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import mtl_jax

NAMES = ('a', 'b')
PARAMS = jax.ShapeDtypeStruct((4,), jnp.float32)
BATCH = jax.ShapeDtypeStruct((8, 4), jnp.float32)
AXIS = 'replicas'


def dense_loss_fn(params, dense, x):
  del dense
  z = x @ params
  return {'a': jnp.mean(z**2), 'b': jnp.mean((z - 1) ** 2)}


# With every form that there is.
FULL = mtl_jax.Objective(
  loss_fn=lambda params, x: dense_loss_fn(params, None, x),
  features_fn=lambda params, x: x @ params,
  head_loss_fn=lambda params, z, x: {'a': jnp.mean(z), 'b': jnp.mean(z**2)},
  dense_loss_fn=dense_loss_fn,
)
JOINTS = {
  'stack': mtl_jax.stack_update(mtl_jax.mgda()),
  'flat stack': mtl_jax.stack_update(
    mtl_jax.flat_minima(mtl_jax.mgda(), NAMES)
  ),
  'weighted': mtl_jax.weighted_update(mtl_jax.si(), NAMES),
  'bilevel': mtl_jax.bilevel_update(mtl_jax.moml(), NAMES, lookahead=0.1),
  'gram': mtl_jax.gram_update(mtl_jax.mgda(), NAMES),
  'ghost': mtl_jax.ghost_update(mtl_jax.mgda(), NAMES),
  'features': mtl_jax.feature_update(mtl_jax.mgda(), NAMES),
}
# The evaluations, and what an error calls them.
EVALUATIONS = {
  'micro_batches': (
    mtl_jax.task_losses(FULL, NAMES, micro_batches=2),
    'micro_batches=2',
  ),
  'replicas': (
    mtl_jax.task_losses(FULL, NAMES, axis_name=AXIS),
    "axis_name='replicas'",
  ),
  'task_devices': (
    dataclasses.replace(mtl_jax.task_losses(FULL, NAMES), task_devices=2),
    r'parallel\.task_devices=2',
  ),
  'loss function alone': (
    mtl_jax.task_losses(FULL.loss_fn, NAMES),
    r'the objective has no (features|dense_loss)_fn',
  ),
}
# Who cannot ask it, and what an error calls them.
REFUSED = {
  'micro_batches': {
    'gram': 'gram_update needs single pull-backs',
    'ghost': 'ghost_update needs dense layers',
    'features': 'feature_update needs gradients of features',
  },
  'replicas': {
    'gram': 'gram_update needs single pull-backs',
    'ghost': 'ghost_update needs dense layers',
    'features': 'feature_update needs gradients of features',
    'bilevel': 'bilevel_update needs a look-ahead on the global batch',
  },
  'task_devices': {
    'gram': 'gram_update needs single pull-backs',
    'ghost': 'ghost_update needs dense layers',
    'features': 'feature_update needs gradients of features',
    'weighted': 'a weighted loss needs the gradient of one loss',
    'bilevel': 'a weighted loss needs the gradient of one loss',
  },
  'loss function alone': {
    'ghost': 'ghost_update needs dense layers',
    'features': 'feature_update needs gradients of features',
  },
}


def traced(joint, losses):
  """The shapes of an update; of one replica where there are replicas."""

  def update(params, batch):
    found, _ = joint.update(losses.on(batch), params, joint.init(params))
    return found.grads

  if losses.axis_name is None:
    return jax.eval_shape(update, PARAMS, BATCH)
  mapped = jax.shard_map(
    update,
    mesh=jax.make_mesh((8,), (AXIS,)),
    in_specs=jax.sharding.PartitionSpec(),
    out_specs=jax.sharding.PartitionSpec(),
    check_vma=False,
  )
  return jax.eval_shape(mapped, PARAMS, BATCH)


@pytest.mark.parametrize('how', EVALUATIONS)
def test_a_question_that_an_evaluation_cannot_answer_names_both_sides(how):
  losses, called = EVALUATIONS[how]
  for name, joint in JOINTS.items():
    if name in REFUSED[how]:
      with pytest.raises(ValueError, match=f'{REFUSED[how][name]}.*{called}'):
        traced(joint, losses)
    else:  # All the others are answered.
      assert traced(joint, losses).shape == PARAMS.shape


def test_losses_without_a_batch_have_no_answers():
  losses = mtl_jax.task_losses(FULL, NAMES)
  for joint in JOINTS.values():
    with pytest.raises(ValueError, match=r'call on\(batch\) first'):
      joint.update(losses, jnp.ones(4), joint.init(jnp.ones(4)))
