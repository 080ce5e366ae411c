"""Geometric methods in float64 NumPy; see `references`.

None of them knows the Gram matrix or the solvers of `mtl_jax.transforms`.
"""

import jax
import numpy as np
import references
from scipy import stats


def _directions(J):
  """Unit rows, and which rows have a direction."""
  lengths = np.linalg.norm(J, axis=1)
  there = lengths > 0
  return J / np.where(there, lengths, 1)[:, None], there


def aligned_mtl(scale):
  """Senushkin et al. 2023, Algorithm 1: singular values made equal."""

  def reference(J, losses, preference=None):
    del losses
    p = np.full(len(J), 1 / len(J)) if preference is None else preference
    U, singular, V = np.linalg.svd(J, full_matrices=False)
    rank = np.sum(singular > 1e-12 * singular[0])
    U, singular, V = U[:, :rank], singular[:rank], V[:rank]
    common = {
      'min': singular[-1],
      'median': np.sort(singular)[(rank - 1) // 2],
      'rmse': np.sqrt(np.mean(singular**2)),
    }[scale]
    return (common * np.asarray(p) @ U @ V)[None]

  return reference


def con_fig(J, losses, preference=None):
  """Liu et al. 2024, eq. 2 to 4."""
  del losses
  units, there = _directions(J)
  p = np.ones(len(J)) if preference is None else np.asarray(preference)
  u = np.linalg.pinv(units) @ (p * there)
  u = u / np.linalg.norm(u)
  return (np.sum(J @ u) * u)[None]


def with_preference(reference):
  """The reference of a method with one preference a task."""

  def stepwise(J, losses, *, preference, **unused):
    del unused
    return reference(J, losses, np.asarray(preference)), None

  return stepwise


def conic_direction(J, angle):
  """max_d min_i <g_i, d> with |d| <= |g_0|, <g_0, d> >= cos(angle) |g_0|^2.

  Bisection over the worst gain t: the shortest d that gives each task t (and
  the mean enough) must not be longer than the mean.
  """
  mean = J.mean(axis=0)
  size = np.linalg.norm(mean)
  units, there = _directions(J)
  lengths = np.linalg.norm(J[there], axis=1)
  rows = np.concatenate([units[there], mean[None] / size])
  low, high = -lengths.max() * size, lengths.min() * size
  best = np.cos(np.deg2rad(angle)) * mean
  for _ in range(200):
    middle = (low + high) / 2
    margins = np.append(middle / lengths, np.cos(np.deg2rad(angle)) * size)
    # In units of |g_0|; a tolerance of the solver is relative to that.
    d = references._shortest_with_margins(rows, margins / size)
    if d is not None and np.linalg.norm(d) <= 1:
      low, best = middle, d * size
    else:
      high = middle
  return best * size / np.linalg.norm(best)


def conicgrad(angle):
  """Hassanpour et al. 2025, with the length bounded in the search."""
  return lambda J, losses: conic_direction(J, angle)[None]


def orders(key, size, dimensions):
  """A random order of all tasks for each task, [T, T]."""
  del dimensions
  keys = jax.random.split(key, size)
  return jax.vmap(lambda k: jax.random.permutation(k, size))(keys)


def gradvac(beta):
  """Wang et al. 2021, Algorithm 1, on the gradients themselves."""

  def reference(J, losses, *, memory, draw, extra):
    del losses, extra
    size = len(J)
    target = np.zeros((size, size)) if memory is None else memory.copy()
    total = np.zeros(J.shape[1])
    for i in range(size):
      p = J[i].copy()
      for j in draw[i]:
        lengths = np.linalg.norm(p), np.linalg.norm(J[j])
        if i == j or min(lengths) == 0:
          continue
        phi, wanted = p @ J[j] / lengths[0] / lengths[1], target[i, j]
        if phi < wanted:
          sines = np.sqrt(1 - phi**2), np.sqrt(1 - wanted**2)
          factor = wanted * sines[0] - phi * sines[1]
          p = p + lengths[0] * factor / (lengths[1] * sines[1]) * J[j]
        target[i, j] = (1 - beta) * wanted + beta * phi
      total += p
    return total[None], target

  return reference


def uniform(key, size, dimensions):
  """What GradDrop draws for the first leaf, [D]."""
  del size
  return jax.random.uniform(jax.random.fold_in(key, 0), (dimensions,))


def graddrop(leak):
  """Chen et al. 2020, Algorithm 1, lines 10 to 15."""

  def reference(J, losses, *, memory, draw, extra, **per_task):
    del losses, memory, extra
    kept = np.asarray(per_task.get('leak', [leak] * len(J)))[:, None]
    magnitude = np.abs(J).sum(axis=0)
    purity = (1 + J.sum(axis=0) / np.where(magnitude > 0, magnitude, 1)) / 2
    mask = np.where(purity > draw, J > 0, J < 0)
    return ((kept + (1 - kept) * mask) * J).sum(axis=0)[None], None

  return reference


def krum(num_byzantine, num_selected):
  """Blanchard et al. 2017; rows closest to others, by their distances."""

  def reference(J, losses):
    del losses
    near = len(J) - num_byzantine - 2
    if len(J) < max(2 * num_byzantine + 3, num_selected):
      return J.mean(axis=0)[None]
    squares = ((J[:, None] - J[None]) ** 2).sum(axis=2)
    # The first of them is the row's own.
    scores = np.sort(squares, axis=1)[:, 1 : near + 1].sum(axis=1)
    return J[np.argsort(scores)[:num_selected]].mean(axis=0)[None]

  return reference


def trimmed_mean(trim):
  """Yin et al. 2018, definition 2, by SciPy."""

  def reference(J, losses):
    del losses
    if len(J) <= 2 * trim:
      return J.mean(axis=0)[None]
    # SciPy takes a share and rounds it down.
    share = (trim + 0.5) / len(J)
    return stats.trim_mean(J, share if trim else 0.0, axis=0)[None]

  return reference


def normal(key, size, dimensions):
  """A standard normal draw a task, [T]."""
  del dimensions
  keys = [jax.random.fold_in(key, i) for i in range(size)]
  return np.stack([jax.random.normal(k) for k in keys])


def random_weights(J, losses, *, memory, draw, extra):
  """Lin et al. 2022, with the distribution N(0, 1)."""
  del losses, memory, extra
  weights = np.exp(np.asarray(draw, np.float64))
  return (weights / weights.sum() @ J)[None], None
