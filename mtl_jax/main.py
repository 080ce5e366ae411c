r"""Trains one run, from the command line.

python -m mtl_jax.main --config=configs/multi_mnist.py:method=f_cagrad \
  --workdir=DIR [--config.optimizer.learning_rate=3e-4 ...]

The exit status is 0 when the run is finished, 75 ("try again") when a signal
stopped it and everything is saved, 130 (Ctrl-C) or 143 (SIGTERM) when a signal
came before there was anything to save, and 1 after an error. `-v 1` shows where
in the code an error comes from.
"""

from collections.abc import Sequence
import difflib
import importlib.util
import logging
import pathlib
import re
import sys

from absl import app
from absl import flags
import absl.logging
import jax
import ml_collections
from ml_collections import config_flags

from mtl_jax.train import command_line
from mtl_jax.train import distributed
from mtl_jax.train import loop
from mtl_jax.train import stopping
from mtl_jax.train import window

EXIT_INTERRUPTED = 75

_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'FILE.py[:ARGUMENTS], the config of the run.'
)
_WORKDIR = flags.DEFINE_string('workdir', None, "The run's own folder.")
_OVERWRITE_CONFIG = flags.DEFINE_bool(
  'overwrite_config', False, 'Continue in a workdir with another config.'
)
_DISTRIBUTED = flags.DEFINE_bool(
  'distributed',
  False,
  'Run as one of several processes, which JAX detects in the environment (a '
  'Cloud TPU pod, Slurm, Open MPI). The next three flags imply it.',
)
_COORDINATOR = flags.DEFINE_string(
  'coordinator_address', None, 'host:port of process 0.'
)
_NUM_PROCESSES = flags.DEFINE_integer(
  'num_processes', None, 'Number of processes.'
)
_PROCESS_ID = flags.DEFINE_integer('process_id', None, 'Which process this is.')
_TIMEOUT = flags.DEFINE_integer(
  'initialization_timeout', 300, 'Seconds to wait for the other processes.'
)
_COMPILATION_CACHE = flags.DEFINE_string(
  'compilation_cache_dir',
  None,
  'Keeps compiled programs in this folder: the same run started again, after '
  'a stop or on many processes, does not compile again.',
)


def load_config(
  argument: str, overrides: Sequence[str] = ()
) -> ml_collections.ConfigDict:
  """The config from a command line.

  Args:
    argument: the value of `--config=`: path of a Python file with `get_config`
      and, after a colon, the argument for that function.
    overrides: arguments such as `'--config.epochs=3'`.

  Returns:
    The config, locked.

  Raises:
    ValueError: if the file does not exist, is not a config or rejects its
      arguments, if a key is unknown (the message names the nearest) or if a
      value does not fit.
  """
  config = _read_config(argument)
  _override(config, overrides)
  return config


def _read_config(argument):
  """The config that a file returns, locked."""
  path, _, arguments = argument.partition(':')
  if not pathlib.Path(path).exists():
    raise ValueError(f'config: no such file: {path!r}')
  if not path.endswith('.py') or not pathlib.Path(path).is_file():
    raise ValueError(f'config must be a Python file, got {path!r}')
  # Configs import their common parts from the folder above them.
  root = str(pathlib.Path(path).resolve().parent.parent)
  if root not in sys.path:
    sys.path.append(root)
  spec = importlib.util.spec_from_file_location('config', path)
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
  except SyntaxError as error:
    raise ValueError(
      f'config {path!r} is no Python: {error.msg} in line {error.lineno} of '
      f'{error.filename}'
    ) from None
  except ImportError as error:
    raise ValueError(f'config {path!r} cannot be imported: {error}') from error
  if not callable(getattr(module, 'get_config', None)):
    raise ValueError(f'config {path!r} has no function get_config')
  config = module.get_config(arguments)
  if not isinstance(config, ml_collections.ConfigDict):
    raise ValueError(
      f'get_config of {path!r} must return a ConfigDict, got '
      f'{type(config).__name__}'
    )
  return config.lock()


def _override(config, argv, *, known_only=False):
  """Sets the overrides from a command line in a config."""
  check_overrides(config, argv)
  values = flags.FlagValues()
  try:
    config_flags.DEFINE_config_dict(
      'config', config, flag_values=values, sys_argv=['', *argv]
    )
    values(['', *argv], known_only=known_only)
  except flags.Error as error:
    raise ValueError(str(error)) from None


