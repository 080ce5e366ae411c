"""Methods that combine task gradients, a file each."""

from mtl_jax.transforms.aggregators._aligned_mtl import aligned_mtl
from mtl_jax.transforms.aggregators._cagrad import cagrad
from mtl_jax.transforms.aggregators._con_fig import con_fig
from mtl_jax.transforms.aggregators._conicgrad import conicgrad
from mtl_jax.transforms.aggregators._cr_mogm import cr_mogm
from mtl_jax.transforms.aggregators._db_mtl import db_mtl
from mtl_jax.transforms.aggregators._dualproj import dualproj
from mtl_jax.transforms.aggregators._excess_mtl import excess_mtl
from mtl_jax.transforms.aggregators._fairgrad import fairgrad
from mtl_jax.transforms.aggregators._graddrop import graddrop
from mtl_jax.transforms.aggregators._gradnorm import gradnorm
from mtl_jax.transforms.aggregators._gradvac import gradvac
from mtl_jax.transforms.aggregators._imtl_g import imtl_g
from mtl_jax.transforms.aggregators._krum import krum
from mtl_jax.transforms.aggregators._linear import linear
from mtl_jax.transforms.aggregators._mgda import mgda
from mtl_jax.transforms.aggregators._moco import moco
from mtl_jax.transforms.aggregators._modo import modo
from mtl_jax.transforms.aggregators._nash_mtl import nash_mtl
from mtl_jax.transforms.aggregators._pcgrad import pcgrad
from mtl_jax.transforms.aggregators._random_weights import random_weights
from mtl_jax.transforms.aggregators._sdmgrad import sdmgrad
from mtl_jax.transforms.aggregators._trimmed_mean import trimmed_mean
from mtl_jax.transforms.aggregators._upgrad import upgrad

__all__ = [
  'aligned_mtl',
  'cagrad',
  'con_fig',
  'conicgrad',
  'cr_mogm',
  'db_mtl',
  'dualproj',
  'excess_mtl',
  'fairgrad',
  'graddrop',
  'gradnorm',
  'gradvac',
  'imtl_g',
  'krum',
  'linear',
  'mgda',
  'moco',
  'modo',
  'nash_mtl',
  'pcgrad',
  'random_weights',
  'sdmgrad',
  'trimmed_mean',
  'upgrad',
]
