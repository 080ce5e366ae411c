"""Benchmarks in one file each: tasks, losses, metrics, data and baselines."""

from mtl_jax.problems.registry import by_name as by_name
