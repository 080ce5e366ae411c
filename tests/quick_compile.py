"""Compilation as these tests want it: they compile much and compute little."""

import functools

import jax

# What is left out finds no other numbers beyond rounding.
OPTIONS = {'xla_backend_optimization_level': 0}
if jax.version.__version_info__ < (0, 11):
  # Less than half the time; later versions know one way alone.
  OPTIONS['xla_cpu_use_fusion_emitters'] = False

jit = functools.partial(jax.jit, compiler_options=OPTIONS)
