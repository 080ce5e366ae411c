"""Stochastic and stateful methods in float64 NumPy, step by step.

Every reference is `(J [T, D], losses [T], *, memory, draw, extra) ->
([1, D], memory)`, with memory None at the first step. See `references`.
"""

import numpy as np
import references


def on_simplex(v):
  """The nearest point of the simplex: max(v - t, 0) with the sum 1.

  The sum falls in t, from at least 1 to 0 over the interval that is halved.
  """
  low, high = v.max() - 1, v.max()
  for _ in range(200):
    t = (low + high) / 2
    if np.maximum(v - t, 0).sum() >= 1:
      low = t
    else:
      high = t
  w = np.maximum(v - (low + high) / 2, 0)
  return w / w.sum()


def in_mean_lengths(inner):
  """Inner products over the squared mean root of their diagonal."""
  mean = np.sqrt(np.maximum(np.diag(inner), 0)).mean()
  return inner / mean**2 if mean > 0 else 0 * inner


def sdmgrad(
  *,
  lambda_=0.3,
  batch='independent',
  steps=20,
  learning_rate=0.3,
  momentum=0.5,
  divisor=1.0,
  relative=True,
):
  """Xiao, Ban and Ji 2023, Algorithm 1, with the momentum of their code."""

  def reference(J, losses, *, memory, draw, extra, preference=None):
    del losses, draw
    size = len(J)
    w = np.full(size, 1 / size) if memory is None else memory
    target = np.ones(size) if preference is None else np.asarray(preference)
    target = target / target.sum()
    first, second = extra if batch == 'independent' else (J, J)
    inner = first @ second.T
    if relative:
      inner = in_mean_lengths(inner)
    velocity = np.zeros(size)
    for _ in range(steps):
      slope = inner @ w + lambda_ * inner @ target
      velocity = momentum * velocity + slope
      w = on_simplex(w - learning_rate * velocity)
    update = (w + lambda_ * target) @ J / divisor
    return update[None], w

  return reference


def modo(*, gamma=0.1, rho=0.0, batches='three', relative=True):
  """Chen et al. 2023, Algorithm 1; with two batches the update of both."""

  def reference(J, losses, *, memory, draw, extra):
    del losses, draw
    w = np.full(len(J), 1 / len(J)) if memory is None else memory
    first, second = extra if batches == 'three' else (J, *extra)
    inner = first @ second.T
    if relative:
      inner = in_mean_lengths(inner)
    w = on_simplex(w - gamma * (inner @ w + rho * w))
    update = w @ (J if batches == 'three' else (J + second) / 2)
    return update[None], w

  return reference


def moco(
  *,
  beta=0.5,
  beta_decay=0.5,
  gamma=0.1,
  gamma_decay=0.5,
  rho=0.0,
  relative=True,
):
  """Fernando et al. 2023, Algorithm 1, from the first gradients on."""

  def reference(J, losses, *, memory, draw, extra):
    del losses, draw, extra
    if memory is None:
      k, w, Y = 1, np.full(len(J), 1 / len(J)), J
    else:
      k, w, Y = memory
      k = k + 1
      Y = Y - beta / k**beta_decay * (Y - J)
    inner = in_mean_lengths(Y @ Y.T) if relative else Y @ Y.T
    w = on_simplex(w - gamma / k**gamma_decay * (inner @ w + rho * w))
    return (w @ Y)[None], (k, w, Y)

  return reference


def db_mtl(*, beta=0.9, beta_decay=0.0):
  """Lin et al. 2023, Algorithm 1, from the first gradients on."""

  def reference(J, losses, *, memory, draw, extra):
    del draw, extra
    log_gradients = J / losses[:, None]
    if memory is None:
      k, Y = 1, log_gradients
    else:
      k, Y = memory[0] + 1, memory[1]
      share = beta / k**beta_decay
      Y = share * Y + (1 - share) * log_gradients
    lengths = np.linalg.norm(Y, axis=1, keepdims=True)
    directions = Y / np.where(lengths > 0, lengths, 1)
    return (lengths.max() * directions.sum(axis=0))[None], (k, Y)

  return reference


def gradnorm(*, alpha=1.5, learning_rate=0.025, relative=True):
  """Chen et al. 2018, Algorithm 1: w(t) moves the parameters, then itself."""

  def reference(J, losses, *, memory, draw, extra):
    del draw, extra
    w, first = (np.ones(len(J)), losses) if memory is None else memory
    update = w @ J
    lengths = np.linalg.norm(J, axis=1)
    norms = w * lengths
    progress = losses / first
    target = norms.mean() * (progress / progress.mean()) ** alpha
    # A tie in exact arithmetic may be none in float64.
    tie = np.abs(norms - target) < 1e-12 * target
    slope = np.where(tie, 0, np.sign(norms - target)) * lengths
    if relative and lengths.any():
      slope = slope / lengths.mean()
    w = np.maximum(w - learning_rate * slope, 0)
    return update[None], (w * len(w) / w.sum(), first)

  return reference


def excess_mtl(*, step_size=0.01, warmup=1):
  """He et al. 2024, eq. 6, 7 and 9, without what the code adds to S."""

  def reference(J, losses, *, memory, draw, extra):
    del losses, draw, extra
    if memory is None:
      memory = [], np.zeros_like(J), np.full(len(J), 1 / len(J))
    first, S, w = memory
    S = S + J**2
    with np.errstate(invalid='ignore'):
      risk = np.nansum(J**2 / np.sqrt(S), axis=1)
    if len(first) < warmup:
      first = [*first, risk]
    else:
      w = w * np.exp(step_size * risk / np.mean(first, axis=0))
      w = w / w.sum()
    return (w @ J)[None], (first, S, w)

  return reference


def cr_mogm(decay=0.9, weights=references.least_norm_weights):
  """Zhou et al. 2022, Algorithm 2, from the first weights on."""

  def reference(J, losses, *, memory, draw, extra):
    del losses, draw, extra
    new = weights(J)
    w = new if memory is None else decay * memory + (1 - decay) * new
    return (w @ J)[None], w

  return reference
