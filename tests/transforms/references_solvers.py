"""Methods with a convex problem inside, in float64 NumPy; see `references`.

None of them knows the Gram matrix or the solvers of `mtl_jax.transforms`.
"""

import numpy as np
from scipy import optimize


def on_dual_cone(J, x):
  """The direction nearest to x that conflicts with no row of J.

  What is missing is the projection of -x on the cone of the rows (Moreau), by
  SciPy's active-set method (Lawson and Hanson). Lengths of the rows do not
  matter to a cone.
  """
  J, x = np.asarray(J, np.float64), np.asarray(x, np.float64)
  J = J[np.linalg.norm(J, axis=1) > 0]
  size = np.linalg.norm(x)
  if size == 0 or not len(J):
    return x
  units = J / np.linalg.norm(J, axis=1, keepdims=True)
  z, _ = optimize.nnls(units.T, -x / size, maxiter=100 * len(J))
  return x + size * (z @ units)


def upgrad(J, losses, preference=None):
  """Quinton and Rey 2024, eq. 3 and 5."""
  del losses
  p = np.full(len(J), 1 / len(J)) if preference is None else preference
  return sum(pi * on_dual_cone(J, g) for pi, g in zip(p, J, strict=True))[None]


def dualproj(J, losses, preference=None):
  """Lopez-Paz and Ranzato 2017, eq. 11, for the mean."""
  del losses
  p = np.full(len(J), 1 / len(J)) if preference is None else preference
  return on_dual_cone(J, np.asarray(p) @ J)[None]


def with_preference(reference):
  """The reference of a method with one preference a task."""

  def stepwise(J, losses, *, preference, **unused):
    del unused
    return reference(J, losses, preference), None

  return stepwise


def fair_weights(J, alpha, scale):
  """Weights a with G a = a^(-1/alpha), for G or for G over its norm.

  They minimise a convex function: one weight after the other, each by the root
  of its own condition, and then all of them by Newton's method. Raises unless
  that gets there.
  """
  J = np.asarray(J, np.float64)
  there = np.linalg.norm(J, axis=1) > 0
  weights = np.zeros(len(J))
  J = J[there]
  G = J @ J.T
  if scale == 'norm':
    G = G / np.linalg.norm(G)
  s = 1 / alpha
  a = np.diag(G) ** (-1 / (1 + s))
  for _ in range(300):
    for i in range(len(a)):
      others = G[i] @ a - G[i, i] * a[i]
      a[i] = np.exp(
        optimize.brentq(
          lambda x, i=i, others=others: (
            G[i, i] * np.exp(x) + others - np.exp(-s * x)
          ),
          -90,
          90,
        )
      )
  for _ in range(10):
    slopes = G + np.diag(s * a ** (-s - 1))
    a = a - np.linalg.solve(slopes, G @ a - a**-s)
  if not np.abs(a**s * (G @ a) - 1).max() < 1e-9:
    raise RuntimeError(f'no fair weights found, only {a}')
  weights[there] = a
  return weights


def fairgrad(alpha, scale='norm'):
  """Ban and Ji 2024, Algorithm 1; Navon et al. 2022, Claim 3.1 for alpha 1."""
  return lambda J, losses: (fair_weights(J, alpha, scale) @ J)[None]
