"""Gradient manipulation and flat minima as optax transformations.

Needs jax, numpy and optax, and nothing else of this project.
"""

from mtl_jax.transforms._aggregator import Aggregator
from mtl_jax.transforms._aligned_mtl import aligned_mtl
from mtl_jax.transforms._auto_lambda import auto_lambda
from mtl_jax.transforms._bilevel import BilevelWeighting
from mtl_jax.transforms._cagrad import cagrad
from mtl_jax.transforms._con_fig import con_fig
from mtl_jax.transforms._conicgrad import conicgrad
from mtl_jax.transforms._cr_mogm import cr_mogm
from mtl_jax.transforms._db_mtl import db_mtl
from mtl_jax.transforms._diagnostics import diagnostics
from mtl_jax.transforms._dualproj import dualproj
from mtl_jax.transforms._every import every
from mtl_jax.transforms._every import EveryState
from mtl_jax.transforms._excess_mtl import excess_mtl
from mtl_jax.transforms._fairgrad import fairgrad
from mtl_jax.transforms._flat_minima import flat_minima
from mtl_jax.transforms._flat_minima import FlatMinimaState
from mtl_jax.transforms._forum import forum
from mtl_jax.transforms._from_gram import from_gram
from mtl_jax.transforms._graddrop import graddrop
from mtl_jax.transforms._gradnorm import gradnorm
from mtl_jax.transforms._gradvac import gradvac
from mtl_jax.transforms._imtl_g import imtl_g
from mtl_jax.transforms._krum import krum
from mtl_jax.transforms._labels import default_labels
from mtl_jax.transforms._labels import ParamLabels
from mtl_jax.transforms._lift import AggregatorState
from mtl_jax.transforms._linear import linear
from mtl_jax.transforms._loss_weighting import LossWeighting
from mtl_jax.transforms._mgda import mgda
from mtl_jax.transforms._moco import moco
from mtl_jax.transforms._modo import modo
from mtl_jax.transforms._moml import moml
from mtl_jax.transforms._nash_mtl import nash_mtl
from mtl_jax.transforms._pcgrad import pcgrad
from mtl_jax.transforms._per_group import per_group
from mtl_jax.transforms._per_group import PerGroupState
from mtl_jax.transforms._random_weights import random_weights
from mtl_jax.transforms._sdmgrad import sdmgrad
from mtl_jax.transforms._shared_only import shared_only
from mtl_jax.transforms._skip_nonfinite import left_out
from mtl_jax.transforms._skip_nonfinite import skip_nonfinite
from mtl_jax.transforms._skip_nonfinite import SkipNonfiniteState
from mtl_jax.transforms._solution import Solution
from mtl_jax.transforms._trimmed_mean import trimmed_mean
from mtl_jax.transforms._upgrad import upgrad
from mtl_jax.transforms._weighted import after_step
from mtl_jax.transforms._weighted import weighted
from mtl_jax.transforms._weightings_famo import famo
from mtl_jax.transforms._weightings_fixed import equal_weights
from mtl_jax.transforms._weightings_fixed import static_weights
from mtl_jax.transforms._weightings_geometric import gls
from mtl_jax.transforms._weightings_geometric import si
from mtl_jax.transforms._weightings_history import dtp
from mtl_jax.transforms._weightings_history import dwa
from mtl_jax.transforms._weightings_learned import imtl_l
from mtl_jax.transforms._weightings_learned import uncertainty
from mtl_jax.transforms._weightings_preference import cosmos
from mtl_jax.transforms._weightings_preference import pbi
from mtl_jax.transforms._weightings_random import rlw
from mtl_jax.transforms._weightings_scheduled import first_then
from mtl_jax.transforms._weightings_scheduled import scheduled_weights
from mtl_jax.transforms._weightings_stch import stch

__all__ = [
  'Aggregator',
  'AggregatorState',
  'BilevelWeighting',
  'EveryState',
  'FlatMinimaState',
  'LossWeighting',
  'ParamLabels',
  'PerGroupState',
  'SkipNonfiniteState',
  'Solution',
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
  'first_then',
  'flat_minima',
  'forum',
  'from_gram',
  'gls',
  'graddrop',
  'gradnorm',
  'gradvac',
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
  'trimmed_mean',
  'uncertainty',
  'upgrad',
  'weighted',
]
