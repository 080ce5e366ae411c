"""Auto-Lambda: weights from the derivative of a look-ahead."""

from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mtl_jax.transforms.bilevel import _bilevel
from mtl_jax.transforms.contract import aggregation
from mtl_jax.transforms.contract import arguments
from mtl_jax.transforms.contract import bilevel_weighting
from mtl_jax.transforms.weightings import task_optimizer


class AutoLambdaState(NamedTuple):
  """State of `auto_lambda`.

  Attributes:
    lambdas: [T], the learnt weights.
    task_weights: [T], weights of the last update: the lambdas, and zero for
      absent tasks.
    hypergradient: [T], the last derivative of the validation loss of the
      primary tasks by the lambdas.
    opt_state: state of the optimizer of the lambdas.
  """

  lambdas: jax.Array
  task_weights: jax.Array
  hypergradient: jax.Array
  opt_state: Any

  def diagnostics(self) -> dict[str, jax.Array]:
    """The diagnostics; see `mtl_jax.diagnostics`."""
    return {
      'task_weights': self.task_weights,
      'hypergradient': self.hypergradient,
    }


def auto_lambda(
  *,
  primary: Sequence[int] | None = None,
  initial: float = 0.1,
  optimizer: optax.GradientTransformation | None = None,
) -> bilevel_weighting.BilevelWeighting:
  r"""Weights that a look-ahead finds good for the primary tasks.

  .. math::
    \theta' = \theta - \eta \sum_i \lambda_i \nabla L_i(\theta), \qquad
    \frac{\partial}{\partial \lambda_i} \sum_{p \in P} V_p(\theta')
    = -\eta \, \Big\langle \sum_{p \in P} \nabla V_p(\theta'),
    \nabla L_i(\theta) \Big\rangle

  with L the losses on the training batch, V those on the validation batch and P
  the primary tasks. An optimizer moves the :math:`\lambda` down this
  derivative; they are the weights. They are not bounded: a task that harms the
  primary tasks can get a negative weight.

  The derivative is exact. The authors' code takes a central difference of the
  training losses along the validation gradient, and lets the look-ahead follow
  the momentum and the weight decay of the network's optimizer; here it is plain
  gradient descent.

  Scale: the paper's, every weight begins at 0.1. The weights are learnt by Adam
  and so hardly depend on the scale of the losses: the weighted gradient has
  degree of homogeneity 1.

  Cost of `update`, for any T: a forward and a backward pass at each of the two
  points, and one pass through the training batch, as long as a backward pass,
  that gives all T inner products at once. The ordinary update comes on top.
  Memory: three trees like the parameters, and the activations of two passes.

  Args:
    primary: indices of the tasks whose validation losses count; None for all.
    initial: every lambda at first.
    optimizer: for the lambdas; `optax.adam(1e-4)` if None.

  Returns:
    A `BilevelWeighting`.

  Raises:
    ValueError: for no primary task, for a negative or repeated index, and for
      an initial weight that is not positive; at `init` for a primary task that
      does not exist.
    TypeError: for anything but an optax transformation as the optimizer.

  Examples:
    Gradients of the losses at 0 are -1 and 1. The look-ahead is also 0, where
    the primary task's gradient is -1: the derivatives are -0.5 and 0.5.

    >>> import jax.numpy as jnp, mtl_jax, optax
    >>> loss_fn = lambda params, batch: 0.5 * (params - batch) ** 2
    >>> weighting = mtl_jax.auto_lambda(primary=(0,), optimizer=optax.sgd(0.1))
    >>> params, batch = jnp.zeros(()), jnp.array([1.0, -1.0])
    >>> weights, state = weighting.update(
    ...   loss_fn, params, batch, batch, weighting.init(2, params),
    ...   learning_rate=0.5)
    >>> jnp.set_printoptions(precision=3)
    >>> print(weights)
    [0.15 0.05]

  References:
    Liu et al., `Auto-Lambda: Disentangling Dynamic Task Relationships
    <https://arxiv.org/abs/2202.03091>`_, 2022
  """
  if primary is not None:
    whole = np.ndim(primary) == 1 and np.asarray(primary).dtype.kind == 'i'
    if not whole or min(primary) < 0 or len(set(primary)) < len(primary):
      raise ValueError(
        f'primary must be distinct indices of tasks, got {primary!r}'
      )
    primary = tuple(int(i) for i in primary)
  arguments.check_positive('initial', initial)
  adam = optax.adam(1e-4) if optimizer is None else optimizer
  _bilevel.check_optimizer(adam)

  def init(num_tasks, params):
    _bilevel.check_tasks(num_tasks)
    if primary is not None and max(primary) >= num_tasks:
      raise ValueError(f'primary is {primary}, but there are {num_tasks} tasks')
    dtype = _bilevel.dtype_of(params)
    lambdas = jnp.full(num_tasks, initial, dtype)
    return AutoLambdaState(
      lambdas=lambdas,
      task_weights=jnp.zeros(num_tasks, dtype),
      hypergradient=jnp.zeros(num_tasks, dtype),
      opt_state=task_optimizer.init(adam, lambdas),
    )

  def update(
    loss_fn,
    params,
    train_batch,
    valid_batch,
    state,
    *,
    learning_rate,
    active=None,
  ):
    lambdas = state.lambdas
    size, dtype = lambdas.shape[0], lambdas.dtype
    present = aggregation.full_active(active, size)
    counted = present
    if primary is not None:
      counted = present & jnp.zeros(size, bool).at[jnp.array(primary)].set(True)
    train = _bilevel.task_losses(loss_fn, train_batch, present, dtype)
    valid = _bilevel.task_losses(loss_fn, valid_batch, counted, dtype)
    _, pull_back = jax.vjp(train, params)

    def look_ahead(lambdas):
      (grads,) = pull_back(lambdas)
      return jnp.sum(valid(_bilevel.descend(params, grads, learning_rate)))

    # The pull-back is linear in the lambdas, so its transpose takes the
    # validation gradient to all T inner products in one pass.
    hypergradient = jax.grad(look_ahead)(jnp.where(present, lambdas, 0))
    hypergradient = jnp.where(present, hypergradient, 0)
    lambdas, opt_state = task_optimizer.step(
      adam, hypergradient, state.opt_state, lambdas, present
    )
    weights = jnp.where(present, lambdas, 0)
    return weights, AutoLambdaState(lambdas, weights, hypergradient, opt_state)

  return bilevel_weighting.BilevelWeighting(init, update)
