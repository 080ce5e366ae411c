"""The table of loss weightings. One row a method and relevant option."""

import jax.numpy as jnp
import numpy as np
import optax
import weighting_references as references
from weighting_row import array
from weighting_row import balanced
from weighting_row import boundary
from weighting_row import BOUNDS
from weighting_row import cosine
from weighting_row import FirstThen
from weighting_row import GAMMAS
from weighting_row import KINDS
from weighting_row import NADIR
from weighting_row import NEVER_PREFERENCES
from weighting_row import NEVER_RATES
from weighting_row import NEVER_WEIGHTS
from weighting_row import of
from weighting_row import params
from weighting_row import Row
from weighting_row import schedule
from weighting_row import Scheduled
from weighting_row import SHARES

import mtl_jax

ROWS = (
  Row(
    name='equal_weights',
    make=lambda tasks: mtl_jax.equal_weights(),
    golden=(0.5, 0.5),
    reference=lambda tasks: references.Reference(
      lambda losses: np.full(len(losses), 1 / len(losses))
    ),
    objective=jnp.mean,
  ),
  Row(
    name='static_weights',
    make=lambda tasks: mtl_jax.static_weights(of(SHARES, tasks)),
    golden=(0.5, 1.5),
    reference=lambda tasks: references.Reference(
      lambda losses: np.array(of(SHARES, tasks))
    ),
    objective=lambda losses: array(SHARES, losses) @ losses,
    factory=mtl_jax.static_weights,
    wrong=NEVER_WEIGHTS,
    symmetric=False,
    independent=True,
  ),
  Row(
    name='scheduled_weights',
    make=lambda tasks: mtl_jax.scheduled_weights(
      [schedule if i % 2 else SHARES[i] for i in tasks]
    ),
    golden=(0.5, 1.0),
    reference=lambda tasks: Scheduled(tasks),
    factory=mtl_jax.scheduled_weights,
    wrong=(
      ('schedules', ()),
      ('schedules', (1.0, -1.0)),
      ('schedules', (1.0, float('nan'))),
    ),
    symmetric=False,
  ),
  Row(
    name='uncertainty',
    make=lambda tasks: mtl_jax.uncertainty(0.1),
    golden=(0.5, 0.5),
    reference=lambda tasks: references.Uncertainty(len(tasks), 0.5),
    objective=lambda losses: jnp.sum(losses) / 2,
    factory=mtl_jax.uncertainty,
    wrong=(
      *NEVER_RATES,
      ('optimizer', optax.adam(0.1)),
      ('likelihood', 'laplace'),
      ('likelihood', ()),
      ('regularizer', 'log2'),
      ('initial', float('nan')),
      ('initial', (0.0, 1.0)),
    ),
    independent=True,
  ),
  Row(
    name='uncertainty_kinds',
    make=lambda tasks: mtl_jax.uncertainty(
      0.1, likelihood=of(KINDS, tasks), regularizer='log1p', initial=-0.5
    ),
    # exp(1/2) / 2 and exp(1/2).
    golden=(0.824361, 1.648721),
    reference=lambda tasks: references.Uncertainty(
      len(tasks),
      [0.5 if KINDS[i] == 'gaussian' else 1.0 for i in tasks],
      log1p=True,
      initial=-0.5,
    ),
    objective=lambda losses: (
      jnp.sum(losses[::2] / (2 * jnp.exp(jnp.asarray(-0.5, losses.dtype))))
      + jnp.sum(losses[1::2] / jnp.exp(jnp.asarray(-0.5, losses.dtype)))
    ),
    symmetric=False,
    independent=True,
  ),
  Row(
    name='imtl_l',
    make=lambda tasks: mtl_jax.imtl_l(0.1),
    golden=(1.0, 1.0),
    reference=lambda tasks: references.ImtlL(len(tasks)),
    objective=jnp.sum,
    factory=mtl_jax.imtl_l,
    wrong=NEVER_RATES,
    independent=True,
  ),
  Row(
    name='dwa',
    make=lambda tasks: mtl_jax.dwa(steps_per_epoch=2, temperature=1.5),
    golden=(1.0, 1.0),
    reference=lambda tasks: references.Dwa(len(tasks), 2, 1.5),
    factory=mtl_jax.dwa,
    arguments={'steps_per_epoch': 2},
    wrong=(
      ('steps_per_epoch', 0),
      ('steps_per_epoch', 1.5),
      ('temperature', 0.0),
      ('temperature', -1.0),
      ('temperature', float('inf')),
    ),
  ),
  Row(
    name='dtp',
    make=lambda tasks: mtl_jax.dtp(1.0, 0.25),
    # (1 - 1/e) 1 and (1 - 1/e^2) 2.
    golden=(0.632121, 1.729329),
    reference=lambda tasks: references.Dtp(1.0, 0.25),
    factory=mtl_jax.dtp,
    wrong=(
      ('gamma', -1.0),
      ('gamma', (1.0, -1.0)),
      ('gamma', float('nan')),
      ('alpha', 0.0),
      ('alpha', 1.5),
      ('kpi', 0.5),
    ),
    independent=True,
  ),
  Row(
    name='dtp_gammas',
    make=lambda tasks: mtl_jax.dtp(of(GAMMAS, tasks), 1.0),
    # sqrt(1 - 1/e) 1 and (1 - 1/e^2) 2.
    golden=(0.795060, 1.729329),
    reference=lambda tasks: references.Dtp(of(GAMMAS, tasks), 1.0),
    symmetric=False,
    independent=True,
  ),
  Row(
    name='rlw',
    make=lambda tasks: mtl_jax.rlw(),
    golden=None,
    reference=None,
    factory=mtl_jax.rlw,
    wrong=(
      ('distribution', 'gumbel'),
      ('seed', 0.5),
      ('seed', None),
    ),
  ),
  *(
    Row(
      name=f'rlw_{distribution}',
      make=lambda tasks, d=distribution: mtl_jax.rlw(d),
      golden=None,
      reference=None,
      symmetric=distribution != 'random_normal',
    )
    for distribution in (
      'uniform',
      'dirichlet',
      'bernoulli',
      'constrained_bernoulli',
      'random_normal',
    )
  ),
  Row(
    name='gls',
    make=lambda tasks: mtl_jax.gls(),
    # sqrt(2) / 2 and sqrt(2) / 4.
    golden=(0.707107, 0.353553),
    reference=lambda tasks: references.Reference(
      lambda losses: (
        np.prod(losses ** (1 / len(losses))) / (len(losses) * losses)
      )
    ),
    objective=lambda losses: jnp.prod(losses ** (1 / losses.size)),
    positive=True,
  ),
  Row(
    name='si',
    make=lambda tasks: mtl_jax.si(),
    golden=(1.0, 0.5),
    reference=lambda tasks: references.Reference(lambda losses: 1 / losses),
    objective=lambda losses: jnp.sum(jnp.log(losses)),
    positive=True,
    independent=True,
  ),
  Row(
    name='famo',
    make=lambda tasks: mtl_jax.famo(),
    # 1/2 and 1/4, of 3/4.
    golden=(2 / 3, 1 / 3),
    reference=lambda tasks: references.Famo(len(tasks), 1e-3),
    objective=lambda losses: balanced(losses, 0),
    factory=mtl_jax.famo,
    wrong=(
      *NEVER_RATES,
      ('gamma', -1e-3),
      ('gamma', float('inf')),
      ('min_losses', float('nan')),
      ('min_losses', ()),
    ),
    positive=True,
  ),
  Row(
    name='famo_bounds',
    make=lambda tasks: mtl_jax.famo(0.1, min_losses=of(BOUNDS, tasks)),
    # 1 and 1 / 2.1, of 3.1 / 2.1.
    golden=(21 / 31, 10 / 31),
    reference=lambda tasks: references.Famo(
      len(tasks), 0.1, bounds=np.array(of(BOUNDS, tasks))
    ),
    objective=lambda losses: balanced(losses, array(BOUNDS, losses)),
    symmetric=False,
    positive=True,
  ),
  Row(
    name='stch',
    make=lambda tasks: mtl_jax.stch(0.5),
    # 1/2 softmax(1, 2).
    golden=(0.134471, 0.365529),
    reference=lambda tasks: references.stch(0.5),
    objective=lambda losses: (
      0.5 * jnp.log(jnp.sum(jnp.exp(losses / losses.size / 0.5)))
    ),
    factory=mtl_jax.stch,
    wrong=(
      ('mu', 0.0),
      ('mu', -1.0),
      ('mu', float('inf')),
      ('objectives', 'log'),
      ('ideal', float('nan')),
      ('nadir', 1.0),
      ('warm_up_steps', 2),
      ('warm_up_steps', -1),
      ('nadir_steps', 1),
      *NEVER_PREFERENCES,
    ),
  ),
  Row(
    name='stch_preferences',
    make=lambda tasks: mtl_jax.stch(
      preference=of(SHARES, tasks), ideal=of(BOUNDS, tasks)
    ),
    # (1/2, 3/2) softmax(1/2, 3.15).
    golden=(0.5 * 0.065989, 1.5 * 0.934011),
    reference=lambda tasks: references.stch(
      1.0, of(SHARES, tasks), np.array(of(BOUNDS, tasks))
    ),
    objective=lambda losses: jnp.log(
      jnp.sum(jnp.exp(array(SHARES, losses) * (losses - array(BOUNDS, losses))))
    ),
    symmetric=False,
  ),
  Row(
    name='stch_nadir',
    make=lambda tasks: mtl_jax.stch(
      0.5, objectives='log_losses', nadir=of(NADIR, tasks)
    ),
    # The losses are the nadir: 1 / L.
    golden=(1.0, 0.5),
    reference=lambda tasks: references.LogStch(
      0.5, 0, 0, np.array(of(NADIR, tasks))
    ),
    objective=lambda losses: (
      losses.size * 0.5 * jnp.log(jnp.sum((losses / array(NADIR, losses)) ** 2))
    ),
    factory=mtl_jax.stch,
    arguments={'objectives': 'log_losses'},
    wrong=(
      ('nadir', None),
      ('nadir', 0.0),
      ('nadir', (1.0, -1.0)),
      ('ideal', 0.5),
    ),
    symmetric=False,
    positive=True,
  ),
  Row(
    name='stch_warm_up',
    make=lambda tasks: mtl_jax.stch(
      2.0, objectives='log_losses', warm_up_steps=3, nadir_steps=2
    ),
    golden=(1.0, 0.5),
    reference=lambda tasks: references.LogStch(2.0, 3, 2),
    objective=lambda losses: jnp.sum(jnp.log(losses)),
    factory=mtl_jax.stch,
    arguments={'objectives': 'log_losses', 'warm_up_steps': 3},
    wrong=(('nadir', 1.0), ('nadir_steps', 0), ('nadir_steps', 4)),
    positive=True,
  ),
  Row(
    name='cosmos',
    make=lambda tasks: mtl_jax.cosmos(2.0),
    # (1/2, 1/2) - 2 (2, -1) / (5 sqrt(10)).
    golden=(0.5 - 4 / (5 * 10**0.5), 0.5 + 2 / (5 * 10**0.5)),
    reference=lambda tasks: references.cosmos(2.0),
    objective=lambda losses: (
      jnp.mean(losses) - 2 * cosine(jnp.ones_like(losses), losses)
    ),
    factory=mtl_jax.cosmos,
    wrong=(
      ('lambda_', -1.0),
      ('lambda_', float('nan')),
      *NEVER_PREFERENCES,
    ),
  ),
  Row(
    name='cosmos_preferences',
    make=lambda tasks: mtl_jax.cosmos(1.0, preference=of(SHARES, tasks)),
    # r = (1/2, 3/2), |r| = sqrt(5/2), |L| = sqrt(5), r L = 7/2, and so
    # r - (r - 7/10 L) / sqrt(25/2).
    golden=(0.5 + 0.2 / 12.5**0.5, 1.5 - 0.1 / 12.5**0.5),
    reference=lambda tasks: references.cosmos(1.0, of(SHARES, tasks)),
    objective=lambda losses: (
      array(SHARES, losses) @ losses - cosine(array(SHARES, losses), losses)
    ),
    symmetric=False,
  ),
  Row(
    name='pbi',
    make=lambda tasks: mtl_jax.pbi(1.0),
    # (1, 1) / sqrt(2) + (-1, 1) / sqrt(2).
    golden=(0.0, 2**0.5),
    reference=lambda tasks: references.pbi(1.0),
    objective=lambda losses: boundary(losses, jnp.ones_like(losses), 0, 1.0),
    factory=mtl_jax.pbi,
    wrong=(
      ('theta', -1.0),
      ('theta', float('inf')),
      ('ideal', float('nan')),
      *NEVER_PREFERENCES,
    ),
  ),
  Row(
    name='pbi_preferences',
    make=lambda tasks: mtl_jax.pbi(
      preference=of(SHARES, tasks), ideal=of(BOUNDS, tasks)
    ),
    # u = (1, 3) / sqrt(10), and (1, 2.1) lies to the right of the ray, along
    # (3, -1) / sqrt(10).
    golden=(16 / 10**0.5, -2 / 10**0.5),
    reference=lambda tasks: references.pbi(
      5.0, of(SHARES, tasks), np.array(of(BOUNDS, tasks))
    ),
    objective=lambda losses: boundary(
      losses, array(SHARES, losses), array(BOUNDS, losses), 5.0
    ),
    symmetric=False,
  ),
  Row(
    name='first_then',
    make=lambda tasks: mtl_jax.first_then(
      mtl_jax.uncertainty(0.1), 3, mtl_jax.famo()
    ),
    golden=(0.5, 0.5),
    reference=lambda tasks: FirstThen(len(tasks)),
    factory=lambda **arguments: mtl_jax.first_then(
      first=mtl_jax.gls(), then=mtl_jax.si(), **arguments
    ),
    wrong=(('steps', -1), ('steps', 0.5)),
  ),
)


ALL = params(ROWS)
DETERMINISTIC = params(r for r in ROWS if r.reference is not None)
POSITIVE = params(r for r in ROWS if r.positive)
INDEPENDENT = params(r for r in ROWS if r.independent)
SYMMETRIC = params(r for r in ROWS if r.reference is not None and r.symmetric)
PICKY = params(r for r in ROWS if r.wrong)
