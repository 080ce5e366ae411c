"""The joint update from a stack of task gradients, by any transformation."""

import jax.numpy as jnp
import optax

from mtl_jax import gradients
from mtl_jax.transforms.contract import aggregation
from mtl_jax.updates import _joint


def stack_update(tx: optax.GradientTransformation) -> _joint.JointUpdate:
  """The update that a transformation makes from all task gradients.

  With a forward pass as 1 and a backward pass as 2 it takes time :math:`1 + 2
  T` and T copies of the shared parameters. With `flat_minima` it takes :math:`1
  + 5 T` and :math:`2 T + 1` copies.

  Args:
    tx: an aggregator for the whole tree of parameters: a plain one if all of
      them are shared, otherwise `shared_only(...)` or `flat_minima(...)`. One
      that needs `extra_grads` gets them from independent parts of the batch; a
      task counts as present if each part has labels for it.

  Returns:
    A joint update, whose state is the state of `tx`.

  Examples:
    >>> import jax.numpy as jnp, mtl_jax
    >>> names = ('a', 'b')
    >>> losses = mtl_jax.task_losses(
    ...   lambda p, x: {'a': 0.5 * p[0] ** 2 * x, 'b': p[1] * x}, names)
    >>> joint = mtl_jax.stack_update(
    ...   mtl_jax.flat_minima(mtl_jax.linear(), names, rho=1.0))
    >>> params = jnp.array([1.0, 2.0])
    >>> found, _ = joint.update(
    ...   losses.on(jnp.array(1.0)), params, joint.init(params))
    >>> print(found.grads)  # task a is steeper at 1 + rho
    [1.  0.5]
  """
  tx = aggregation.as_aggregator(tx)

  def update(losses, params, state):
    parts = losses.split(1 + tx.extra_batches)
    passes, stacks = zip(
      *(part.gradients(params) for part in parts), strict=True
    )
    found = gradients.combined(parts, passes)
    further = {}
    if tx.extra_batches:
      further = {
        'extra_grads': stacks[1:],
        'extra_grad_fn': lambda own: tuple(
          part.gradients_each(own)[1] for part in parts[1:]
        ),
      }
    grads, state = tx.update(
      stacks[0],
      state,
      params,
      losses=found.losses,
      active=jnp.all(jnp.stack([part.active for part in parts]), axis=0),
      grad_fn=lambda own: parts[0].gradients_each(own)[1],
      **further,
    )
    return _joint.Found(grads, *losses.over_replicas(found)), state

  return _joint.JointUpdate(tx.init, update, tx.after_step)
