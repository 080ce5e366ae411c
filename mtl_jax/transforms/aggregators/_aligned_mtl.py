"""Independent component alignment."""

from collections.abc import Hashable
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mtl_jax.transforms.contract import aggregation
from mtl_jax.transforms.contract import arguments
from mtl_jax.transforms.contract import gram_based
from mtl_jax.transforms.solvers import simplex

_SCALES = ('min', 'median', 'rmse')
# Eigenvalues of the matrix of cosines below this, times the number of tasks,
# are rounding of linearly dependent gradients.
_RANK_TOLERANCE = 1e-5
# Rotations converge quadratically: 80 gradients are orthogonal up to rounding
# after seven sweeps, for any lengths.
_SWEEPS = 8


def _lengths(rows: jax.Array) -> jax.Array:
  """Lengths [T] of rows [T, N], whose squares may leave float32."""
  largest = jnp.max(jnp.abs(rows), axis=1)
  safe = jnp.where(largest > 0, largest, 1)
  squares = jnp.sum((rows / safe[:, None]) ** 2, axis=1)
  # The root at a row of zeros has no derivative, and 0 times NaN is NaN.
  return largest * jnp.sqrt(jnp.where(largest > 0, squares, 1))


def _rotation(p: jax.Array, q: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Cosines and sines [M] that make rows p and q [M, N] orthogonal."""
  length_p, length_q = _lengths(p), _lengths(q)
  needed = (length_p > 0) & (length_q > 0)
  length_p = jnp.where(needed, length_p, 1)
  length_q = jnp.where(needed, length_q, 1)
  cosine = jnp.sum((p / length_p[:, None]) * (q / length_q[:, None]), axis=1)
  needed = needed & (cosine != 0)
  # Quotients of lengths, never their squares.
  difference = length_q / length_p - length_p / length_q
  cotangent = difference / (2 * jnp.where(needed, cosine, 1))
  tangent = 1 / (jnp.abs(cotangent) + jnp.hypot(cotangent, 1))
  tangent = jnp.where(cotangent < 0, -tangent, tangent)
  tangent = jnp.where(needed, tangent, 0)
  cos = jax.lax.rsqrt(1 + tangent * tangent)
  return cos, tangent * cos


def _rounds(size: int) -> np.ndarray:
  """A round-robin tournament of an even number: [size - 1, 2, size / 2]."""
  rounds = []
  for shift in range(size - 1):
    ring = [0, *np.roll(np.arange(1, size), shift)]
    rounds.append([ring[: size // 2], ring[: size // 2 - 1 : -1]])
  return np.array(rounds)


def _principal_axes(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
  r"""Singular values and left singular vectors by one-sided Jacobi rotations.

  Rotations of pairs of rows until all rows are orthogonal (Hestenes 1958). For
  rows of very different lengths, whose directions are well apart, even the
  smallest singular values have all their digits (Demmel and Veselic, Jacobi's
  method is more accurate than QR, 1992). A decomposition of the Gram matrix
  loses them in the rounding of its largest entries.

  Args:
    rows: [T, N].

  Returns:
    singular values [S] in no order, and their vectors as rows, [S, T]. S is T
    for even T, otherwise T + 1 with an additional zero.
  """
  size = rows.shape[0]
  even = size + size % 2
  rows = jnp.zeros((even, rows.shape[1]), rows.dtype).at[:size].set(rows)
  vectors = jnp.eye(even, size, dtype=rows.dtype)

  def one_round(both, pairs):
    rows, vectors = both
    first, second = pairs
    cos, sin = _rotation(rows[first], rows[second])
    cos, sin = cos[:, None], sin[:, None]

    def rotate(x):
      p, q = x[first], x[second]
      x = x.at[first].set(cos * p - sin * q)
      return x.at[second].set(sin * p + cos * q)

    return (rotate(rows), rotate(vectors)), None

  schedule = np.tile(_rounds(even), (_SWEEPS, 1, 1))
  (rows, vectors), _ = jax.lax.scan(one_round, (rows, vectors), schedule)
  return _lengths(rows), vectors


def aligned_mtl(
  scale: str = 'min',
  *,
  preference: Sequence[float] | None = None,
  num_tasks: int | None = None,
  axis_name: Hashable | None = None,
  reduce: str = 'mean',
  shard_axis: Hashable | None = None,
) -> aggregation.Aggregator:
  r"""Independent component alignment (Aligned-MTL).

  The principal axes of the task gradients get one common length, so that the
  linear system of gradients has the condition number one. They are then
  averaged. With the singular values :math:`\sigma_k` of the matrix of task
  gradients and :math:`G = \sum_k \sigma_k^2 v_k v_k^\top`

  .. math::
    d = \sum_i w_i g_i, \qquad
    w = s \sum_{\sigma_k > 0} \frac{1}{\sigma_k} v_k v_k^\top p

  with the preference p and the common length s.

  Scale: the mean of the aligned gradients, or their sum weighted by the
  preference. Degree of homogeneity: 1. Linearly dependent gradients have fewer
  axes than tasks; s is chosen among the existing ones. Tasks with a zero
  gradient stay zero and count in the mean.

  Args:
    scale: the common length s: the smallest singular value, as in the paper
      (`'min'`), the median (of an even number the lower, `'median'`), or the
      root mean square (`'rmse'`), as in the authors' code.
    preference: [T], non-negative and not all zero; None for 1/T each. It is not
      rescaled, so absent tasks do not change the others' preferences.
    num_tasks: T, to have weights and Gram matrix in the state.
    axis_name: see `from_gram`.
    reduce: see `from_gram`.
    shard_axis: see `from_gram`.

  Returns:
    An aggregator.

  Raises:
    ValueError: for another scale, and for a preference that is negative,
      non-finite, all zero or of another length than the tasks.

  Examples:
    >>> import jax.numpy as jnp, mtl_jax
    >>> task_grads = jnp.array([[0.0, 2.0], [6.0, 0.0]])
    >>> tx = mtl_jax.aligned_mtl()
    >>> print(tx.update(task_grads, tx.init(jnp.zeros(2)))[0])
    [1. 1.]

  References:
    Senushkin et al., `Independent Component Alignment for Multi-Task Learning
    <https://arxiv.org/abs/2305.19000>`_, 2023, Algorithm 1
  """
  arguments.one_of('scale', scale, _SCALES)
  preference = arguments.as_preference(preference, num_tasks)

  def weights_fn(gram, *, losses, active):
    del losses
    lengths, cos, usable = simplex.cosines(gram, active)
    longest = jnp.max(jnp.where(usable, lengths, 0))
    relative = jnp.where(
      usable, lengths / jnp.where(longest > 0, longest, 1), 0
    )
    # The rank counts directions: a gradient that is shorter by orders of
    # magnitude is still a direction.
    cos = jnp.where(usable[:, None] & usable[None, :], cos, 0)
    values, vectors = jnp.linalg.eigh(cos)
    kept = values > _RANK_TOLERANCE * gram.shape[0]
    roots = jnp.where(kept, jnp.sqrt(jnp.where(kept, values, 1)), 0)
    units = vectors * roots[None, :]
    singular, axes = _principal_axes(relative[:, None] * units)
    descending = jnp.argsort(-singular)
    singular, axes = singular[descending], axes[descending]
    rank = jnp.sum(kept)
    there = (jnp.arange(singular.size) < rank) & (singular > 0)
    if scale == 'rmse':
      squares = jnp.sum(jnp.where(there, singular, 0) ** 2)
      common = jnp.sqrt(squares / jnp.maximum(rank, 1))
    else:
      last = rank - 1 if scale == 'min' else rank // 2
      common = singular[jnp.maximum(last, 0)]
    stretch = jnp.where(there, common / jnp.where(there, singular, 1), 0)
    if preference is None:
      wanted = active / jnp.maximum(jnp.sum(active), 1).astype(gram.dtype)
    else:
      arguments.check_length('preference', preference, gram.shape[0])
      wanted = jnp.where(active, jnp.asarray(preference, gram.dtype), 0)
    return (stretch * (axes @ wanted)) @ axes

  return gram_based.from_gram(
    weights_fn,
    num_tasks=num_tasks,
    axis_name=axis_name,
    reduce=reduce,
    shard_axis=shard_axis,
    residual=False,
  )
