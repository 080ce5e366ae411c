"""The command `python -m mtl_jax.report DIR...`, for tables and figures."""

import argparse
from collections.abc import Sequence
import pathlib
import shlex
import sys

from mtl_jax.report.curves import gradient_conflict
from mtl_jax.report.curves import learning_curves
from mtl_jax.report.dots import final_scores
from mtl_jax.report.panels import save
from mtl_jax.report.published import Published
from mtl_jax.report.published import read_published
from mtl_jax.report.results import dumps
from mtl_jax.report.results import result
from mtl_jax.report.runs import read_runs
from mtl_jax.report.runs import Run
from mtl_jax.report.summary import BEST_TEST
from mtl_jax.report.summary import by_problem
from mtl_jax.report.summary import summarise
from mtl_jax.report.summary import Summary
from mtl_jax.report.table import csv_text
from mtl_jax.report.table import markdown


def main(arguments: Sequence[str] | None = None) -> int:
  """Writes the report and prints its tables.

  Args:
    arguments: the command line without the program, by default the process's.

  Returns:
    The exit status: 0, or 2 for bad input, with an explanation on standard
    error.
  """
  if arguments is None:
    arguments = sys.argv[1:]
  flags = _parse(arguments)
  try:
    written = _report(flags, shlex.join(arguments))
  except (ValueError, OSError) as error:
    print(f'mtl_jax.report: {error}', file=sys.stderr)
    return 2
  print('Written:')
  for path in written:
    print(f'  {path}')
  return 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    prog='python -m mtl_jax.report',
    description='Table and figures from the logs of many runs.',
  )
  parser.add_argument(
    'directories',
    metavar='DIR',
    nargs='+',
    help='folders in and below which to look for run directories',
  )
  parser.add_argument(
    '--out', metavar='DIR', help='where to write (default: first DIR/report)'
  )
  parser.add_argument(
    '--json',
    metavar='FILE',
    help='write a result file: every number with config, versions and commit '
    '(with several problems, one file each: FILE with its name added)',
  )
  parser.add_argument(
    '--published',
    metavar='FILE',
    action='append',
    default=[],
    help='show the published numbers in FILE beside ours; may be repeated',
  )
  parser.add_argument(
    '--best_test',
    action='store_true',
    help='add a table by the best test epoch, to compare with scripts that '
    'select so',
  )
  return parser.parse_args(arguments)


def _report(flags: argparse.Namespace, command: str) -> list[pathlib.Path]:
  runs, notes = read_runs(flags.directories)
  problems = by_problem(runs)
  out = pathlib.Path(flags.out or pathlib.Path(flags.directories[0], 'report'))
  written = []
  for problem, own in problems.items():
    several = len(problems) > 1
    folder = out / problem if several else out
    json_file = pathlib.Path(flags.json) if flags.json else None
    if json_file and several:
      json_file = json_file.with_stem(f'{json_file.stem}.{problem}')
    written += _one_problem(own, folder, json_file, flags, command, notes)
  for note in notes:
    print(note)
  return written


def _one_problem(
  runs: Sequence[Run],
  folder: pathlib.Path,
  json_file: pathlib.Path | None,
  flags: argparse.Namespace,
  command: str,
  notes: Sequence[str],
) -> list[pathlib.Path]:
  summary = summarise(runs)
  best_test = summarise(runs, BEST_TEST) if flags.best_test else None
  found = [read_published(path, summary) for path in flags.published]
  published = [source for source in found if source is not None]
  if flags.published and not published:
    print(f'No published numbers for the methods on {summary.problem}.\n')

  tables = [markdown(summary, published)]
  texts = {'table.csv': csv_text(summary)}
  if best_test is not None:
    tables.append(markdown(best_test, published))
    texts['table_best_test.csv'] = csv_text(best_test)
  texts['table.md'] = '\n'.join(tables)

  folder.mkdir(parents=True, exist_ok=True)
  written = []
  for name, text in texts.items():
    (folder / name).write_text(text, encoding='utf-8')
    written.append(folder / name)
  if summary.rows:
    written += _figures(summary, published, folder)
  if json_file:
    tree = result(
      summary,
      command=f'python -m mtl_jax.report {command}',
      best_test=best_test,
      notes=notes,
    )
    json_file.parent.mkdir(parents=True, exist_ok=True)
    json_file.write_text(dumps(tree) + '\n', encoding='utf-8')
    written.append(json_file)
  print(texts['table.md'])
  return written


def _figures(
  summary: Summary, published: Sequence[Published], folder: pathlib.Path
) -> list[pathlib.Path]:
  drawn = {
    'learning_curves.png': learning_curves(summary),
    'gradient_conflict.png': gradient_conflict(summary),
    'final_scores.png': final_scores(summary, published),
  }
  written = []
  for name, figure in drawn.items():
    if figure is not None:
      save(figure, folder / name)
      written.append(folder / name)
  return written


if __name__ == '__main__':
  sys.exit(main())
