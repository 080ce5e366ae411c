"""Rows of methods on the geometry of task gradients; see `method_row`."""

import jax
from method_row import Method
from method_row import WEIGHTS
import numpy as np
import references_geometry as references

import mtl_jax
from mtl_jax.transforms.aggregators import _krum as _krum_file
from mtl_jax.transforms.aggregators import _trimmed_mean as _trimmed_mean_file
from mtl_jax.transforms.contract import aggregation
from mtl_jax.transforms.contract import lifting


def _krum(num_byzantine=1, num_selected=1, *, num_tasks=None, **axes):
  """Krum for any number of tasks, as for tasks that may be absent.

  The factory itself refuses a number that is always too small.
  """
  if num_tasks is None or num_tasks < 1:
    mtl_jax.krum(num_byzantine, num_selected, num_tasks=num_tasks, **axes)
  return mtl_jax.from_gram(
    lambda gram, *, losses, active: _krum_file._weights(
      gram, active, num_byzantine, num_selected
    ),
    num_tasks=num_tasks,
    **axes,
  )


def _trimmed_mean(trim=1, *, num_tasks=None, **axes):
  """The same of the trimmed mean."""
  if num_tasks is None or num_tasks < 1:
    mtl_jax.trimmed_mean(trim, num_tasks=num_tasks, **axes)
  return lifting.lift(
    lambda given: _trimmed_mean_file._combine(given, trim),
    num_tasks=num_tasks,
    axes=aggregation.Axes(**axes),
    weights='none',
  )


def _first_draw(draws):
  """What is drawn for `GOLDEN_MATRIX` at the first update with seed 0."""
  return np.asarray(draws(jax.random.split(jax.random.key(0))[1], 2, 3))


_NORMAL = np.exp(_first_draw(references.normal))
_UNIFORM = _first_draw(references.uniform)
_SIGN = _UNIFORM[0] < 0.6
_LEAKS = tuple(i % 4 / 3 for i in range(40))

