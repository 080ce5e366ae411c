"""Multi-task learning in JAX.

The names here need jax, numpy and optax alone: the transformations, and the
task gradients they work on. Everything else (`mtl_jax.data`, `.models`,
`.problems`, `.train`, ...) is imported by its own name.
"""

from mtl_jax.feature_updates import feature_update
from mtl_jax.feature_updates import FeatureUpdate
from mtl_jax.ghost_updates import ghost_update
from mtl_jax.gradients import task_grad
from mtl_jax.gradients import TaskGrad
from mtl_jax.gram_based import GramUpdate
from mtl_jax.gram_based import GramUpdateState
from mtl_jax.gram_updates import gram_update
from mtl_jax.transforms import after_step
from mtl_jax.transforms import Aggregator
from mtl_jax.transforms import AggregatorState
from mtl_jax.transforms import aligned_mtl
from mtl_jax.transforms import auto_lambda
from mtl_jax.transforms import BilevelWeighting
from mtl_jax.transforms import cagrad
from mtl_jax.transforms import con_fig
from mtl_jax.transforms import conicgrad
from mtl_jax.transforms import cosmos
from mtl_jax.transforms import cr_mogm
from mtl_jax.transforms import db_mtl
from mtl_jax.transforms import default_labels
from mtl_jax.transforms import diagnostics
from mtl_jax.transforms import dtp
from mtl_jax.transforms import dualproj
from mtl_jax.transforms import dwa
from mtl_jax.transforms import equal_weights
from mtl_jax.transforms import every
from mtl_jax.transforms import EveryState
from mtl_jax.transforms import excess_mtl
from mtl_jax.transforms import fairgrad
from mtl_jax.transforms import famo
from mtl_jax.transforms import first_then
from mtl_jax.transforms import flat_minima
from mtl_jax.transforms import FlatMinimaState
from mtl_jax.transforms import forum
from mtl_jax.transforms import from_gram
from mtl_jax.transforms import gls
from mtl_jax.transforms import graddrop
from mtl_jax.transforms import gradnorm
from mtl_jax.transforms import gradvac
from mtl_jax.transforms import imtl_g
from mtl_jax.transforms import imtl_l
from mtl_jax.transforms import krum
from mtl_jax.transforms import left_out
from mtl_jax.transforms import linear
from mtl_jax.transforms import LossWeighting
from mtl_jax.transforms import mgda
from mtl_jax.transforms import moco
from mtl_jax.transforms import modo
from mtl_jax.transforms import moml
from mtl_jax.transforms import nash_mtl
from mtl_jax.transforms import pbi
from mtl_jax.transforms import pcgrad
from mtl_jax.transforms import per_group
from mtl_jax.transforms import PerGroupState
from mtl_jax.transforms import random_weights
from mtl_jax.transforms import rlw
from mtl_jax.transforms import scheduled_weights
from mtl_jax.transforms import sdmgrad
from mtl_jax.transforms import shared_only
from mtl_jax.transforms import si
from mtl_jax.transforms import skip_nonfinite
from mtl_jax.transforms import SkipNonfiniteState
from mtl_jax.transforms import Solution
from mtl_jax.transforms import static_weights
from mtl_jax.transforms import stch
from mtl_jax.transforms import trimmed_mean
from mtl_jax.transforms import uncertainty
from mtl_jax.transforms import upgrad
from mtl_jax.transforms import weighted
from mtl_jax.weighted_gradients import weighted_grad
from mtl_jax.weighted_gradients import WeightedGrad

__version__ = '0.1.0'

__all__ = [
  'Aggregator',
  'AggregatorState',
  'BilevelWeighting',
  'EveryState',
  'FeatureUpdate',
  'FlatMinimaState',
  'GramUpdate',
  'GramUpdateState',
  'LossWeighting',
  'PerGroupState',
  'SkipNonfiniteState',
  'Solution',
  'TaskGrad',
  'WeightedGrad',
  'after_step',
  'aligned_mtl',
  'auto_lambda',
  'cagrad',
  'con_fig',
  'conicgrad',
  'cosmos',
  'cr_mogm',
  'db_mtl',
  'default_labels',
  'diagnostics',
  'dtp',
  'dualproj',
  'dwa',
  'equal_weights',
  'every',
  'excess_mtl',
  'fairgrad',
  'famo',
  'feature_update',
  'first_then',
  'flat_minima',
  'forum',
  'from_gram',
  'ghost_update',
  'gls',
  'graddrop',
  'gradnorm',
  'gradvac',
  'gram_update',
  'imtl_g',
  'imtl_l',
  'krum',
  'left_out',
  'linear',
  'mgda',
  'moco',
  'modo',
  'moml',
  'nash_mtl',
  'pbi',
  'pcgrad',
  'per_group',
  'random_weights',
  'rlw',
  'scheduled_weights',
  'sdmgrad',
  'shared_only',
  'si',
  'skip_nonfinite',
  'static_weights',
  'stch',
  'task_grad',
  'trimmed_mean',
  'uncertainty',
  'upgrad',
  'weighted',
  'weighted_grad',
]
