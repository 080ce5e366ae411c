"""Packages import each other in one direction only."""

import ast
import pathlib
import subprocess
import sys

import pytest

_ROOT = pathlib.Path(__file__).parent.parent
_BELOW_PROBLEMS = {'types', 'data', 'models', 'losses', 'metrics'}
_BELOW_TRAIN = _BELOW_PROBLEMS | {
  'transforms',
  'gradients',
  'updates',
  'problems',
}
ALLOWED = {
  'types': set(),
  'transforms': set(),
  'gradients': {'types', 'transforms'},
  'updates': {'types', 'transforms', 'gradients'},
  'data': {'types'},
  'models': {'types'},
  'losses': {'types'},
  'metrics': {'types'},
  'problems': _BELOW_PROBLEMS,
  'train': _BELOW_TRAIN,
  'report': {'types', 'metrics'},
  'main': _BELOW_TRAIN | {'train', 'report'},
  'predict': _BELOW_TRAIN | {'train', 'report'},
  '__init__': {'gradients', 'transforms', 'updates', 'train'},
}

# Inside `transforms`.
ROOMS = {
  'contract': set(),
  'solvers': {'contract'},
  'weightings': {'contract'},
  'wrappers': {'contract'},
  'aggregators': {'contract', 'solvers'},
  'bilevel': {'contract', 'solvers', 'weightings'},
}


def _imports(path):
  """(module, names) of every import in a file."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      for alias in node.names:
        yield alias.name, ()
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'relative import in {path}'
      yield node.module, tuple(alias.name for alias in node.names)


def _packages(path):
  """The packages of the project that a file imports."""
  for module, names in _imports(path):
    parts = module.split('.')
    if parts[0] != 'mtl_jax':
      continue
    yield from [parts[1]] if len(parts) > 1 else names


def _rooms(path):
  """The rooms of `transforms` that a file imports."""
  for module, names in _imports(path):
    parts = module.split('.')
    if parts[:2] == ['mtl_jax', 'transforms']:
      yield from [parts[2]] if len(parts) > 2 else names


def _files(package):
  folder = _ROOT / 'mtl_jax' / package
  single = folder.with_suffix('.py')
  return [single] if single.exists() else sorted(folder.rglob('*.py'))


def test_table_names_every_package():
  there = {
    path.stem
    for path in (_ROOT / 'mtl_jax').iterdir()
    if path.suffix == '.py' or (path.is_dir() and list(path.glob('*.py')))
  }
  assert there == set(ALLOWED)


@pytest.mark.parametrize('package', ALLOWED)
def test_package_imports_only_what_the_table_allows(package):
  for path in _files(package):
    found = set(_packages(path)) - {package}
    assert found <= ALLOWED[package], path


@pytest.mark.parametrize('room', ROOMS)
def test_room_of_transforms_imports_only_what_the_table_allows(room):
  for path in _files(f'transforms/{room}'):
    assert set(_rooms(path)) - {room} <= ROOMS[room], path


def test_table_names_every_room_of_transforms():
  folder = _ROOT / 'mtl_jax' / 'transforms'
  there = {path.parent.name for path in folder.glob('*/*.py')}
  assert there == set(ROOMS)
  assert [path.name for path in folder.glob('*.py')] == ['__init__.py']


def test_transforms_need_jax_numpy_and_optax_alone():
  allowed = {'jax', 'numpy', 'optax', 'mtl_jax'} | sys.stdlib_module_names
  for path in [
    path
    for name in ('transforms', 'gradients', 'updates', 'types')
    for path in _files(name)
  ]:
    used = {module.split('.')[0] for module, _ in _imports(path)}
    assert used <= allowed, path


def test_importing_the_project_imports_no_heavy_package():
  heavy = ('flax', 'orbax', 'tensorflow_datasets', 'grain', 'matplotlib')
  code = (
    'import sys, mtl_jax; '
    f'print([name for name in {heavy!r} if name in sys.modules])'
  )
  done = subprocess.run(
    [sys.executable, '-c', code],
    cwd=_ROOT,
    capture_output=True,
    text=True,
    check=True,
  )
  assert done.stdout.strip() == '[]'
