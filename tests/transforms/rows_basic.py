"""Rows of the classical methods; see `method_row`."""

from method_row import Method
from method_row import WEIGHTS
import references

import mtl_jax

METHODS = (
  Method(
    name='linear',
    factory=mtl_jax.linear,
    reference=references.linear,
    # TorchJD's test_values (Mean), and by hand.
    golden=(1.0, 1.0, 1.0),
    wrong=(
      ('weights', (-1.0, 2.0)),
      ('weights', (0.0, 0.0)),
      ('weights', (float('nan'), 1.0)),
      ('weights', (float('inf'), 1.0)),
      ('weights', ()),
    ),
  ),
  Method(
    name='linear_weighted',
    factory=mtl_jax.linear,
    reference=None,
    per_task={'weights': WEIGHTS},
    golden_per_task={'weights': (0.5, 1.5)},
    scale=lambda size: sum(WEIGHTS[:size]),
    # 0.5 g_1 + 1.5 g_2.
    golden=(7.0, 2.0, 2.0),
  ),
  Method(
    name='mgda',
    factory=mtl_jax.mgda,
    reference=references.mgda('none'),
    # TorchJD's test_values. By hand: orthogonal to g_2 - g_1 = (10, 0, 0).
    golden=(0.0, 1.0, 1.0),
    wrong=(('normalization', 'L2'), ('normalization', None)),
  ),
  Method(
    name='mgda_l2',
    factory=mtl_jax.mgda,
    arguments={'normalization': 'l2'},
    reference=references.mgda('l2'),
    # By hand: two unit vectors have equal weights.
    golden=(1.0, 1.0, 1.0),
  ),
  Method(
    name='mgda_loss',
    factory=mtl_jax.mgda,
    arguments={'normalization': 'loss'},
    reference=references.mgda('loss'),
    # By hand: the Gram matrix of (-4, 1, 1) and (3, 1/2, 1/2) is
    # [[18, -11], [-11, 9.5]], so w_1 = 20.5 / 49.5 and d_1 = 6 - 10 w_1.
    golden=(6 - 205 / 49.5, 1.0, 1.0),
    needs_losses=True,
  ),
  Method(
    name='mgda_loss+',
    factory=mtl_jax.mgda,
    arguments={'normalization': 'loss+'},
    reference=references.mgda('loss+'),
    # By hand: lengths 1 and 1/2 with the cosine k = -22 / sqrt(18 * 38), so
    # w_1 = (1/4 - k/2) / (5/4 - k) = 0.320676 and d_1 = 6 - 10 w_1.
    golden=(2.793236, 1.0, 1.0),
    needs_losses=True,
  ),
  Method(
    name='pcgrad',
    factory=mtl_jax.pcgrad,
    reference=references.pcgrad('sum'),
    scale=float,
    # TorchJD's test_values. By hand: (1 + 22/18) g_1 + (1 + 22/38) g_2.
    golden=(0.584795, 3.801170, 3.801170),
    random=True,
    wrong=(
      ('reduction', 'none'),
      ('seed', 'zero'),
      ('seed', 0.5),
      ('seed', None),
    ),
  ),
  Method(
    name='pcgrad_mean',
    factory=mtl_jax.pcgrad,
    arguments={'reduction': 'mean'},
    reference=references.pcgrad('mean'),
    golden=(0.292398, 1.900585, 1.900585),
    random=True,
  ),
  # On the golden matrix g_w is (u, 1, 1) with u from -4 to 6, and the dual is
  # u + 2 + c sqrt(3) sqrt(u^2 + 2). For c below 1 / sqrt(3) it falls towards
  # u = -4, so that d = g_0 + c sqrt(3 / 18) g_1.
  Method(
    name='cagrad_0.1',
    factory=mtl_jax.cagrad,
    arguments={'c': 0.1, 'rescale': '1+c'},
    reference=references.cagrad(0.1, divisor=1.1),
    golden=(0.836701 / 1.1, 1.040825 / 1.1, 1.040825 / 1.1),
    wrong=(
      ('c', -0.5),
      ('c', float('nan')),
      ('c', float('inf')),
      ('rescale', 1),
      ('rescale', '1+c**2'),
    ),
  ),
  Method(
    name='cagrad_0.5',
    factory=mtl_jax.cagrad,
    arguments={'c': 0.5},
    reference=references.cagrad(0.5),
    scale=lambda size: 1.5,
    # TorchJD's test_values, and by hand as above.
    golden=(0.183503, 1.204124, 1.204124),
  ),
  Method(
    name='cagrad_0.9',
    factory=mtl_jax.cagrad,
    arguments={'c': 0.9, 'rescale': '1+c^2'},
    reference=references.cagrad(0.9, divisor=1.81),
    scale=lambda size: 1.9 / 1.81,
    # By hand: both tasks gain the same where d_1 = 0, and |d - g_0|^2 = 2.43
    # leaves d_2 = d_3 = 1 + sqrt(0.715).
    golden=(0.0, 1.845577 / 1.81, 1.845577 / 1.81),
  ),
  Method(
    name='imtl_g',
    factory=mtl_jax.imtl_g,
    reference=references.imtl_g,
    # TorchJD's test_values. By hand: w_1 : w_2 = sqrt(38) : sqrt(18).
    golden=(0.076696, 1.0, 1.0),
  ),
)
