r"""Preparation of datasets from raw files, for training.

    python -m mtl_jax.data.prepare --data_dir=DIR [--source_dir=DIR] \
      [--dataset=multi_mnist|multi_fashion|multi_fashion_and_mnist|all]

Without a source folder the raw files are downloaded. Running it again is
harmless.
"""

import argparse
import contextlib
import io
import os
import sys
import time

from mtl_jax.data import idx
from mtl_jax.data import multi_mnist


def prepare(
  name: str,
  data_dir: str | os.PathLike | None = None,
  source_dir: str | os.PathLike | None = None,
  *,
  progress: bool = False,
) -> str:
  """Prepares a dataset, unless it already exists.

  The files are written into a temporary folder that gets its name at the end:
  the remains of an interrupted call never count as a dataset. If two processes
  prepare at the same time, the later one drops its work.

  Args:
    name: 'multi_mnist', 'multi_fashion' or 'multi_fashion_and_mnist'.
    data_dir: the folder to write to; None is tensorflow-datasets' own default.
    source_dir: a folder of raw files with `mnist/` and `fashion_mnist/`; None
      for the one in `MTL_JAX_SOURCE_DIR`, or to download without it.
    progress: whether tensorflow-datasets shows its messages and bars. After a
      preparation its switch for bars stays as set here.

  Returns:
    The folder of the prepared dataset.

  Raises:
    FileNotFoundError: if the source folder lacks files; the message names them.
    ValueError: if there is no such dataset, if a source file is cut short or
      foreign, or if the dataset exists but was made from other files.
    ConnectionError: if the files cannot be downloaded.
  """
  folder = idx.source_folder(source_dir)
  builder = multi_mnist.make_builder(name, data_dir, folder)
  if multi_mnist.is_prepared(builder):
    if folder is not None:
      multi_mnist.check_source(builder, folder)
    return builder.data_dir
  import tensorflow_datasets as tfds

  tfds.display_progress_bar(progress)
  # tensorflow-datasets prints; a library should not.
  quiet = contextlib.redirect_stdout(io.StringIO())
  try:
    with contextlib.nullcontext() if progress else quiet:
      builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(try_download_gcs=False)
      )
  except OSError:
    # If another process was faster, the folder cannot get its name.
    if not multi_mnist.is_prepared(builder):
      raise
  return builder.data_dir


def main(argv: list[str] | None = None) -> None:
  """The command line."""
  parser = argparse.ArgumentParser(
    prog='python -m mtl_jax.data.prepare',
    description='Prepares datasets for training.',
  )
  parser.add_argument(
    '--dataset', default='all', choices=(*multi_mnist.NAMES, 'all')
  )
  parser.add_argument(
    '--data_dir', help="where to write (default: tensorflow-datasets' own)"
  )
  parser.add_argument(
    '--source_dir',
    help='a folder holding mnist/ and fashion_mnist/ with the original files '
    f'(default: {idx.SOURCE_DIR_VARIABLE}, or else they are downloaded)',
  )
  args = parser.parse_args(argv)
  names = multi_mnist.NAMES if args.dataset == 'all' else (args.dataset,)
  for name in names:
    start = time.monotonic()
    print(f'preparing {name} ...', flush=True)
    try:
      folder = prepare(
        name, args.data_dir, args.source_dir, progress=sys.stderr.isatty()
      )
    except (OSError, ValueError) as error:
      parser.exit(1, f'{name}: {error}\n')
    print(f'{name} is ready in {folder} ({time.monotonic() - start:.0f} s)')


if __name__ == '__main__':
  main()