def check_overrides(
  config: ml_collections.ConfigDict, argv: Sequence[str]
) -> None:
  """Raises a ValueError that names the nearest keys if one is unknown.

  Args:
    config: the config.
    argv: command line; only arguments like `--config.seed=1` matter.
  """
  for argument in argv:
    match = re.match(r'--?(?:no)?config\.([^=]+)', argument)
    if not match:
      continue
    node, path = config, ''
    for part in match[1].split('.'):
      keys = list(node) if isinstance(node, ml_collections.ConfigDict) else []
      if part not in keys:
        where = f'config{path}'
        near = difflib.get_close_matches(part, keys, cutoff=0.5)
        hint = f'; did you mean {" or ".join(map(repr, near))}?' if near else ''
        raise ValueError(
          f'unknown config key {match[1]!r}: {where} has '
          + (f'the keys {sorted(keys)}' if keys else 'no keys')
          + hint
        )
      node, path = node[part], f'{path}.{part}'


def _check_flags(config, argv):
  """Raises if a flag is a config key without its `config.` prefix."""
  paths = list(_paths(config))
  for argument in argv:
    match = re.match(r'--?(?:no)?([a-z]\w*(?:\.\w+)*)', argument)
    if argument == '--':
      return
    if not match or match[1].startswith('config.') or match[1] in flags.FLAGS:
      continue
    meant = [x for x in paths if f'.{x}'.endswith(f'.{match[1]}')]
    if meant:
      hint = ' or '.join(f'--config.{path}' for path in meant)
      raise ValueError(f'unknown flag --{match[1]}; did you mean {hint}?')


def _paths(config, prefix=''):
  """The keys of a config, joined by dots."""
  for key in config:
    yield f'{prefix}{key}'
    if isinstance(config[key], ml_collections.ConfigDict):
      yield from _paths(config[key], f'{prefix}{key}.')


def parse_flags(argv: Sequence[str]) -> list[str]:
  """Parses the command line; reports a wrong config in one line."""
  early = flags.FlagValues()
  flags.DEFINE_string('config', None, '', flag_values=early)
  rest = early(argv, known_only=True)
  try:
    if early.config:
      config = _read_config(early.config)
      _check_flags(config, rest[1:])
      _override(config, rest[1:], known_only=True)
  except ValueError as error:
    sys.exit(f'error: {error}')
  return app.parse_flags_with_usage(argv)


def keep_compilations(directory: str) -> None:
  """Makes JAX keep every compiled program in a folder and look there first.

  Args:
    directory: the folder; created if it does not exist.
  """
  # By default JAX skips programs that compile in less than a second, and the
  # start of a run needs many of those.
  for name, value in (
    ('jax_compilation_cache_dir', directory),
    ('jax_persistent_cache_min_compile_time_secs', 0.0),
    ('jax_persistent_cache_min_entry_size_bytes', -1),
  ):
    jax.config.update(name, value)


def main(argv: Sequence[str]) -> None:
  """Starts JAX according to the flags and calls the loop."""
  if len(argv) > 1:
    sys.exit(f'error: arguments begin with --, got {" ".join(argv[1:])}')
  if not flags.FLAGS['verbosity'].present:
    # Our own messages, without the libraries' chatter.
    absl.logging.set_verbosity(absl.logging.WARNING)
    logging.getLogger('mtl_jax').setLevel(logging.INFO)
  given = (_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
  try:
    with command_line.tidy_end():
      if _DISTRIBUTED.value or any(x is not None for x in given):
        distributed.initialize(*given, timeout_s=_TIMEOUT.value)
      if _COMPILATION_CACHE.value:
        keep_compilations(_COMPILATION_CACHE.value)
      metrics = loop.train(
        _CONFIG.value, _WORKDIR.value, overwrite_config=_OVERWRITE_CONFIG.value
      )
  except stopping.Interrupted as interruption:
    print(interruption, file=sys.stderr)
    sys.exit(EXIT_INTERRUPTED)
  except (
    # Errors that a user can fix, with a message that says how.
    ValueError,
    OSError,
    window.NonFiniteLossError,
  ) as error:
    logging.debug('The error comes from:', exc_info=True)
    sys.exit(f'error: {error}')
  if distributed.is_main():
    for name, value in metrics.items():
      print(f'{name} {value:.4f}')


if __name__ == '__main__':
  flags.mark_flags_as_required(['config', 'workdir'])
  app.run(main, flags_parser=parse_flags)
