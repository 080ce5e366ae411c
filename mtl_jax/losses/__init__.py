"""Losses of single examples, and their means under a mask."""

from mtl_jax.losses.classification import cross_entropy as cross_entropy
from mtl_jax.losses.masked import masked_loss as masked_loss
from mtl_jax.losses.masked import masked_mean as masked_mean
