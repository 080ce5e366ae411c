"""Compilation as these tests want it: they compile much and compute little."""

import jax

# Skipping these passes changes results only by rounding.
OPTIONS = {'xla_backend_optimization_level': 0}
# What a run compiles with, for tests of what a program costs or holds.
DEFAULTS = {'xla_backend_optimization_level': 3}
if jax.version.__version_info__ < (0, 11):
  # Less than half the time; later versions know one way alone, and end the
  # process where XLA_FLAGS asks for another.
  OPTIONS['xla_cpu_use_fusion_emitters'] = False
  DEFAULTS['xla_cpu_use_fusion_emitters'] = True

# The options for XLA_FLAGS: `conftest.py` sets them for all tests. Processes
# that a test starts with flags of its own add them.
FLAGS = ' '.join(
  f'--{name}={str(value).lower()}' for name, value in OPTIONS.items()
)

# The flags do it, for programs inside others too. A process that is started
# without them compiles as a run does.
jit = jax.jit
