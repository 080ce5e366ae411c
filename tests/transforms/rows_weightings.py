"""Rows of loss weightings as aggregators; see `method_row`.

Those whose first update does not depend on the losses: the shared tests of
losses of any size and sign are for methods that accept them. All weightings
stand in `weighting_rows`.
"""

import copy

from method_row import Method
from method_row import WEIGHTS
import weighting_references as references

import mtl_jax


def _weighted(factory):
  """A factory of the aggregator, with the weighting's own arguments."""
  common = ('num_tasks', 'axis_name', 'reduce', 'shard_axis')

  def make(**arguments):
    ours = {k: arguments.pop(k) for k in common if k in arguments}
    return mtl_jax.weighted(factory(**arguments), **ours)

  return make


def _stepwise(reference):
  """A row's reference from one of weights, made by `size -> Reference`."""

  def step(J, losses, *, memory, draw, extra):
    del draw, extra
    # The memory given stays what it was.
    memory = reference(len(J)) if memory is None else copy.deepcopy(memory)
    return (memory.update(losses) @ J)[None], memory

  return step


METHODS = (
  Method(
    name='weighted_equal',
    factory=_weighted(mtl_jax.equal_weights),
    reference=lambda J, losses: J.mean(axis=0)[None],
    golden=(1.0, 1.0, 1.0),
    needs_losses=True,
    needs_tasks=True,
  ),
  Method(
    name='weighted_static',
    factory=_weighted(
      lambda weights=(1.0, 1.0): mtl_jax.static_weights(weights)
    ),
    reference=None,
    per_task={'weights': WEIGHTS},
    golden_per_task={'weights': (0.5, 1.5)},
    scale=lambda size: sum(WEIGHTS[:size]),
    # 0.5 g_1 + 1.5 g_2.
    golden=(7.0, 2.0, 2.0),
    needs_losses=True,
    needs_tasks=True,
  ),
  Method(
    name='weighted_uncertainty',
    factory=_weighted(mtl_jax.uncertainty),
    arguments={'learning_rate': 0.1},
    reference=_stepwise(lambda size: references.Uncertainty(size, 0.5)),
    stepwise=True,
    # Half the sum.
    golden=(1.0, 1.0, 1.0),
    scale=lambda size: size / 2,
    needs_losses=True,
    needs_tasks=True,
  ),
  Method(
    name='weighted_imtl_l',
    factory=_weighted(mtl_jax.imtl_l),
    arguments={'learning_rate': 0.1},
    reference=_stepwise(lambda size: references.ImtlL(size)),
    stepwise=True,
    golden=(2.0, 2.0, 2.0),
    scale=float,
    needs_losses=True,
    needs_tasks=True,
  ),
  Method(
    name='weighted_dwa',
    factory=_weighted(lambda: mtl_jax.dwa(steps_per_epoch=1)),
    reference=_stepwise(lambda size: references.Dwa(size, 1, 2.0)),
    stepwise=True,
    golden=(2.0, 2.0, 2.0),
    scale=float,
    needs_losses=True,
    needs_tasks=True,
  ),
)
