"""Methods that weigh losses, a file for each way to find the weights."""

from mtl_jax.transforms.weightings._famo import famo
from mtl_jax.transforms.weightings._fixed import equal_weights
from mtl_jax.transforms.weightings._fixed import static_weights
from mtl_jax.transforms.weightings._geometric import gls
from mtl_jax.transforms.weightings._geometric import si
from mtl_jax.transforms.weightings._history import dtp
from mtl_jax.transforms.weightings._history import dwa
from mtl_jax.transforms.weightings._learned import imtl_l
from mtl_jax.transforms.weightings._learned import uncertainty
from mtl_jax.transforms.weightings._preference import cosmos
from mtl_jax.transforms.weightings._preference import pbi
from mtl_jax.transforms.weightings._random import rlw
from mtl_jax.transforms.weightings._scheduled import first_then
from mtl_jax.transforms.weightings._scheduled import scheduled_weights
from mtl_jax.transforms.weightings._stch import stch

__all__ = [
  'cosmos',
  'dtp',
  'dwa',
  'equal_weights',
  'famo',
  'first_then',
  'gls',
  'imtl_l',
  'pbi',
  'rlw',
  'scheduled_weights',
  'si',
  'static_weights',
  'stch',
  'uncertainty',
]
