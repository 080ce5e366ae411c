"""First-order multi-gradient bilevel weighting."""

from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtl_jax.transforms.bilevel import _bilevel
from mtl_jax.transforms.contract import aggregation
from mtl_jax.transforms.contract import algebra
from mtl_jax.transforms.contract import arguments
from mtl_jax.transforms.contract import bilevel_weighting
from mtl_jax.transforms.contract import loss_weighting
from mtl_jax.transforms.solvers import constrained
from mtl_jax.transforms.weightings import task_optimizer


class ForumState(NamedTuple):
  """State of `forum`.

  Attributes:
    logits: [T], learnt; their softmax weighs the training losses.
    multipliers: [T], moving average of the multipliers of the validation
      losses, on the simplex.
    task_weights: [T], weights of the last update, the sum of the next two.
    valid_weights: [T], the part for the validation losses.
    train_weights: [T], the part for the training losses.
    residual: scalar, how far the multipliers of the last update are from the
      optimality conditions; see `Solution`.
    count: number of updates.
    opt_state: state of the optimizer of the logits.
  """

  logits: jax.Array
  multipliers: jax.Array
  task_weights: jax.Array
  valid_weights: jax.Array
  train_weights: jax.Array
  residual: jax.Array
  count: jax.Array  # type: ignore[assignment]  # hides tuple.count
  opt_state: Any

  def diagnostics(self) -> dict[str, jax.Array]:
    """The diagnostics; see `mtl_jax.diagnostics`."""
    return {
      'task_weights': self.task_weights,
      'valid_weights': self.valid_weights,
      'train_weights': self.train_weights,
      'residual': self.residual,
    }


