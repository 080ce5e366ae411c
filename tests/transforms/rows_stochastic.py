"""Rows of stochastic and stateful methods; see `method_row`."""

from method_row import LOSSES
from method_row import Method
from method_row import WEIGHTS
import numpy as np
import references_stochastic as references

import mtl_jax

NAN, INF = float('nan'), float('inf')

METHODS = (
  # On the golden matrix the two further stacks have the inner products
  # ((8.64, -22.72), (-8.32, 79.04)), so both tasks gain the same where
  # 16.96 u_1 = 101.76 u_2 for u = w + lambda / 2: u_1 = 6 u_2.
  Method(
    name='sdmgrad',
    factory=mtl_jax.sdmgrad,
    arguments={'inner_steps': 60},
    reference=references.sdmgrad(steps=60),
    golden=(6 * 1.3 / 7 - 4 * 6 * 1.3 / 7, 1.3, 1.3),
    scale=lambda size: 1.3,
    stepwise=True,
    needs_tasks=True,
    extra_batches=2,
    wrong=(
      ('lambda_', -0.1),
      ('lambda_', NAN),
      ('lambda_', INF),
      ('preference', (1.0, -1.0)),
      ('preference', (0.0, 0.0)),
      ('preference', (NAN, 1.0)),
      ('preference', ()),
      ('sampling', 'double'),
      ('inner_steps', 0),
      ('learning_rate', 0.0),
      ('learning_rate', INF),
      ('momentum', 1.0),
      ('momentum', -0.1),
      ('scale', 'none'),
      ('rescale', '1+c'),
    ),
  ),
  # By hand: with one batch the direction is that of MGDA.
  Method(
    name='sdmgrad_single',
    factory=mtl_jax.sdmgrad,
    arguments={
      'sampling': 'single',
      'rescale': '1+lambda',
      'inner_steps': 60,
    },
    reference=references.sdmgrad(batch='single', divisor=1.3, steps=60),
    golden=(0.0, 1.0, 1.0),
    stepwise=True,
    needs_tasks=True,
  ),
  # By hand: the least-norm point 5 (3/5, 2/5) asks for w_1 = 3 - 4 / 4 > 1, so
  # w = (1, 0) and d = 2 g_1 + 3 g_2.
  Method(
    name='sdmgrad_preference',
    factory=mtl_jax.sdmgrad,
    arguments={'lambda_': 4.0, 'sampling': 'single'},
    reference=references.sdmgrad(lambda_=4.0, batch='single'),
    per_task={'preference': WEIGHTS},
    golden_per_task={'preference': (0.25, 0.75)},
    golden=(10.0, 5.0, 5.0),
    scale=lambda size: 5.0,
    stepwise=True,
    needs_tasks=True,
  ),
  # By hand: w_1 = 1/2 + 0.1 (35.36 + 7.04) / (2 l^2) with the mean length
  # l = (sqrt(8.64) + sqrt(79.04)) / 2, and d_1 = 6 - 10 w_1.
  Method(
    name='modo',
    factory=mtl_jax.modo,
    reference=references.modo(),
    golden=(0.394047, 1.0, 1.0),
    stepwise=True,
    needs_tasks=True,
    extra_batches=2,
    wrong=(
      ('gamma', 0.0),
      ('gamma', NAN),
      ('gamma', INF),
      ('rho', -0.1),
      ('rho', INF),
      ('batches', 'one'),
      ('scale', 'none'),
    ),
  ),
  Method(
    name='modo_rho',
    factory=mtl_jax.modo,
    arguments={'gamma': 0.5, 'rho': 0.5},
    reference=references.modo(gamma=0.5, rho=0.5),
    # As above with 0.5 in place of 0.1, for rho moves equal weights alike.
    golden=(6 - 5 - 2.5 * 42.4 / 34.9862316, 1.0, 1.0),
    stepwise=True,
    needs_tasks=True,
    extra_batches=2,
  ),
  # By hand: the Gram matrix is ((18, -22), (-22, 38)), so that w_1 = 1/2 +
  # 0.1 (8 + 2) / (2 l^2) with l = (sqrt(18) + sqrt(38)) / 2.
  Method(
    name='moco',
    factory=mtl_jax.moco,
    reference=references.moco(),
    golden=(0.815339, 1.0, 1.0),
    stepwise=True,
    needs_tasks=True,
    weights='tracked',
    wrong=(
      ('beta', 0.0),
      ('beta', 1.5),
      ('beta', NAN),
      ('gamma', 0.0),
      ('gamma', INF),
      ('rho', -1.0),
      ('beta_decay', -0.5),
      ('gamma_decay', NAN),
      ('scale', 'none'),
    ),
  ),
  Method(
    name='moco_constant',
    factory=mtl_jax.moco,
    arguments={
      'beta': 0.2,
      'beta_decay': 0.0,
      'gamma': 0.3,
      'gamma_decay': 0.0,
      'rho': 0.1,
    },
    reference=references.moco(
      beta=0.2, beta_decay=0.0, gamma=0.3, gamma_decay=0.0, rho=0.1
    ),
    # As above with 0.3 in place of 0.1.
    golden=(1 - 3 * (1 - 0.815339), 1.0, 1.0),
    stepwise=True,
    needs_tasks=True,
    weights='tracked',
  ),
  Method(
    name='cr_mogm',
    factory=mtl_jax.cr_mogm,
    reference=references.cr_mogm(),
    # The first weights are those of MGDA.
    golden=(0.0, 1.0, 1.0),
    stepwise=True,
    needs_tasks=True,
    wrong=(('decay', 1.0), ('decay', -0.1), ('decay', NAN)),
  ),
  Method(
    name='cr_mogm_mean',
    factory=mtl_jax.cr_mogm,
    arguments={'aggregator': mtl_jax.linear(), 'decay': 0.5},
    reference=references.cr_mogm(
      0.5, weights=lambda J: np.full(len(J), 1 / len(J))
    ),
    golden=(1.0, 1.0, 1.0),
    stepwise=True,
    needs_tasks=True,
  ),
  # By hand: the gradients of the log losses are (-4, 1, 1) and (3, 1/2, 1/2),
  # the longer is sqrt(18) and the shorter sqrt(9.5).
  Method(
    name='db_mtl',
    factory=mtl_jax.db_mtl,
    reference=references.db_mtl(),
    golden=(0.129483, 1.688247, 1.688247),
    # Over the loss, which is 2 where these tests have equal tasks.
    scale=lambda size: 1 / LOSSES[0] if size == 1 else size / 2,
    stepwise=True,
    needs_tasks=True,
    needs_losses=True,
    weights='tracked',
    wrong=(
      ('beta', 1.0),
      ('beta', -0.1),
      ('beta', NAN),
      ('beta_decay', -0.5),
      ('beta_decay', INF),
    ),
  ),
  Method(
    name='db_mtl_decay',
    factory=mtl_jax.db_mtl,
    arguments={'beta': 0.5, 'beta_decay': 0.5},
    reference=references.db_mtl(beta=0.5, beta_decay=0.5),
    golden=(0.129483, 1.688247, 1.688247),
    scale=lambda size: 1 / LOSSES[0] if size == 1 else size / 2,
    stepwise=True,
    needs_tasks=True,
    needs_losses=True,
    weights='tracked',
  ),
  Method(
    name='gradnorm',
    factory=mtl_jax.gradnorm,
    reference=references.gradnorm(),
    # The first weights are 1.
    golden=(2.0, 2.0, 2.0),
    scale=float,
    stepwise=True,
    needs_tasks=True,
    needs_losses=True,
    wrong=(
      ('alpha', -0.5),
      ('alpha', NAN),
      ('learning_rate', 0.0),
      ('learning_rate', INF),
      ('scale', 'none'),
    ),
  ),
  Method(
    name='excess_mtl',
    factory=mtl_jax.excess_mtl,
    arguments={'step_size': 1.0},
    reference=references.excess_mtl(step_size=1.0),
    # The first weights are equal.
    golden=(1.0, 1.0, 1.0),
    stepwise=True,
    needs_tasks=True,
    wrong=(
      ('step_size', 0.0),
      ('step_size', NAN),
      ('step_size', INF),
      ('warmup', 0),
    ),
  ),
  Method(
    name='excess_mtl_warmup',
    factory=mtl_jax.excess_mtl,
    arguments={'step_size': 0.5, 'warmup': 2},
    reference=references.excess_mtl(step_size=0.5, warmup=2),
    golden=(1.0, 1.0, 1.0),
    stepwise=True,
    needs_tasks=True,
  ),
)
