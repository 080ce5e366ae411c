"""What the command line refuses, and how it ends."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest
import quick_compile

from mtl_jax import main

_ROOT = pathlib.Path(__file__).parents[1]
_CONFIG = str(_ROOT / 'configs' / 'multi_digits.py')


def test_override_replaces_the_value_in_its_type():
  config = main.load_config(
    f'{_CONFIG}:method=cagrad,seed=3',
    [
      '--config.optimizer.learning_rate=1',
      '--config.optimizer.clip=2',
      '--config.model.kwargs.widths=(8, 4)',
      '--config.data.data_dir=/data',
    ],
  )
  assert config.seed == 3
  assert config.method.name == 'cagrad'
  assert repr(config.optimizer.learning_rate) == '1.0'
  assert repr(config.optimizer.clip) == '2.0'
  assert config.model.kwargs.widths == (8, 4)
  assert config.data.data_dir == '/data'


@pytest.mark.parametrize(
  ('override', 'message'),
  [
    ('--config.epchs=3', "'epchs': config has.*did you mean 'epochs'"),
    (
      '--config.optimizer.learning_rat=3',
      "config.optimizer has.*did you mean 'learning_rate'",
    ),
    ('--config.method.flat.rho=1', 'config.method.flat has no keys'),
    ('--config.epochs=many', 'many'),
  ],
)
def test_wrong_override_is_an_error_with_the_nearest_keys(override, message):
  with pytest.raises(ValueError, match=message):
    main.load_config(f'{_CONFIG}:method=cagrad', [override])


@pytest.mark.parametrize(
  ('name', 'text', 'message'),
  [
    ('nowhere.py', None, 'no such file: '),
    ('README.md', '', 'must be a Python file, got '),
    (
      'cut.py',
      'x = 1\ny = (',
      r"is no Python: '\(' was never closed in line 2",
    ),
    ('imports.py', 'import nowhere', "imported: No module named 'nowhere'"),
    ('empty.py', '', 'has no function get_config'),
    ('number.py', 'get_config = len', 'must return a ConfigDict, got int'),
  ],
)
def test_file_that_is_no_config_is_named(tmp_path, name, text, message):
  path = tmp_path / name
  if text is not None:
    path.write_text(text)
  with pytest.raises(ValueError, match=message) as error:
    main.load_config(f'{path}:seed=1')
  assert str(path) in str(error.value)


@pytest.mark.parametrize(
  ('method', 'override', 'value'),
  [
    ('famo', 'gamma=0.01', 0.01),
    ('uncertainty', 'learning_rate=0.01', 0.01),
    ('uncertainty', "likelihood=('gaussian','laplace')", None),
    ('f_linear', 'weights=(0.7,0.3)', (0.7, 0.3)),
    ('graddrop', 'leak=0.5', 0.5),
    ('graddrop', 'leak=(0.5,0.1)', (0.5, 0.1)),
    ('stch', 'nadir_steps=3', 3),
    ('stch', 'ideal=0.5', 0.5),
    ('forum', 'beta=0.5', 0.5),
    ('rlw', 'distribution=uniform', 'uniform'),
  ],
)
def test_hyper_parameter_of_a_method_is_a_key_of_its_config(
  method, override, value
):
  config = main.load_config(
    f'{_CONFIG}:method={method}', [f'--config.method.kwargs.{override}']
  )
  name = override.partition('=')[0]
  assert config.method.kwargs[name] == (value or ('gaussian', 'laplace'))


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ([f'--config={_CONFIG}:method=cagard'], "did you mean 'cagrad'"),
    ([f'--config={_CONFIG}', '--config.sed', '1'], "did you mean 'seed'"),
    ([f'--config={_CONFIG}', '--epochs=3'], r'did you mean --config\.epochs'),
    (
      [f'--config={_CONFIG}', '--learning_rate', '1'],
      r'did you mean --config\.optimizer\.learning_rate',
    ),
    ([f'--config={_CONFIG}', '--config.epochs=2.5'], "literal.* '2.5'"),
    ([f'--config={_CONFIG}', '--config.model=3'], "Failed to parse '3'"),
  ],
)
def test_mistake_on_the_command_line_ends_with_one_plain_message(
  arguments, message
):
  with pytest.raises(SystemExit, match=message) as error:
    main.parse_flags(['main', '--workdir=unused', *arguments])
  assert str(error.value).startswith('error: ')


@pytest.mark.parametrize(
  ('config', 'override', 'message'),
  [
    ('multi_digits', 'engine=roll', "engine must be one of .*, got 'roll'"),
    ('multi_mnist', 'data.source_dir=nowhere', 'source files are missing in'),
  ],
)
def test_error_that_a_user_can_mend_is_one_line_without_a_traceback(
  tmp_path, config, override, message
):
  process = subprocess.run(
    [
      *(sys.executable, '-m', 'mtl_jax.main', f'--workdir={tmp_path / "run"}'),
      f'--config={_ROOT / "configs" / config}.py',
      *(f'--config.data.data_dir={tmp_path}', f'--config.{override}'),
    ],
    cwd=_ROOT,
    env={**os.environ, 'XLA_FLAGS': quick_compile.FLAGS},
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
  )
  assert process.returncode == 1
  assert re.search(f'^error: .*{message}', process.stderr, re.MULTILINE)
  assert 'Traceback' not in process.stderr


# Does something the first time that a module is asked for.
_AT_IMPORT = """
import os, signal, sys

