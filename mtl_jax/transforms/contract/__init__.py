"""The contract of an aggregator, and the lifting of a rule to it."""

from mtl_jax.transforms.contract.aggregation import Aggregator
from mtl_jax.transforms.contract.bilevel_weighting import BilevelWeighting
from mtl_jax.transforms.contract.diagnosis import diagnostics
from mtl_jax.transforms.contract.gram_based import from_gram
from mtl_jax.transforms.contract.gram_based import Solution
from mtl_jax.transforms.contract.labels import default_labels
from mtl_jax.transforms.contract.labels import ParamLabels
from mtl_jax.transforms.contract.lifting import AggregatorState
from mtl_jax.transforms.contract.loss_weighting import LossWeighting

__all__ = [
  'Aggregator',
  'AggregatorState',
  'BilevelWeighting',
  'LossWeighting',
  'ParamLabels',
  'Solution',
  'default_labels',
  'diagnostics',
  'from_gram',
]
