"""Fair timing of variants that take turns in one process on a named machine.

Other load on the machine affects all variants in a turn equally, so a ratio is
taken within a turn; the median is over turns. A variant's turn is a burst of
steps, as in a training loop, and blocks until they are done.
"""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import datetime
import importlib.metadata
import os
import pathlib
import platform
import time
from typing import Any

import jax
import numpy as np

# A burst lasts about this long. A fast step is then well above the clock's
# resolution, and the first step after another variant's has little weight.
_BURST_S = 0.05
_MOST_STEPS = 20
# Pause between bursts, so that one library's threads that still spin, waiting
# for work, take no time from the next variant.
_PAUSE_S = 0.005
_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'numpy', 'torch', 'torchjd')


def take_turns(
  variants: Mapping[str, Callable[[int], None]],
  *,
  warm_up: int = 2,
  least: int = 5,
  most: int = 30,
  budget_s: float = 20.0,
) -> dict[str, list[float]]:
  """Seconds a step for each variant, [turns]; turn i is simultaneous for all.

  Args:
    variants: `{name: run}`; `run(n)` does n steps and blocks until they are
      done.
    warm_up: number of single steps before the count; the fastest one determines
      the number of steps in a burst.
    least: least number of turns.
    most: largest number of turns.
    budget_s: seconds after which no further turn begins.

  Returns:
    `{name: seconds a step in every turn}`.
  """
  for run in variants.values():
    run(1)
  fastest = {
    name: min(_seconds(run, 1) for _ in range(max(warm_up, 1)))
    for name, run in variants.items()
  }
  steps = {name: burst(seconds) for name, seconds in fastest.items()}
  times: dict[str, list[float]] = {name: [] for name in variants}
  start = time.perf_counter()
  for turn in range(most):
    if turn >= least and time.perf_counter() - start > budget_s:
      break
    for name, run in variants.items():
      time.sleep(_PAUSE_S)
      times[name].append(_seconds(run, steps[name]) / steps[name])
  return times


def burst(seconds: float) -> int:
  """Number of steps in one turn, for steps with this many seconds each."""
  return int(np.clip(np.ceil(_BURST_S / seconds), 1, _MOST_STEPS))


def _seconds(run, steps):
  start = time.perf_counter()
  run(steps)
  return time.perf_counter() - start


def summary(times: Sequence[float]) -> dict[str, Any]:
  """Median and quartiles in milliseconds, and the number of turns."""
  low, median, high = np.percentile(times, (25, 50, 75)) * 1e3
  return {
    'median_ms': significant(median),
    'quartiles_ms': [significant(low), significant(high)],
    'turns': len(times),
  }


def ratio(times: Sequence[float], reference: Sequence[float]) -> float:
  """Median over turns of the time relative to the reference's in that turn."""
  quotients = np.asarray(times) / np.asarray(reference)
  return significant(np.median(quotients))


def significant(value: float, digits: int = 4) -> float:
  """The value with this many significant digits."""
  return float(f'{value:.{digits}g}')


def machine() -> dict[str, Any]:
  """The machine and the versions of the measurement."""
  installed = {}
  for name in _PACKAGES:
    try:
      installed[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue  # A missing peer has no version.
  device = jax.devices()[0]
  return {
    'cpu': _cpu_model(pathlib.Path('/proc/cpuinfo')),
    'architecture': platform.machine(),
    'cores': cores(),
    'backend': device.platform,
    'device': device.device_kind,
    'num_devices': jax.device_count(),
    'python': platform.python_version(),
    'versions': installed,
    'date': datetime.date.today().isoformat(),
  }


def cores() -> int:
  """The number of cores that this process may use."""
  if hasattr(os, 'sched_getaffinity'):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def _cpu_model(path: pathlib.Path) -> str:
  """The CPU model from Linux's cpuinfo, or from Python on other systems.

  Some clouds hide the name; family and model number still identify it.
  """
  if not path.exists():
    return platform.processor()
  fields = {}
  for line in path.read_text().splitlines():
    name, _, value = line.partition(':')
    fields.setdefault(name.strip(), value.strip())
  model = fields.get('model name', platform.processor())
  numbers = [fields.get(key, '?') for key in ('cpu family', 'model')]
  return f'{model} (family {numbers[0]}, model {numbers[1]})'