class Finder:
  def find_spec(name, path, target=None):
    if name == {module!r}:
      sys.meta_path.remove(Finder)
      {act}

sys.meta_path.insert(0, Finder)
"""


@pytest.mark.parametrize(
  ('module', 'act', 'status', 'message'),
  [
    # The first that takes long, and the last of all.
    *(
      (module, 'os.kill(os.getpid(), signal.SIGINT)', 130, 'SIGINT ended')
      for module in ('jax', 'mtl_jax.train.window')
    ),
    (
      'ml_collections',
      'raise ModuleNotFoundError(f"No module named {name!r}", name=name)',
      1,
      r"error: No module named 'ml_collections'.* 'mtl_jax\[train\]'",
    ),
  ],
)
def test_program_that_ends_in_its_imports_says_why_in_one_line(
  tmp_path, module, act, status, message
):
  (tmp_path / 'sitecustomize.py').write_text(
    _AT_IMPORT.format(module=module, act=act)
  )
  process = subprocess.run(
    [sys.executable, '-m', 'mtl_jax.main', '--help'],
    cwd=_ROOT,
    env={**os.environ, 'PYTHONPATH': str(tmp_path)},
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
  )
  assert process.returncode == status, process.stderr
  (line,) = process.stderr.splitlines()
  assert re.match(message, line)


_SIGNALLED = """
import os, signal, sys
from mtl_jax import main
from mtl_jax.train import loop, lock

def train(config, workdir, **options):
  with lock.hold(workdir):
    os.kill(os.getpid(), int(sys.argv.pop()))

loop.train = train
main.app.run(main.main, flags_parser=lambda argv: main.parse_flags(argv[:-1]))
"""


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_signal_before_there_is_anything_to_save_cleans_up_in_one_line(
  tmp_path, number
):
  process = subprocess.run(
    [
      *(sys.executable, '-c', _SIGNALLED, f'--config={_CONFIG}'),
      *(f'--workdir={tmp_path}', str(int(number))),
    ],
    cwd=_ROOT,
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
  )
  assert process.returncode == 128 + number, process.stderr
  assert process.stderr == f'{number.name} ended the program.\n'
  # The lock is released.
  assert not list(tmp_path.iterdir())


def test_ctrl_c_saves_and_ends_with_its_own_status_and_a_message(tmp_path):
  process = subprocess.Popen(
    [
      *(sys.executable, '-m', 'mtl_jax.main', f'--workdir={tmp_path}'),
      *(f'--config={_CONFIG}:runlocal,method=linear', '--config.epochs=100000'),
      '--config.checkpoint_every_steps=1000000',
    ],
    cwd=_ROOT,
    env={**os.environ, 'XLA_FLAGS': quick_compile.FLAGS},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  try:
    log = tmp_path / 'metrics.jsonl'
    while process.poll() is None and not (log.exists() and log.read_text()):
      time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
  finally:
    process.kill()
  assert process.returncode == main.EXIT_INTERRUPTED, errors
  assert 'SIGINT stopped the run after step' in errors
  assert 'the same command goes on' in errors
  (saved,) = (tmp_path / 'checkpoints').iterdir()
  last = json.loads(log.read_text().splitlines()[-1])
  assert last['step'] <= int(saved.name) < last['step'] + 5


_CACHING = """
import sys
import jax
from mtl_jax import main
from mtl_jax.train import loop

def train(config, workdir, **options):
  # One of those that JAX by itself finds too small to keep.
  return {'nine': jax.jit(lambda x: 3 * x)(3.0)}

loop.train = train
main.app.run(main.main, flags_parser=main.parse_flags)
"""


def test_second_process_finds_the_programs_that_the_first_compiled(tmp_path):
  cache = tmp_path / 'cache'
  found = []
  for _ in range(2):
    process = subprocess.run(
      [
        *(sys.executable, '-c', _CACHING, f'--config={_CONFIG}'),
        *('--workdir=unused', f'--compilation_cache_dir={cache}'),
      ],
      cwd=_ROOT,
      env={**os.environ, 'XLA_FLAGS': quick_compile.FLAGS},
      capture_output=True,
      text=True,
      timeout=120,
      check=False,
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout == 'nine 9.0000\n'
    programs = [p for p in cache.iterdir() if p.name.endswith('-cache')]
    found.append({p.name: p.stat().st_mtime_ns for p in programs})
  assert any('lambda' in name for name in found[0])
  assert found[1] == found[0]
