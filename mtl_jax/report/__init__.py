"""Tables and figures from the logs of many runs.

`python -m mtl_jax.report DIR...` is the command; the same in a notebook:

  runs, notes = read_runs(['runs'])
  summary = summarise(runs)
  print(markdown(summary))
  curves.learning_curves(summary)

with `from mtl_jax.report import curves`, which needs matplotlib.
"""

from mtl_jax.report.estimates import Estimate
from mtl_jax.report.published import Published
from mtl_jax.report.published import read_published
from mtl_jax.report.results import result
from mtl_jax.report.runs import read_run
from mtl_jax.report.runs import read_runs
from mtl_jax.report.runs import Run
from mtl_jax.report.summary import by_problem
from mtl_jax.report.summary import Row
from mtl_jax.report.summary import summarise
from mtl_jax.report.summary import Summary
from mtl_jax.report.table import csv_text
from mtl_jax.report.table import markdown

__all__ = [
  'Estimate',
  'Published',
  'Row',
  'Run',
  'Summary',
  'by_problem',
  'csv_text',
  'markdown',
  'read_published',
  'read_run',
  'read_runs',
  'result',
  'summarise',
]
