"""What tests of whole runs share."""

import contextlib

import jax
from jax.experimental.compilation_cache import (
  compilation_cache as compilation_cache_module,
)
import pytest


@pytest.fixture(scope='module')
def compilation_cache(tmp_path_factory):
  """All runs of a file are few programs: compile each once, for their speed."""
  options = {
    'jax_compilation_cache_dir': str(tmp_path_factory.mktemp('cache')),
    'jax_persistent_cache_min_compile_time_secs': 0.0,
    'jax_persistent_cache_min_entry_size_bytes': -1,
  }
  with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
    for name, value in options.items():
      patch.setenv(name.upper(), str(value))
      stack.callback(jax.config.update, name, getattr(jax.config, name))
      jax.config.update(name, value)
    compilation_cache_module.reset_cache()
    yield
  compilation_cache_module.reset_cache()
