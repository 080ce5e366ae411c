"""Task gradients inside `shard_map`, whose types tell what varies."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest
import quick_compile

import mtl_jax

DEVICES = 8
NAMES = ('b', 'a')
LABELS = {
  'shared': {'kernel': 'shared', 'unused': 'shared', 'frozen': 'frozen'},
  'heads': {'a': 'a', 'b': 'b'},
}


def make():
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
  params = {
    'shared': {'kernel': draw(3, 4), 'unused': draw(2), 'frozen': draw(4, 4)},
    'heads': {'a': draw(4), 'b': draw(4)},
  }
  batch = {
    'image': draw(4 * DEVICES, 3),
    'labels': {task: draw(4 * DEVICES) for task in NAMES},
    'mask': {
      # On every device as many, but not in every slice of it.
      'a': jnp.tile(jnp.array([1.0, 1.0, 0.0, 1.0]), DEVICES),
      'b': jnp.ones(4 * DEVICES),
    },
  }
  return params, batch


PARAMS, BATCH = make()


def loss_fn(params, batch):
  shared = params['shared']
  hidden = jnp.tanh(
    jnp.tanh(batch['image'] @ shared['kernel']) @ shared['frozen']
  )
  losses = {}
  for task in NAMES:
    errors = (hidden @ params['heads'][task] - batch['labels'][task]) ** 2
    mask = batch['mask'][task]
    losses[task] = jnp.sum(errors * mask) / jnp.maximum(jnp.sum(mask), 1)
  return losses, jnp.sum(hidden)


def weighted(params, batch, *, mark=lambda tree: tree, axis=None, slices=1):
  """The gradient of a weighted loss."""
  losses = mtl_jax.task_losses(
    lambda params, batch: loss_fn(params, batch)[0],
    NAMES,
    axis_name=axis,
    micro_batches=slices,
  )
  weigh = lambda values: (values / jnp.sum(values), None)
  _, _, grads = losses.on(batch).weighted_gradient(weigh, mark(params))
  return grads


def update(params, batch, *, mark=lambda tree: tree, axis=None, **options):
  """The flat-minima update with equal weights."""
  at, at_each = mtl_jax.task_grad(
    loss_fn, NAMES, param_labels=LABELS, has_aux=True, **options
  )
  _, grads = at(mark(params), batch)
  tx = mtl_jax.flat_minima(
    mtl_jax.linear(axis_name=axis), NAMES, rho=0.5, param_labels=LABELS
  )
  updates, _ = tx.update(
    grads,
    tx.init(params),
    params,
    grad_fn=lambda own: at_each(own, batch)[1],
  )
  return updates


CASES = [
  (engine, slices) for engine in ('unroll', 'vmap', 'scan') for slices in (1, 2)
]


@pytest.mark.parametrize('check_vma', [False, True])
def test_every_gradient_works_with_parameters_marked_as_varying(check_vma):
  mark = lambda tree: jax.lax.pcast(tree, 'batch', to='varying')
  marked = {'mark': mark} if check_vma else {}

  def all_of_them(params, batch):
    return [
      update(
        params,
        batch,
        axis='batch',
        engine=engine,
        micro_batches=slices,
        **marked,
      )
      for engine, slices in CASES
    ], [
      weighted(params, batch, axis='batch', slices=slices, **marked)
      for slices in (1, 2)
    ]

  mapped = jax.shard_map(
    all_of_them,
    mesh=jax.make_mesh(
      (DEVICES,), ('batch',), axis_types=(jax.sharding.AxisType.Auto,)
    ),
    in_specs=(P(), P('batch')),
    out_specs=P(),
    check_vma=check_vma,
  )

  @quick_compile.jit
  def both(params, batch):
    right = update(params, batch), weighted(params, batch)
    return mapped(params, batch), right

  found, expected = both(PARAMS, BATCH)
  for grads, right in zip(found, expected, strict=True):
    for one in grads:
      jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        one,
        right,
      )
