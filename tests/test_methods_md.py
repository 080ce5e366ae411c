"""METHODS.md describes every method and names files that exist."""

import inspect
import pathlib
import re

from mtl_jax import transforms

_ROOT = pathlib.Path(__file__).parent.parent
_TEXT = (_ROOT / 'METHODS.md').read_text()
_ROOMS = ('aggregators', 'weightings', 'bilevel', 'wrappers')
# Functions on the state of a method, which make none.
_NO_FACTORY = {'after_step', 'left_out'}
_ROW = re.compile(r'^\| \[`(\w+)`\]\(#(\w+)\) \| .+ \| \[`.+`\]\((\S+)\) \|$')


def _factories():
  rooms = [getattr(transforms, room) for room in _ROOMS]
  public = [(n, getattr(room, n)) for room in rooms for n in room.__all__]
  return {
    name: value
    for name, value in public
    if inspect.isfunction(value) and name not in _NO_FACTORY
  }


def _index():
  """Section and file of every name in the index."""
  rows = [_ROW.match(line) for line in _TEXT.splitlines()]
  return {row[1]: (row[2], row[3]) for row in rows if row}


def _sections():
  return re.findall(r'^### `(\w+)`$', _TEXT, re.MULTILINE)


def test_every_factory_has_a_section():
  assert set(_factories()) <= set(_sections())


def test_index_links_the_file_that_defines_a_factory():
  files = {name: file for name, (_, file) in _index().items()}
  defined = {
    name: str(pathlib.Path(inspect.getfile(factory)).relative_to(_ROOT))
    for name, factory in _factories().items()
  }
  assert {name: files.get(name) for name in defined} == defined


def test_index_has_one_row_a_section_and_links_it():
  sections = {name: section for name, (section, _) in _index().items()}
  assert sections == {name: name for name in _sections()}


def test_every_file_that_is_named_exists():
  named = re.findall(r'[(`]((?:mtl_jax|tests)/[\w/]+\.py)[)`]', _TEXT)
  assert len(named) > len(_index())
  assert [file for file in named if not (_ROOT / file).is_file()] == []


def test_rows_of_tables_are_short_enough_to_read():
  rows = [line for line in _TEXT.splitlines() if line.startswith('|')]
  assert [row for row in rows if len(row) > 200] == []
