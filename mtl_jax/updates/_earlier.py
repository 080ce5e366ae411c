"""The call of `gram_update` from before there were joint updates."""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
import functools
from typing import Any
from typing import NamedTuple
import warnings

import jax.numpy as jnp
import optax

from mtl_jax import gradients
from mtl_jax.transforms import default_labels
from mtl_jax.transforms import ParamLabels
from mtl_jax.transforms import Perturbation


class OfLossFn(NamedTuple):
  """A joint update that is bound to a loss function.

  Attributes:
    init: `params -> state`.
    update: `(params, state, *args, active=None) -> ((losses [T], aux), grads,
      state)`.
  """

  init: Callable[[Any], Any]
  update: Callable[..., tuple[Any, Any, Any]]


def with_loss_fn(factory: Callable[..., Any]) -> Callable[..., Any]:
  """Lets a factory be called as `factory(loss_fn, aggregator, task_names)`.

  It is deprecated: `task_losses` takes the loss function now.
  """

  @functools.wraps(factory)
  def call(*args, **options):
    # A transformation is a tuple; only a loss function can be called, and a
    # method that was not, before the names of the tasks.
    names_follow = len(args) == 2 and 'task_names' not in options
    if not args or not callable(args[0]) or names_follow:
      return factory(*args, **options)
    warnings.warn(
      f'{factory.__name__}(loss_fn, ...) is deprecated; call '
      f'{factory.__name__}(aggregator, task_names) and hand '
      'task_losses(loss_fn, task_names).on(batch) to its update',
      DeprecationWarning,
      stacklevel=2,
    )
    return _of_loss_fn(factory, *args, **options)

  return call


def _of_loss_fn(
  factory: Callable[..., Any],
  loss_fn: Callable[..., Any],
  aggregator: optax.GradientTransformation,
  task_names: Sequence[str],
  *,
  rho: Any = None,
  head_scale: str | None = None,
  param_labels: ParamLabels = default_labels,
  has_aux: bool = False,
  **ball: Any,
) -> OfLossFn:
  flat = None if rho is None else Perturbation(rho, **ball)
  joint = factory(aggregator, task_names, flat=flat, head_scale=head_scale)

  def update(params, state, *args, active=None):
    def with_aux(params, _):
      out = loss_fn(params, *args)
      return (out[0], gradients.Aux(mean=out[1])) if has_aux else out

    losses = gradients.task_losses(
      with_aux, task_names, param_labels=param_labels
    ).on(None)
    if active is not None:
      present = jnp.asarray(active).astype(jnp.float32)
      losses = dataclasses.replace(losses, label_counts=present)
    found, state = joint.update(losses, params, state)
    aux = found.aux.mean if has_aux else None
    return (found.losses, aux), found.grads, state

  return OfLossFn(joint.init, update)
