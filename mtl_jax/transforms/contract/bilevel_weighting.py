"""The contract of a weighting that learns from a validation batch."""

from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import jax


class BilevelWeighting(NamedTuple):
  """Weights of the losses, learnt on a validation batch.

  `loss_fn(params, batch) -> losses [T]` is the model's. Its *gradient* must be
  finite for absent tasks, as a masked mean's is; their losses may be anything.
  The weights are for one ordinary update with the gradient of the weighted
  loss, heads included. Under `jit` with shardings everything is global; there
  is no `axis_name` for replicas in `pmap` and `shard_map`.

  Attributes:
    init: `(num_tasks, params) -> state`.
    update: `(loss_fn, params, train_batch, valid_batch, state, *,
      learning_rate, active=None) -> (weights [T], state)`. The learning rate is
      the look-ahead's, a number or an array. `active`, bool [T], marks the
      tasks that are in both batches. Absent tasks have weight 0 and keep their
      part of the state. Non-finite values leave no trace in the learnt numbers.
      Each task has a separate optimizer for them.

  Examples:
    A step of training. The halves of the batch take turns as training and
    validation batch for the look-ahead, and the whole batch makes the update:

    >>> import jax, jax.numpy as jnp, mtl_jax, optax
    >>> weighting, tx = mtl_jax.auto_lambda(primary=(0,)), optax.sgd(0.1)
    >>> def loss_fn(params, batch):
    ...   errors = batch['x'] * params - batch['y']
    ...   return 0.5 * jnp.mean(errors**2, axis=0)
    >>> @jax.jit
    ... def step(params, opt_state, state, batch, active):
    ...   train, valid = (jax.tree.map(lambda x: x[k::2], batch)
    ...                   for k in (0, 1))
    ...   weights, state = weighting.update(
    ...     loss_fn, params, train, valid, state, learning_rate=0.1,
    ...     active=active)
    ...   def weighted(params):
    ...     losses = loss_fn(params, batch)
    ...     return jnp.sum(jnp.where(active, weights * losses, 0))
    ...   grads = jax.grad(weighted)(params)
    ...   updates, opt_state = tx.update(grads, opt_state, params)
    ...   return optax.apply_updates(params, updates), opt_state, state
    >>> params = jnp.zeros(())
    >>> batch = {'x': jnp.ones((4, 2)), 'y': jnp.array([[1.0, -1.0]] * 4)}
    >>> opt_state, state = tx.init(params), weighting.init(2, params)
    >>> for _ in range(100):
    ...   params, opt_state, state = step(
    ...     params, opt_state, state, batch, jnp.array([True, True]))
    >>> first, second = mtl_jax.diagnostics(state)['task_weights']
    >>> print(first > 0.1 > second, params > 0)
    True True
  """

  init: Callable[[int, Any], Any]
  update: Callable[..., tuple[jax.Array, Any]]

  def instead_of_aggregator(self) -> str:
    """The text of an error where an aggregator is expected."""
    return (
      'got a weighting that learns from validation losses; it evaluates the '
      'losses itself, so call its update and differentiate the weighted loss'
    )