def forum(
  *,
  rho: float = 0.1,
  inner_steps: int = 5,
  normalization: str = 'none',
  beta: float | Callable[[jax.Array], Any] | None = None,
  optimizer: optax.GradientTransformation | None = None,
) -> bilevel_weighting.BilevelWeighting:
  r"""Bilevel weights from first derivatives only (FORUM).

  With the training losses L, the validation losses V, the weighted training
  loss :math:`f(\alpha, \theta) = \sum_i \mathrm{softmax}(\alpha)_i
  L_i(\theta)` and :math:`\theta^S` after S steps of gradient descent on it
  from :math:`\theta`, the constraint is the gap :math:`f(\alpha, \theta) -
  f(\alpha, \theta^S)`, and its gradient, :math:`\theta^S` held fixed,

  .. math::
    q = \big(\nabla_\alpha f(\alpha, \theta) -
    \nabla_\alpha f(\alpha, \theta^S), \; \nabla_\theta f(\alpha, \theta)\big)

  The direction improves the worst validation loss as far as closing the gap
  allows, with :math:`F_k = (0, \nabla V_k(\theta) / n_k)`:

  .. math::
    \min_d \max_k \langle F_k, d \rangle + \tfrac{1}{2} |d|^2
    \quad \text{s.t.} \quad \langle q, d \rangle \le -\rho |q|^2

  Its dual has multipliers on the simplex, whose moving average is
  :math:`\lambda`, and :math:`\nu = \max(\rho - \langle q,
  \sum_k \lambda_k F_k \rangle / |q|^2, 0)`. The logits :math:`\alpha` move
  along their part of :math:`\nu q`, by an optimizer, and the weights are

  .. math:: w_i = \lambda_i / n_i + \nu \, \mathrm{softmax}(\alpha)_i

  with the logits before their move. The paper moves the parameters along
  :math:`\sum_k \lambda_k F_k + \nu q`, which is the gradient of the validation
  losses weighted by `state.valid_weights` plus that of the training losses
  weighted by `state.train_weights`. The weights returned are the sum of both,
  for an update on all examples together.

  Scale: the paper's, at least 1 in sum. Degree of homogeneity of the weighted
  gradient: 1 with `normalization='none'`. With `'l2'`, as in the authors' code,
  its validation part has degree 0. That code also drops the factor 1/2 from the
  dual, so that it solves a different problem, adds 1e-8 to :math:`|q|^2`, and
  stops the inner steps at a loss above 1e5; none of this is done here.

  Cost of `update`: S forward and backward passes and one forward pass of the
  training batch, one forward and T backward passes of the validation batch. The
  ordinary update comes on top. Memory: T + 3 trees like the parameters, because
  all validation gradients are kept at once, and the activations of two passes.
  None of this stays in the state: the lower level starts from the parameters
  every time.

  Args:
    rho: rate at which the gap should close.
    inner_steps: S, at least 1.
    normalization: :math:`n_k`: `'none'` (1, the paper) or `'l2'` (the length of
      the validation gradient, the authors' code).
    beta: weight of the newest multipliers in their moving average, in [0, 1],
      or an optax schedule of the number of updates; None for (count +
      1)^(-3/4), which is the authors' with updates instead of epochs.
    optimizer: for the logits; `optax.adam(1e-3)` if None.

  Returns:
    A `BilevelWeighting`; its `learning_rate` is for the inner steps.

  Raises:
    ValueError: for a `rho` that is not positive, no inner step, another
      normalization, or a `beta` outside [0, 1].
    TypeError: for anything but an optax transformation as the optimizer.

  Examples:
    Both gradients at 0 are (-1, -3). One inner step leads to 1, where losses
    are lower by (0.5, 2.5), so q = (-0.5, 0.5, -2) with square 4.5. The first
    task is worst and takes all; nu is 1 - 2 / 4.5.

    >>> import jax.numpy as jnp, mtl_jax
    >>> loss_fn = lambda params, batch: 0.5 * (params - batch) ** 2
    >>> weighting = mtl_jax.forum(rho=1.0, inner_steps=1)
    >>> params, batch = jnp.zeros(()), jnp.array([1.0, 3.0])
    >>> weights, state = weighting.update(
    ...   loss_fn, params, batch, batch, weighting.init(2, params),
    ...   learning_rate=0.5)
    >>> jnp.set_printoptions(precision=3)
    >>> print(weights, state.train_weights)
    [1.278 0.278] [0.278 0.278]

  References:
    Ye et al., `A First-Order Multi-Gradient Algorithm for Multi-Objective
    Bi-Level Optimization <https://arxiv.org/abs/2401.09257>`_, 2024
  """
  arguments.check_positive('rho', rho)
  arguments.check_count('inner_steps', inner_steps)
  arguments.one_of('normalization', normalization, ('none', 'l2'))
  if beta is not None and not callable(beta):
    arguments.check_that('beta', beta, lambda x: 0 <= x <= 1, 'in [0, 1]')
  adam = optax.adam(1e-3) if optimizer is None else optimizer
  _bilevel.check_optimizer(adam)

  def newest(count, dtype):
    if beta is None:
      return (count.astype(dtype) + 1) ** -0.75
    return jnp.asarray(beta(count) if callable(beta) else beta, dtype)

  def init(num_tasks, params):
    _bilevel.check_tasks(num_tasks)
    dtype = _bilevel.dtype_of(params)
    logits = jnp.full(num_tasks, 1 / num_tasks, dtype)
    return ForumState(
      logits=logits,
      multipliers=jnp.full(num_tasks, 1 / num_tasks, dtype),
      task_weights=jnp.zeros(num_tasks, dtype),
      valid_weights=jnp.zeros(num_tasks, dtype),
      train_weights=jnp.zeros(num_tasks, dtype),
      residual=jnp.zeros((), dtype),
      count=jnp.zeros((), jnp.int32),
      opt_state=task_optimizer.init(adam, logits),
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
    logits = state.logits
    size, dtype = logits.shape[0], logits.dtype
    present = aggregation.full_active(active, size)
    train = _bilevel.task_losses(loss_fn, train_batch, present, dtype)
    valid = _bilevel.task_losses(loss_fn, valid_batch, present, dtype)

    shares, pull_shares = jax.vjp(
      lambda x: loss_weighting.softmax(x, present), logits
    )
    before, pull_back = jax.vjp(train, params)
    (train_grad,) = pull_back(shares)
    inner = _bilevel.descend(params, train_grad, learning_rate)
    weighted = lambda params: shares @ train(params)
    inner = jax.lax.fori_loop(
      1,
      inner_steps,
      lambda _, p: _bilevel.descend(p, jax.grad(weighted)(p), learning_rate),
      inner,
    )
    (gap_by_logits,) = pull_shares(before - train(inner))

    _, pull_valid = jax.vjp(valid, params)
    (valid_grads,) = jax.lax.map(pull_valid, jnp.eye(size, dtype=dtype))
    valid_grads = algebra.keep_active(present, valid_grads)
    gram = algebra.gram(valid_grads, size).astype(dtype)
    products, square = algebra.with_rows(
      train_grad, valid_grads, size, aggregation.Axes()
    )
    lengths = jnp.ones(size, dtype)
    if normalization == 'l2':
      squares = jnp.diagonal(gram)
      lengths = jnp.sqrt(jnp.where(squares > 0, squares, 1))
    gram = gram / lengths[:, None] / lengths[None, :]
    constraint = constrained.Constraint(
      inner=products.astype(dtype) / lengths,
      square=square.astype(dtype) + gap_by_logits @ gap_by_logits,
      rho=rho,
    )
    found = constrained.least_worst(gram, constraint, present)
    # Non-finite values have no solution; they would stay in the mean for ever.
    finite = (
      jnp.isfinite(constraint.square)
      & jnp.all(jnp.isfinite(constraint.inner))
      & jnp.all(jnp.isfinite(gram))
    )
    found = found._replace(weights=jnp.where(finite, found.weights, jnp.nan))

    # The active tasks divide their own share of the simplex.
    held = jnp.where(present, state.multipliers, 0)
    mass = jnp.sum(held)
    held = jnp.where(mass > 0, held / jnp.where(mass > 0, mass, 1), 0)
    share = jnp.where(mass > 0, newest(state.count, dtype), 1)
    averaged = held + share * (found.weights - held)
    nu = constraint.multiplier(averaged)

    valid_weights = averaged / lengths
    train_weights = nu * shares
    logits, opt_state = task_optimizer.step(
      adam, nu * gap_by_logits, state.opt_state, logits, present
    )
    weights = valid_weights + train_weights
    return weights, ForumState(
      logits=logits,
      multipliers=jnp.where(
        present & finite, mass * averaged, state.multipliers
      ),
      task_weights=weights,
      valid_weights=valid_weights,
      train_weights=train_weights,
      residual=found.residual,
      count=state.count + (jnp.any(present) & finite).astype(jnp.int32),
      opt_state=opt_state,
    )

  return bilevel_weighting.BilevelWeighting(init, update)
