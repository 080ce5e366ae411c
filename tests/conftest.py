"""Every test runs on eight virtual CPU devices, without the network."""

import itertools
import os
import pathlib

import jax
import programs
import pytest
import quick_compile

# Read when the first array is made.
os.environ['XLA_FLAGS'] = ' '.join(
  (
    os.environ.get('XLA_FLAGS', ''),
    quick_compile.FLAGS,
    '--xla_force_host_platform_device_count=8',
  )
)
jax.config.update('jax_platforms', 'cpu')
os.environ['JAX_PLATFORMS'] = 'cpu'

jax.config.update('jax_numpy_rank_promotion', 'raise')

# What all tests together may compile; the count stands at the end of a run.
MAX_PROGRAMS = 11_000


def pytest_configure(config):
  config.pluginmanager.register(programs.Programs(MAX_PROGRAMS), 'programs')


def _group(item):
  """The method whose row a test is of, or else its module."""
  parameters = item.callspec.params if hasattr(item, 'callspec') else {}
  method = getattr(parameters.get('method'), 'name', None)
  return method or item.nodeid.split('::')[0]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
  """Tests of one method run in one process, one after the other.

  They share its programs, which nothing needs after them.
  """
  groups = [_group(item) for item in items]
  first = {}
  for group in groups:
    first.setdefault(group, len(first))
  pairs = sorted(zip(groups, items, strict=True), key=lambda p: first[p[0]])
  items[:] = [item for _, item in pairs]
  if config.pluginmanager.hasplugin('xdist'):
    for group, item in pairs:
      item.add_marker(pytest.mark.xdist_group(group))


# Every compiled program holds some 20 to 200 memory maps of its process, of
# which Linux allows 65,530: past that XLA crashes while it compiles.
_MAPS = pathlib.Path('/proc/self/maps')
_TOO_MANY = 25_000
_tests = itertools.count(1)


@pytest.fixture(autouse=True)
def _few_programs_in_memory():
  """Forgets all compiled programs, between tests, before there are too many."""
  yield
  # To count them takes some milliseconds.
  if next(_tests) % 25 == 0 and _MAPS.exists():
    with _MAPS.open() as maps:
      if sum(1 for _ in maps) > _TOO_MANY:
        jax.clear_caches()
