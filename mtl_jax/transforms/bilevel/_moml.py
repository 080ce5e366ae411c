"""Multi-objective meta learning of task weights."""

from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from mtl_jax.transforms.bilevel import _bilevel
from mtl_jax.transforms.contract import aggregation
from mtl_jax.transforms.contract import arguments
from mtl_jax.transforms.contract import bilevel_weighting
from mtl_jax.transforms.contract import loss_weighting
from mtl_jax.transforms.solvers import simplex
from mtl_jax.transforms.weightings import task_optimizer

_NORMALIZATIONS = ('none', 'l2', 'loss')
# A sum of hypergradients this much shorter than its terms is rounding of zero,
# the point where no logit helps all tasks. Adam would blow it up to full steps.
_RESOLUTION = 1e-5


class MomlState(NamedTuple):
  """State of `moml`.

  Attributes:
    logits: [T], learnt.
    task_weights: [T], weights of the last update: the softmax over the active
      tasks' logits, and zero for absent tasks.
    objective_weights: [T], the last least-norm weights of the validation
      losses.
    residual: scalar, how far `objective_weights` are from optimal; see
      `Solution`.
    opt_state: state of the optimizer of the logits.
  """

  logits: jax.Array
  task_weights: jax.Array
  objective_weights: jax.Array
  residual: jax.Array
  opt_state: Any

  def diagnostics(self) -> dict[str, jax.Array]:
    """The diagnostics; see `mtl_jax.diagnostics`."""
    return {
      'task_weights': self.task_weights,
      'objective_weights': self.objective_weights,
      'residual': self.residual,
    }


def moml(
  *,
  normalization: str = 'none',
  optimizer: optax.GradientTransformation | None = None,
) -> bilevel_weighting.BilevelWeighting:
  r"""Weights along a common descent of all validation losses.

  .. math::
    \theta'(\alpha) = \theta - \eta \sum_i \mathrm{softmax}(\alpha)_i
    \nabla L_i(\theta), \qquad
    h_k = \frac{\partial V_k(\theta'(\alpha))}{\partial \alpha}, \qquad
    \min_{\gamma \in \Delta} \Big|\sum_k \gamma_k h_k / n_k\Big|^2

  with L the losses on the training batch and V those on the validation batch.
  An optimizer moves the logits :math:`\alpha` along :math:`\sum_k \gamma_k h_k`
  and the weights are their softmax. The hypergradients are exact for one
  look-ahead step.

  Hypergradients are orthogonal to (1, ..., 1). With two tasks they lie on one
  line: if they point in opposite directions, their least-norm point is zero and
  the weights only drift with the optimizer's momentum.

  Scale: weights on the simplex. The optimizer, Adam by default, hardly sees the
  scale of the losses: the weighted gradient has degree of homogeneity 1.

  Cost of `update`: a forward and a backward pass of the training batch, a
  forward pass of the validation batch, and for each of the T tasks a backward
  pass of the validation batch and a pass through the training batch that is as
  long as one. The ordinary update comes on top. Memory: four trees like the
  parameters, because tasks are handled one after the other, and the activations
  of two passes.

  Args:
    normalization: the divisor of a hypergradient in the search for
      :math:`\gamma`: `'none'` (1, the paper), `'l2'` (its length) or `'loss'`
      (its validation loss), both in the authors' code. The :math:`\gamma` apply
      to the undivided hypergradients.
    optimizer: for the logits; `optax.adam(1e-3)` if None.

  Returns:
    A `BilevelWeighting`.

  Raises:
    ValueError: for another normalization.
    TypeError: for anything but an optax transformation as the optimizer.

  Examples:
    Training gradients at 0 are -1 and -3, the look-ahead is 0.5, validation
    gradients there are -0.5 and -2.5. The first hypergradient,
    (0.0625, -0.0625), is the shorter of two that point the same way; four
    times it is taken from the logits (0.5, 0.5).

    >>> import jax.numpy as jnp, mtl_jax, optax
    >>> loss_fn = lambda params, batch: 0.5 * (params - batch) ** 2
    >>> weighting = mtl_jax.moml(optimizer=optax.sgd(4.0))
    >>> params, batch = jnp.zeros(()), jnp.array([1.0, 3.0])
    >>> weights, state = weighting.update(
    ...   loss_fn, params, batch, batch, weighting.init(2, params),
    ...   learning_rate=0.25)
    >>> jnp.set_printoptions(precision=3)
    >>> print(state.logits, weights)
    [0.25 0.75] [0.378 0.622]

  References:
    Ye et al., `Multi-Objective Meta Learning
    <https://arxiv.org/abs/2102.07121>`_, 2021
  """
  arguments.one_of('normalization', normalization, _NORMALIZATIONS)
  adam = optax.adam(1e-3) if optimizer is None else optimizer
  _bilevel.check_optimizer(adam)

  def init(num_tasks, params):
    _bilevel.check_tasks(num_tasks)
    dtype = _bilevel.dtype_of(params)
    logits = jnp.full(num_tasks, 1 / num_tasks, dtype)
    return MomlState(
      logits=logits,
      task_weights=jnp.zeros(num_tasks, dtype),
      objective_weights=jnp.zeros(num_tasks, dtype),
      residual=jnp.zeros((), dtype),
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
    _, pull_back = jax.vjp(train, params)

    def look_ahead(logits):
      (grads,) = pull_back(loss_weighting.softmax(logits, present))
      return _bilevel.descend(params, grads, learning_rate)

    moved, pull_logits = jax.vjp(look_ahead, logits)
    losses, pull_valid = jax.vjp(valid, moved)
    # One validation gradient at a time, so that they are never stacked.
    hypergradients = jax.lax.map(
      lambda task: pull_logits(pull_valid(task)[0])[0],
      jnp.eye(size, dtype=dtype),
    )
    hypergradients = jnp.where(present[:, None], hypergradients, 0)
    found = common_descent(hypergradients, losses, present)
    gradient = found.weights @ hypergradients
    terms = found.weights @ jnp.max(jnp.abs(hypergradients), axis=1)
    there = jnp.max(jnp.abs(gradient)) > _RESOLUTION * terms
    # A non-finite gradient stays non-finite, so that nothing is learnt from it.
    gradient = jnp.where(there | ~jnp.isfinite(terms), gradient, 0)
    logits, opt_state = task_optimizer.step(
      adam, gradient, state.opt_state, logits, present
    )
    weights = loss_weighting.softmax(logits, present)
    return weights, MomlState(
      logits, weights, found.weights, found.residual.astype(dtype), opt_state
    )

  def common_descent(rows, losses, present):
    # Their common scale does not matter, and their squares could leave float32.
    largest = jnp.max(jnp.abs(rows))
    rows = rows / jnp.where(largest > 0, largest, 1)
    divisors = jnp.ones_like(losses)
    if normalization == 'l2':
      divisors = jnp.linalg.norm(rows, axis=1)
    if normalization == 'loss':
      divisors = jnp.abs(losses)
    rows = rows / jnp.where(divisors > 0, divisors, 1)[:, None]
    gram = jnp.matmul(rows, rows.T, precision=jax.lax.Precision.HIGHEST)
    found = simplex.min_norm(gram, present)
    return found._replace(weights=jnp.where(present, found.weights, 0))

  return bilevel_weighting.BilevelWeighting(init, update)