METHODS = (
  # With det G = 200 and tr G = 56 the root of G is (G + sqrt(200)) / t for
  # t^2 = 56 + 2 sqrt(200); the squared singular values are 28 -+ sqrt(584).
  Method(
    name='aligned_mtl',
    factory=mtl_jax.aligned_mtl,
    reference=references.aligned_mtl('min'),
    # TorchJD's test_values. By hand: 0.559072 g_1 + 0.408261 g_2.
    golden=(0.213279, 0.967333, 0.967333),
    wrong=(
      ('scale', 'max'),
      ('scale', None),
      ('preference', (-1.0, 2.0)),
      ('preference', (0.0, 0.0)),
      ('preference', (float('nan'), 1.0)),
    ),
  ),
  Method(
    name='aligned_mtl_median',
    factory=mtl_jax.aligned_mtl,
    arguments={'scale': 'median'},
    reference=references.aligned_mtl('median'),
    # The lower of two is the smallest.
    golden=(0.213279, 0.967333, 0.967333),
  ),
  Method(
    name='aligned_mtl_rmse',
    factory=mtl_jax.aligned_mtl,
    arguments={'scale': 'rmse'},
    reference=references.aligned_mtl('rmse'),
    # By hand: sqrt(28) / sqrt(28 - sqrt(584)) times that of 'min'.
    golden=(0.576376, 2.614172, 2.614172),
  ),
  Method(
    name='aligned_mtl_preference',
    factory=mtl_jax.aligned_mtl,
    reference=references.with_preference(references.aligned_mtl('min')),
    stepwise=True,
    per_task={'preference': WEIGHTS},
    golden_per_task={'preference': (0.5, 1.5)},
    scale=lambda size: sum(WEIGHTS[:size]),
    # By hand: 0.890856 g_1 + 0.892999 g_2.
    golden=(1.794573, 1.783855, 1.783855),
  ),
  Method(
    name='con_fig',
    factory=mtl_jax.con_fig,
    reference=references.con_fig,
    scale=float,
    # TorchJD's test_values. By hand: u is proportional to g_1 / sqrt(18) +
    # g_2 / sqrt(38).
    golden=(0.158809, 2.070607, 2.070607),
    wrong=(
      ('preference', (-1.0, 2.0)),
      ('preference', (0.0, 0.0)),
      ('preference', (float('inf'), 1.0)),
    ),
  ),
  Method(
    name='con_fig_preference',
    factory=mtl_jax.con_fig,
    reference=references.with_preference(references.con_fig),
    stepwise=True,
    per_task={'preference': WEIGHTS},
    golden_per_task={'preference': (0.5, 1.5)},
    scale=float,
    # By hand, with the cosine k = -22 / sqrt(684): u is proportional to
    # (0.5 - 1.5 k) g_1 / sqrt(18) + (1.5 - 0.5 k) g_2 / sqrt(38).
    golden=(0.629600, 2.196412, 2.196412),
  ),
  Method(
    name='conicgrad',
    factory=mtl_jax.conicgrad,
    reference=references.conicgrad(45.0),
    # By hand: MGDA's (0, 1, 1) is at 35.3 degrees to the mean (1, 1, 1), in the
    # cone; its length is made sqrt(3).
    golden=(0.0, 1.224745, 1.224745),
    wrong=(
      ('angle', 0),
      ('angle', 90.0),
      ('angle', -45.0),
      ('angle', float('nan')),
    ),
  ),
  Method(
    name='conicgrad_30',
    factory=mtl_jax.conicgrad,
    arguments={'angle': 30.0},
    reference=references.conicgrad(30.0),
    # By hand: cos 30 (1, 1, 1) + sin 30 (-2, 1, 1) / sqrt(2), on the cone.
    golden=(0.158919, 1.219579, 1.219579),
  ),
  Method(
    name='gradvac',
    factory=mtl_jax.gradvac,
    reference=references.gradvac(0.01),
    stepwise=True,
    draws=references.orders,
    needs_tasks=True,
    scale=float,
    # TorchJD's test_values; PCGrad's, whose targets are 0 for ever.
    golden=(0.584795, 3.801170, 3.801170),
    random=True,
    wrong=(
      ('beta', -0.1),
      ('beta', 1.1),
      ('beta', float('nan')),
      ('seed', 'zero'),
      ('seed', None),
    ),
  ),
  Method(
    name='gradvac_0.5',
    factory=mtl_jax.gradvac,
    arguments={'beta': 0.5},
    reference=references.gradvac(0.5),
    stepwise=True,
    draws=references.orders,
    needs_tasks=True,
    scale=float,
    golden=(0.584795, 3.801170, 3.801170),
    random=True,
  ),
  Method(
    name='graddrop',
    factory=mtl_jax.graddrop,
    reference=references.graddrop(0.0),
    stepwise=True,
    draws=references.uniform,
    weights='none',
    scale=float,
    # By hand: the purities are 0.6, 1 and 1 (TorchJD's draw gave 6).
    golden=(6.0 if _SIGN else -4.0, 2.0, 2.0),
    random=True,
    wrong=(
      ('leak', -0.1),
      ('leak', 1.1),
      ('leak', float('nan')),
      ('leak', (0.5, 2.0)),
      ('leak', ()),
      ('seed', 0.5),
      ('seed', None),
    ),
  ),
  Method(
    name='graddrop_leak',
    factory=mtl_jax.graddrop,
    reference=references.graddrop(None),
    stepwise=True,
    draws=references.uniform,
    per_task={'leak': _LEAKS},
    golden_per_task={'leak': (0.25, 0.5)},
    weights='none',
    scale=float,
    # By hand: what is dropped leaks, -1 or 3.
    golden=(5.0 if _SIGN else -1.0, 2.0, 2.0),
    random=True,
  ),
  Method(
    name='krum',
    factory=_krum,
    arguments={'num_byzantine': 0, 'num_selected': 2},
    reference=references.krum(0, 2),
    # The mean, for two are too few; TorchJD's matrix is in test_geometry.
    golden=(1.0, 1.0, 1.0),
    wrong=(
      ('num_byzantine', -1),
      ('num_byzantine', 0.5),
      ('num_selected', 0),
      ('num_selected', 1.5),
    ),
  ),
  Method(
    name='krum_1',
    factory=_krum,
    arguments={'num_byzantine': 1},
    reference=references.krum(1, 1),
    golden=(1.0, 1.0, 1.0),
  ),
  Method(
    name='trimmed_mean',
    factory=_trimmed_mean,
    arguments={'trim': 1},
    reference=references.trimmed_mean(1),
    weights='none',
    # The mean, for two are too few; TorchJD's matrix is in test_geometry.
    golden=(1.0, 1.0, 1.0),
    wrong=(('trim', -1), ('trim', 0.5)),
  ),
  Method(
    name='random_weights',
    factory=mtl_jax.random_weights,
    reference=references.random_weights,
    stepwise=True,
    draws=references.normal,
    # The share of the second task moves the first coordinate from -4 to 6.
    golden=(10 * _NORMAL[1] / _NORMAL.sum() - 4, 1.0, 1.0),
    random=True,
    wrong=(('seed', 'zero'), ('seed', 0.5), ('seed', None)),
  ),
)
