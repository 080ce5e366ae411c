"""A pytest plugin: what each file's tests compile, and a limit on all of it.

Compiling is what most of these tests cost. How many programs they compile is
the same on every machine, so the limit is on programs and not on seconds.
"""

import os
import time

import jax
import pytest

_COMPILING = '/jax/core/compile/backend_compile_duration'
_TRACING = '/jax/core/compile/jaxpr_trace_duration'
_STAGES = {
  _TRACING: 'tracing',
  '/jax/core/compile/jaxpr_to_mlir_module_duration': 'lowering',
  _COMPILING: 'XLA',
}
_COLUMNS = ('cases', 'programs', 'tracing', 'lowering', 'XLA', 'CPU', 'wall')
_FILES_SHOWN = 25
_UNDER_XDIST = 'programs_by_file'


class Programs:
  """Counts programs and seconds by test file.

  Attributes:
    limit: the largest number of programs that a run may compile.
    found: what each of `_COLUMNS` adds up to, by file.
  """

  def __init__(self, limit):
    self.limit = limit
    self.found = {}
    self._at = dict.fromkeys(_COLUMNS, 0)
    # Starts and lengths of traces, to subtract those inside another.
    self._traces = []

  def _count(self, event, seconds, **_):
    if event not in _STAGES:
      return
    if event == _TRACING:
      start = time.time() - seconds
      inner = 0
      while self._traces and self._traces[-1][0] >= start:
        inner += self._traces.pop()[1]
      self._traces.append((start, seconds))
      seconds -= inner
    self._at[_STAGES[event]] += seconds
    self._at['programs'] += event == _COMPILING

  def _add(self, file, numbers):
    total = self.found.setdefault(file, dict.fromkeys(_COLUMNS, 0))
    for column, number in numbers.items():
      total[column] += number

  def pytest_sessionstart(self):
    jax.monitoring.register_event_duration_secs_listener(self._count)

  @pytest.hookimpl(wrapper=True)
  def pytest_runtest_protocol(self, item):
    # Collection compiles too, where a module makes arrays; the first test of
    # the process pays for it.
    self._at['cases'] += 1
    cpu, wall = sum(os.times()[:4]), time.perf_counter()
    try:
      return (yield)
    finally:
      self._at['CPU'] += sum(os.times()[:4]) - cpu
      self._at['wall'] += time.perf_counter() - wall
      self._add(item.nodeid.split('::')[0], self._at)
      self._at = dict.fromkeys(_COLUMNS, 0)

  @pytest.hookimpl(optionalhook=True)
  def pytest_testnodedown(self, node):
    # A worker that crashed has sent nothing.
    sent = getattr(node, 'workeroutput', {}).get(_UNDER_XDIST, {})
    for file, numbers in sent.items():
      self._add(file, numbers)

  def pytest_sessionfinish(self, session):
    worker = getattr(session.config, 'workeroutput', None)
    if worker is not None:
      worker[_UNDER_XDIST] = self.found
      return
    count = self._total()['programs']
    if count > self.limit:
      report = pytest.CollectReport(
        'tests/programs.py',
        'failed',
        f'{count} programs were compiled, more than the {self.limit} of '
        'MAX_PROGRAMS in conftest.py',
        [],
      )
      # Counted in the last line and told among the errors.
      terminal = session.config.pluginmanager.get_plugin('terminalreporter')
      terminal.stats.setdefault('error', []).append(report)
      session.exitstatus = pytest.ExitCode.TESTS_FAILED

  def _total(self):
    total = dict.fromkeys(_COLUMNS, 0)
    for numbers in self.found.values():
      for column, number in numbers.items():
        total[column] += number
    return total

  def pytest_terminal_summary(self, terminalreporter):
    if not self.found:
      return
    terminalreporter.section('programs and seconds')
    line = lambda name, cells: terminalreporter.write_line(
      f'{name:<55}' + ''.join(f'{cell:>9}' for cell in cells)
    )
    line('', _COLUMNS)
    files = sorted(self.found, key=lambda file: -self.found[file]['CPU'])
    for file in files[:_FILES_SHOWN]:
      line(file, _cells(self.found[file]))
    line(f'all {len(files)} files', _cells(self._total()))


def _cells(numbers):
  return [
    numbers[c] if c in ('cases', 'programs') else f'{numbers[c]:.1f}'
    for c in _COLUMNS
  ]
