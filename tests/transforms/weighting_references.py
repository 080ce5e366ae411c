"""The loss weightings in float64 NumPy, step by step, from their papers.

Every reference is made for a number of tasks that are always there, and has
`update(losses) -> weights` and `after_step(new_losses)`.
"""

import numpy as np


class Reference:
  """Weights that are a function of the losses alone.

  Args:
    weights: `losses [T] -> weights [T]`.
  """

  def __init__(self, weights=None):
    self.weights = weights

  def update(self, losses):
    return self.weights(losses)

  def after_step(self, new_losses):
    pass


class Adam:
  """Kingma and Ba 2015, Algorithm 1."""

  def __init__(self, size, rate):
    self.first, self.second = np.zeros(size), np.zeros(size)
    self.rate, self.steps = rate, 0

  def step(self, x, gradient):
    self.steps += 1
    self.first = 0.9 * self.first + 0.1 * gradient
    self.second = 0.999 * self.second + 0.001 * gradient**2
    first = self.first / (1 - 0.9**self.steps)
    second = self.second / (1 - 0.999**self.steps)
    return x - self.rate * first / (np.sqrt(second) + 1e-8)


class Uncertainty(Reference):
  """Kendall et al. 2018, eq. 7 and 10, in sigma^2 = exp(s)."""

  def __init__(self, size, factors, log1p=False, rate=0.1, initial=0.0):
    self.s = np.full(size, initial)
    self.factors, self.log1p = np.asarray(factors), log1p
    self.adam = Adam(size, rate)

  def update(self, losses):
    variances = np.exp(self.s)
    weights = self.factors / variances
    # The derivatives in s of factor L / variance, and of log sigma or
    # log(1 + variance).
    of_regularizer = variances / (1 + variances) if self.log1p else 0.5
    self.s = self.adam.step(self.s, of_regularizer - weights * losses)
    return weights


class ImtlL(Reference):
  """Liu et al. 2021: e^s L - s."""

  def __init__(self, size, rate=0.1):
    self.s = np.zeros(size)
    self.adam = Adam(size, rate)

  def update(self, losses):
    weights = np.exp(self.s)
    self.s = self.adam.step(self.s, weights * losses - 1)
    return weights


def softmax(x):
  return np.exp(x) / np.exp(x).sum()


class Dwa(Reference):
  """Liu et al. 2019, eq. 7, with all losses of all epochs kept."""

  def __init__(self, size, steps_per_epoch, temperature):
    self.size, self.temperature = size, temperature
    self.steps_per_epoch, self.losses = steps_per_epoch, []

  def update(self, losses):
    epoch = len(self.losses) // self.steps_per_epoch
    rates = np.ones(self.size)
    if epoch >= 2:
      first = (epoch - 2) * self.steps_per_epoch
      kept = np.stack(self.losses[first : first + 2 * self.steps_per_epoch])
      before, last = kept.reshape(2, self.steps_per_epoch, -1).mean(axis=1)
      rates = last / before
    self.losses.append(losses)
    return self.size * softmax(rates / self.temperature)


class Dtp(Reference):
  """Guo et al. 2018, with exp(-L) for the indicator."""

  def __init__(self, gamma, alpha):
    self.gamma, self.alpha, self.average = np.asarray(gamma), alpha, None

  def update(self, losses):
    now = np.exp(-losses)
    if self.average is None:
      self.average = now
    self.average = self.alpha * now + (1 - self.alpha) * self.average
    return -((1 - self.average) ** self.gamma) * np.log(self.average)


class Famo(Reference):
  """Liu et al. 2023, Algorithm 2."""

  def __init__(self, size, gamma, rate=0.025, bounds=0.0):
    self.logits, self.gamma = np.zeros(size), gamma
    self.adam, self.bounds = Adam(size, rate), bounds
    self.losses = None

  def update(self, losses):
    self.losses = losses
    shares = softmax(self.logits) / (losses - self.bounds)
    return shares / shares.sum()

  def after_step(self, new_losses):
    gain = np.log(self.losses - self.bounds) - np.log(new_losses - self.bounds)
    z = softmax(self.logits)
    jacobian = np.diag(z) - np.outer(z, z)
    gradient = jacobian.T @ gain + self.gamma * self.logits
    self.logits = self.adam.step(self.logits, gradient)


def stch(mu, preference=None, ideal=0.0):
  """Lin et al. 2024, the derivative of their eq. 6."""

  def weights(losses):
    size = len(losses)
    preferred = np.full(size, 1 / size)
    if preference is not None:
      preferred = np.asarray(preference)
    return preferred * softmax(preferred * (losses - ideal) / mu)

  return Reference(weights)


class LogStch(Reference):
  """The code of Lin et al. 2024 for multi-task learning.

  In it T mu log sum_i (L_i / n_i)^(1 / mu) has the derivative
  T (L_i / n_i)^(1 / mu) / L_i / sum_j (L_j / n_j)^(1 / mu).
  """

  def __init__(self, mu, warm_up, window, nadir=None):
    self.mu, self.nadir = mu, nadir
    self.warm_up, self.window, self.losses = warm_up, window, []

  def update(self, losses):
    self.losses.append(losses)
    if len(self.losses) <= self.warm_up:
      return 1 / losses
    nadir = self.nadir
    if nadir is None:
      first = self.warm_up - self.window
      nadir = np.mean(self.losses[first : self.warm_up], axis=0)
    powers = (losses / nadir) ** (1 / self.mu)
    return len(losses) * powers / losses / powers.sum()


def cosmos(lam, preference=None):
  """Ruchte and Grabocka 2021, eq. 5, differentiated."""

  def weights(losses):
    size = len(losses)
    r = np.full(size, 1 / size)
    if preference is not None:
      r = np.asarray(preference)
    length = np.linalg.norm(losses)
    of_cosine = r / length - (r @ losses) * losses / length**3
    return r - lam * of_cosine / np.linalg.norm(r)

  return Reference(weights)


def pbi(theta, preference=None, ideal=0.0):
  """Zhang and Li 2007, section 3.C, differentiated."""

  def weights(losses):
    r = np.ones(len(losses)) if preference is None else np.asarray(preference)
    unit = r / np.linalg.norm(r)
    above = losses - ideal
    off = above - (above @ unit) * unit
    if np.linalg.norm(off) < 1e-12:
      return unit
    return unit + theta * off / np.linalg.norm(off)

  return Reference(weights)
