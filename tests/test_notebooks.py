"""Notebooks run from top to bottom."""

import pathlib

import pytest

_NOTEBOOKS = sorted(
  (pathlib.Path(__file__).parent.parent / 'notebooks').glob('*.ipynb')
)


@pytest.mark.filterwarnings('default')  # Jupyter's own, beyond our reach.
@pytest.mark.parametrize('path', _NOTEBOOKS, ids=lambda path: path.name)
def test_every_cell_of_the_notebook_runs(path, monkeypatch):
  import nbclient
  import nbformat

  # The kernel is another process: it finds this checkout by its path.
  monkeypatch.setenv('PYTHONPATH', str(path.parent.parent))
  monkeypatch.setenv('MPLBACKEND', 'Agg')
  notebook = nbformat.read(path, as_version=4)
  nbclient.NotebookClient(
    notebook, timeout=240, kernel_name='python3'
  ).execute()
  printed = ''.join(
    output.get('text', '')
    for cell in notebook.cells
    if cell.cell_type == 'code'
    for output in cell.outputs
  )
  assert 'f_cagrad' in printed
