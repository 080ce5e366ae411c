"""Calls of the compiled step, with one update or k updates each."""

from collections.abc import Callable
import math
from typing import Any

import jax
import ml_collections

from mtl_jax import types
from mtl_jax.train import placement as placements


def make_call(
  step: Callable[[Any, types.Batch], Any],
  *,
  steps_per_call: int,
  placement: str,
) -> Callable[[Any, Any], Any]:
  """Makes one function that takes `steps_per_call` updates, to be jitted.

  Small models leave the device idle while Python starts the next step; k steps
  in one call start it once. The updates equal those from k calls, on CPUs bit
  for bit; elsewhere XLA may add up in a different order in a different program.

  Args:
    step: `(state, batch) -> state`.
    steps_per_call: k.
    placement: the place of the training split, `'host'` or `'device'`.

  Returns:
    `(state, inputs) -> state`. `inputs` is a batch with the data on the host,
    and `(all examples, indices [B])` with the data on the device. For k > 1
    there are k batches or k rows of indices, stacked along a new first axis.
  """
  if placement == 'device':

    def call(state, inputs):
      data, indices = inputs

      def taken(state, indices):
        return step(state, placements.take(data, indices))

      return _repeated(taken, steps_per_call)(state, indices)

    return call
  return _repeated(step, steps_per_call)


def _repeated(step, steps_per_call):
  if steps_per_call == 1:
    return step

  def steps(state, inputs):
    return jax.lax.scan(lambda s, x: (step(s, x), None), state, inputs)[0]

  return steps


def stacked_shapes(batch: Any, steps_per_call: int) -> Any:
  """Shapes of a call's inputs, from arrays for one step."""
  stack = () if steps_per_call == 1 else (steps_per_call,)
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((*stack, *x.shape), x.dtype), batch
  )


def check_steps_per_call(
  config: ml_collections.ConfigDict, steps_per_epoch: int
) -> None:
  """Raises a ValueError if work due after some step falls inside a call.

  All calls thus have the same length, also at the end of a run.

  Args:
    config: of `configs/`.
    steps_per_epoch: number of steps of an epoch.
  """
  epochs = f'epochs of {steps_per_epoch} steps'
  intervals = {
    f'log_every_steps = {config.log_every_steps}': config.log_every_steps,
    f'checkpoint_every_steps = {config.checkpoint_every_steps}': (
      config.checkpoint_every_steps
    ),
    f'eval_every_epochs = {config.eval_every_epochs} {epochs}': (
      config.eval_every_epochs * steps_per_epoch
    ),
    f'epochs = {config.epochs} {epochs}': config.epochs * steps_per_epoch,
  }
  if any(steps % config.steps_per_call for steps in intervals.values()):
    raise ValueError(
      f'steps_per_call must divide {", ".join(intervals)}, got '
      f'{config.steps_per_call}; their greatest common divisor is '
      f'{math.gcd(*intervals.values())}'
    )
