"""Task metrics and the gain over single-task baselines."""

from mtl_jax.metrics.averages import average as average
from mtl_jax.metrics.classification import accuracy as accuracy
from mtl_jax.metrics.delta_m import delta_m as delta_m
from mtl_jax.metrics.delta_m import relative_gain as relative_gain
