"""The methods in float64 NumPy, from their papers and for small matrices.

Every reference maps task gradients J [T, D] and losses [T] to all updates that
are right: one row for a deterministic method, one for each outcome of a random
one. None of them knows the Gram matrix or the solvers of `mtl_jax.transforms`.
"""

import itertools

import numpy as np
from scipy import optimize


def least_norm_weights(J):
  """Weights of the least-norm point in the convex hull of the rows of J.

  Minimises |u J|^2 + (1 - sum u)^2 over u >= 0. For weights w and u = s w that
  is s^2 |w J|^2 + (1 - s)^2, whose minimiser over w is the least-norm point
  for every s. The solver is SciPy's active-set method (Lawson and Hanson).
  """
  J = np.asarray(J, np.float64)
  scale = np.linalg.norm(J, axis=1).min() or 1.0
  rows = np.concatenate([J / scale, np.ones((len(J), 1))], axis=1)
  target = np.append(np.zeros(J.shape[1]), 1.0)
  u, _ = optimize.nnls(rows.T, target, maxiter=1000)
  return u / u.sum()


def mgda(normalization):
  """Sener and Koltun 2018: weights of normalised, sum of raw gradients."""

  def reference(J, losses):
    divisors = np.ones(len(J))
    if normalization in ('l2', 'loss+'):
      lengths = np.linalg.norm(J, axis=1)
      divisors = divisors * np.where(lengths > 0, lengths, 1)
    if normalization in ('loss', 'loss+'):
      divisors = divisors * losses
    return (least_norm_weights(J / divisors[:, None]) @ J)[None]

  return reference


def pcgrad(reduction):
  """Yu et al. 2020, Algorithm 1, over all orders of projection."""

  def reference(J, losses):
    del losses
    size = len(J)
    tasks = range(size)
    # Tasks in parts of the space that are orthogonal to each other never meet,
    # which keeps the number of orders small where a test wants many tasks.
    meets = (J @ J.T != 0) | np.eye(size, dtype=bool)
    for _ in tasks:
      meets = (meets.astype(float) @ meets) > 0
    projected = []
    for i in tasks:
      others = [j for j in tasks if j != i and meets[i, j]]
      ends = []
      for order in itertools.permutations(others):
        p = J[i].copy()
        for j in order:
          inner = p @ J[j]
          if inner < 0 and J[j] @ J[j] > 0:
            p = p - inner / (J[j] @ J[j]) * J[j]
        ends.append(p)
      projected.append(ends)
    sums = np.stack([sum(ps) for ps in itertools.product(*projected)])
    return sums / size if reduction == 'mean' else sums

  return reference


def _shortest_with_margins(A, margins):
  """Shortest x with A x >= margins, None if there is none.

  Least-distance programming by non-negative least squares: Lawson and Hanson,
  Solving Least Squares Problems, 1974, chapter 23.4.
  """
  E = np.concatenate([A.T, margins[None]])
  target = np.append(np.zeros(A.shape[1]), 1.0)
  y, distance = optimize.nnls(E, target, maxiter=1000)
  if distance < 1e-9:
    return None
  residual = E @ y - target
  return -residual[:-1] / residual[-1]


def conflict_averse_direction(J, c):
  """Liu et al. 2021, eq. 1 (the primal): max_d min_i <g_i, d> in the ball.

  With d = g_0 + c |g_0| u the worst task gains at least t where |u| <= 1 and
  <g_i, u> >= (t - <g_i, g_0>) / (c |g_0|). The largest such t by bisection. A
  task without gradient gains nothing whatever d is, and does not choose it.
  """
  J = np.asarray(J, np.float64)
  mean = J.mean(axis=0)
  radius = c * np.linalg.norm(mean)
  J = J[np.linalg.norm(J, axis=1) > 0]
  if radius == 0 or not len(J):
    return mean
  lengths = np.linalg.norm(J, axis=1)
  gains = J @ mean
  low, high = gains.min(), (gains + radius * lengths).max()
  best = np.zeros_like(mean)
  for _ in range(200):
    middle = (low + high) / 2
    u = _shortest_with_margins(
      J / lengths[:, None], (middle - gains) / (radius * lengths)
    )
    if u is not None and np.linalg.norm(u) <= 1:
      low, best = middle, u
    else:
      high = middle
  return mean + radius * best


def cagrad(c, divisor=1.0):
  """Liu et al. 2021, with what the authors' code divides the update by."""
  return lambda J, losses: conflict_averse_direction(J, c)[None] / divisor


def imtl_g(J, losses):
  """Liu et al. 2021 (IMTL), closed form for independent gradients.

  With U = [u_1 - u_2, ..., u_1 - u_T] and D = [g_1 - g_2, ..., g_1 - g_T] the
  weights of tasks 2 to T are g_1 U' (D U')^-1.
  """
  del losses
  J = J[np.linalg.norm(J, axis=1) > 0]
  units = J / np.linalg.norm(J, axis=1, keepdims=True)
  U, D = units[:1] - units[1:], J[:1] - J[1:]
  others = J[0] @ U.T @ np.linalg.inv(D @ U.T)
  weights = np.append(1 - others.sum(), others)
  return (weights @ J)[None]


def linear(J, losses):
  """The mean."""
  del losses
  return J.mean(axis=0)[None]


def weighted(weights):
  """A weighted sum."""
  return lambda J, losses: (weights @ J)[None]
