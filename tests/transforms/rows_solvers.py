"""Rows of methods with a convex problem inside; see `method_row`."""

from method_row import Method
from method_row import WEIGHTS
import references_solvers as references

import mtl_jax

METHODS = (
  # With the cosine k = -22 / sqrt(18 * 38) of the golden matrix both unit
  # gradients have the part (1 + k)^(-1/2), times 2736^(1/4), the root of the
  # norm of the Gram matrix.
  Method(
    name='nash_mtl',
    factory=mtl_jax.nash_mtl,
    reference=references.fairgrad(1.0),
    # By hand, as above, with the length sqrt(2) times 2736^(1/4). The public
    # codes' update is that of `scale='paper'`, in test_solvers_fair.
    golden=(0.553884, 7.221731, 7.221731),
    scale=float,
    wrong=(('scale', 'sum'), ('scale', None)),
  ),
  Method(
    name='fairgrad',
    factory=mtl_jax.fairgrad,
    reference=references.fairgrad(2.0),
    # By hand: r = w_2 / w_1 is the root of (18 - 22 r)^2 = r (38 r - 22)^2
    # between 22/38 and 18/22, 0.677725, and w_1 = (18 - 22 r)^(-2/3) times
    # 2736^(1/3).
    golden=(0.437406, 11.060670, 11.060670),
    scale=float,
    # A gradient shorter by a factor of f has a part f^(1/3) times as long.
    bound=1e4,
    wrong=(
      ('alpha', 0.0),
      ('alpha', -1.0),
      ('alpha', float('nan')),
      ('alpha', float('inf')),
      ('scale', 'sum'),
    ),
  ),
  Method(
    name='fairgrad_1',
    factory=mtl_jax.fairgrad,
    arguments={'alpha': 1.0},
    reference=references.fairgrad(1.0),
    golden=(0.553884, 7.221731, 7.221731),
    scale=float,
  ),
  Method(
    name='upgrad',
    factory=mtl_jax.upgrad,
    reference=references.upgrad,
    # By hand: the mean of g_1 + 22/38 g_2 and g_2 + 22/18 g_1. TorchJD's
    # test_values have 0.2929 and 1.9004, for its problem is regularised.
    golden=(0.292398, 1.900585, 1.900585),
    wrong=(
      ('preference', (-1.0, 2.0)),
      ('preference', (0.0, 0.0)),
      ('preference', (float('nan'), 1.0)),
      ('preference', (float('inf'), 1.0)),
      ('preference', ()),
    ),
  ),
  Method(
    name='upgrad_preference',
    factory=mtl_jax.upgrad,
    reference=references.with_preference(references.upgrad),
    stepwise=True,
    per_task={'preference': WEIGHTS},
    golden_per_task={'preference': (0.5, 1.5)},
    scale=lambda size: sum(WEIGHTS[:size]),
    # By hand: half of (-20, 60, 60) / 38 and 3/2 of (20, 40, 40) / 18.
    golden=(-10 / 38 + 30 / 18, 30 / 38 + 60 / 18, 30 / 38 + 60 / 18),
  ),
  Method(
    name='dualproj',
    factory=mtl_jax.dualproj,
    reference=references.dualproj,
    # By hand: the mean and 2/18 g_1. TorchJD's test_values have 0.5563 and
    # 1.1109, for its problem is regularised.
    golden=(5 / 9, 10 / 9, 10 / 9),
    wrong=(
      ('preference', (-1.0, 2.0)),
      ('preference', (0.0, 0.0)),
      ('preference', (float('nan'), 1.0)),
      ('preference', (float('inf'), 1.0)),
      ('preference', ()),
    ),
  ),
  Method(
    name='dualproj_preference',
    factory=mtl_jax.dualproj,
    reference=references.with_preference(references.dualproj),
    stepwise=True,
    per_task={'preference': WEIGHTS},
    golden_per_task={'preference': (0.5, 0.25)},
    scale=lambda size: sum(WEIGHTS[:size]),
    # By hand: x = g_1 / 2 + g_2 / 4 = (-1/2, 3/4, 3/4) has the inner product
    # -3/2 with g_2, and 3/76 of it is added.
    golden=(-0.5 + 18 / 76, 0.75 + 3 / 76, 0.75 + 3 / 76),
  ),
)
