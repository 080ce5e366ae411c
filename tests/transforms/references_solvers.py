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

  By Newton's method with trust regions on the logarithms of the weights, from
  what they are for perpendicular gradients. Raises unless it gets there.
  """
  J = np.asarray(J, np.float64)
  there = np.linalg.norm(J, axis=1) > 0
  weights = np.zeros(len(J))
  J = J[there]
  G = J @ J.T
  if scale == 'norm':
    G = G / np.linalg.norm(G)
  s = 1 / alpha
  start = -np.log(np.diag(G)) / (1 + s)

  def conditions(x):
    a = np.exp(x)
    return a**s * (G @ a) - 1

  def slopes(x):
    a = np.exp(x)
    return a[:, None] ** s * G * a + np.diag(s * a**s * (G @ a))

  # Not quite so unlike at first: the way there is shorter.
  for x in (start, np.full(len(J), start.mean())):
    found = optimize.least_squares(
      conditions, x, slopes, xtol=1e-15, ftol=1e-15, gtol=1e-15, max_nfev=5000
    )
    if np.abs(found.fun).max() < 1e-9:
      weights[there] = np.exp(found.x)
      return weights
  raise RuntimeError(f'no fair weights found, only {found.fun}')


def fairgrad(alpha, scale='norm'):
  """Ban and Ji 2024, Algorithm 1; Navon et al. 2022, Claim 3.1 for alpha 1."""
  return lambda J, losses: (fair_weights(J, alpha, scale) @ J)[None]
