"""The contract of a joint update, from T losses to one gradient."""

from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import jax

from mtl_jax import gradients
from mtl_jax import types


class Found(NamedTuple):
  """The result of a joint update for the losses on a batch.

  Attributes:
    grads: laid out as the parameters; for any optax transformation.
    losses: [T], unperturbed, for the global batch.
    aux: `gradients.Aux` of the unperturbed pass, also for the global batch.
  """

  grads: types.Params
  losses: jax.Array
  aux: gradients.Aux


class JointUpdate(NamedTuple):
  """A map from T losses to one gradient, as pure functions.

  Attributes:
    init: `params -> state`.
    update: `(losses, params, state) -> (Found, state)`, with losses a
      `TaskLosses` that is bound to a batch. Raises a ValueError for a question
      that those losses do not answer; the message names both sides.
    after_step: `(new_losses [T], state, *, active=None) -> state`, with the
      losses for the same batch after the parameters have moved; None for a
      method that does not use them.

  Examples:
    >>> import jax.numpy as jnp, mtl_jax, optax
    >>> def loss_fn(params, batch):
    ...   return {'a': 3 * params[0], 'b': 4 * params[1]}
    >>> losses = mtl_jax.task_losses(loss_fn, ('a', 'b'))
    >>> joint, sgd = mtl_jax.stack_update(mtl_jax.mgda()), optax.sgd(1.0)
    >>> params = jnp.ones(2)
    >>> state, opt_state = joint.init(params), sgd.init(params)
    >>> batch = {'x': jnp.ones(8)}
    >>> found, state = joint.update(losses.on(batch), params, state)
    >>> updates, opt_state = sgd.update(found.grads, opt_state, params)
    >>> print(found.losses, updates)
    [3. 4.] [-1.92 -1.44]
  """

  init: Callable[[types.Params], Any]
  update: Callable[[gradients.TaskLosses, types.Params, Any], tuple[Found, Any]]
  after_step: Callable[..., Any] | None = None
