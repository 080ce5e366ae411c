"""Random weights."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtl_jax.transforms.contract import arguments
from mtl_jax.transforms.contract import lifting
from mtl_jax.transforms.contract import loss_weighting

_DISTRIBUTIONS = (
  'normal',
  'uniform',
  'dirichlet',
  'bernoulli',
  'constrained_bernoulli',
  'random_normal',
)


class RlwState(NamedTuple):
  """State of `rlw`.

  Attributes:
    key: the key the next update draws from.
    means: [T], of the normal distributions; None except for `'random_normal'`.
    deviations: [T], of the same distributions.
  """

  key: jax.Array
  means: jax.Array | None
  deviations: jax.Array | None


def _some(key: jax.Array, active: jax.Array) -> jax.Array:
  """A random set of tasks, with equal odds for each non-empty one; bool [T]."""
  first_key, rest_key = jax.random.split(key)
  # Among n coins that do not all fail, the k-th is the first to succeed with a
  # probability proportional to 2^-k; the later ones are free.
  rank = jnp.cumsum(active)
  logits = jnp.where(active, -rank * jnp.log(2.0), -jnp.inf)
  first = jax.random.categorical(first_key, logits)
  later = rank > rank[first]
  free = jax.random.bernoulli(rest_key, 0.5, active.shape)
  return (jnp.arange(active.size) == first) | (later & free)


def rlw(
  distribution: str = 'normal', *, seed: int | jax.Array = 0
) -> loss_weighting.LossWeighting:
  r"""Random loss weighting (RLW).

  .. math:: w = f(\xi), \qquad \xi \sim p

  drawn at every update. With :math:`f` the softmax, :math:`\xi_i` is standard
  normal (`'normal'`), uniform on [0, 1] (`'uniform'`) or normal with a mean and
  deviation that are drawn from [0, 1] at `init` (`'random_normal'`).
  `'dirichlet'` is the uniform distribution on the simplex, `'bernoulli'` gives
  an equal share to each task in a random non-empty set, and
  `'constrained_bernoulli'` gives all to one random task.

  Scale: weights on the simplex, `equal_weights` in the mean (except for
  `'random_normal'`). Absent tasks take no share, and the others have the
  distribution for their number.

  Args:
    distribution: one of the names above.
    seed: an int or a key, copied into the state by `init`.

  Returns:
    A `LossWeighting` with a `RlwState`.

  Raises:
    ValueError: for another distribution.
    TypeError: for a seed that is neither an integer nor a key.

  Examples:
    >>> import jax.numpy as jnp, mtl_jax
    >>> weighting = mtl_jax.rlw('constrained_bernoulli')
    >>> losses, state = jnp.array([1.0, 2.0]), weighting.init(2)
    >>> weights, state = weighting.update(losses, state)
    >>> print(jnp.sort(weights))
    [0. 1.]

  References:
    Lin et al., `Reasonable Effectiveness of Random Weighting: A Litmus Test for
    Multi-Task Learning <https://arxiv.org/abs/2111.10603>`_, 2022, Algorithm 2
  """
  arguments.one_of('distribution', distribution, _DISTRIBUTIONS)
  arguments.check_seed(seed)

  def init(num_tasks):
    key = lifting.own_key(seed)
    if distribution != 'random_normal':
      return RlwState(key, None, None)
    key, means_key, deviations_key = jax.random.split(key, 3)
    return RlwState(
      key,
      jax.random.uniform(means_key, num_tasks),
      jax.random.uniform(deviations_key, num_tasks),
    )

  def draw(key, state, active):
    if distribution == 'bernoulli':
      return _some(key, active).astype(jnp.result_type(float))
    if distribution == 'constrained_bernoulli':
      logits = jnp.where(active, 0.0, -jnp.inf)
      return jax.nn.one_hot(jax.random.categorical(key, logits), active.size)
    if distribution == 'dirichlet':
      return jax.random.exponential(key, active.shape)
    if distribution == 'uniform':
      return loss_weighting.softmax(
        jax.random.uniform(key, active.shape), active
      )
    normal = jax.random.normal(key, active.shape)
    if distribution == 'random_normal':
      normal = state.means + state.deviations * normal
    return loss_weighting.softmax(normal, active)

  def update(losses, state, active):
    del losses
    key, now = jax.random.split(state.key)
    drawn = jnp.where(active, draw(now, state, active), 0)
    total = jnp.sum(drawn)
    weights = drawn / jnp.where(total > 0, total, 1)
    return weights, state._replace(key=key)

  return loss_weighting.loss_weighting(init, update)
