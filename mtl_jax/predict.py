r"""Predictions from a saved run, as a picture of images with their labels.

python -m mtl_jax.predict --workdir=DIR [--out=FILE.png] [--num_images=24] \
  [--choose=first|wrong]
"""

import argparse
from collections.abc import Sequence
import pathlib
import sys

import absl.logging
import jax
import ml_collections
import numpy as np

from mtl_jax import types
from mtl_jax.train import checkpoint
from mtl_jax.train import checks
from mtl_jax.train import experiment as experiments
from mtl_jax.train import run_directory
from mtl_jax.train import step as steps

_COLUMNS = 6


def restore(
  workdir: pathlib.Path,
) -> tuple[experiments.Experiment, steps.TrainState]:
  """The experiment in a run directory and its last saved state.

  Args:
    workdir: a run directory.

  Returns:
    The experiment and its state.

  Raises:
    ValueError: if there is no run or no checkpoint in `workdir`, or if it
      cannot be read.
  """
  values = run_directory.read_config(workdir)
  if values is None:
    raise ValueError(f'workdir {workdir} holds no run: there is no config.json')
  config = ml_collections.ConfigDict(values)
  try:
    checks.check_config(config)
  except ValueError as error:
    raise ValueError(f'the config of the run in {workdir}: {error}') from None
  # The devices of the training run need not be available here.
  config.parallel.update(parameters='replicated', task_devices=1)
  config.data.placement = 'host'
  experiment = experiments.make_experiment(config)
  checkpoints = checkpoint.Checkpoints(workdir, keep=config.keep_checkpoints)
  try:
    restored = checkpoints.restore(experiment.init())
  finally:
    checkpoints.close()
  if restored is None:
    raise ValueError(f'workdir {workdir} holds no checkpoint yet')
  return experiment, restored[0].train


def predict(
  experiment: experiments.Experiment,
  state: steps.TrainState,
  batch: types.Batch,
) -> dict[str, np.ndarray]:
  """The most likely class of each image.

  Args:
    experiment: the experiment.
    state: its state.
    batch: images [B, H, W, C] with their labels.

  Returns:
    {task: classes [B]}.
  """

  def apply(params, model_state, batch):
    batch = experiment.problem.preprocess(batch)
    predictions, _ = experiment.model.apply(
      params, model_state, batch, train=False
    )
    return jax.tree.map(lambda logits: logits.argmax(-1), predictions)

  with jax.default_matmul_precision(experiment.config.precision):
    classes = jax.jit(apply)(state.params, state.model_state, batch)
  return jax.tree.map(np.asarray, classes)


def choose_images(
  labels: dict[str, np.ndarray],
  classes: dict[str, np.ndarray],
  num_images: int,
  choose: str,
) -> np.ndarray:
  """Chooses the images to show.

  Args:
    labels: {task: [N]}.
    classes: {task: [N]}, predicted.
    num_images: the largest number of images.
    choose: `'first'`, or `'wrong'` for the first with a wrong task.

  Returns:
    Indices, ascending.
  """
  size = len(next(iter(labels.values())))
  wrong = np.zeros(size, bool)
  for task, label in labels.items():
    wrong |= label != classes[task]
  candidates = np.flatnonzero(wrong) if choose == 'wrong' else np.arange(size)
  return candidates[:num_images]


def draw(batch: types.Batch, classes: dict[str, np.ndarray], title: str):
  """A figure of images with the predicted class for each task.

  Args:
    batch: images and labels.
    classes: {task: [B]}, predicted.
    title: the figure's title.

  Returns:
    A matplotlib figure; a wrong class is red, followed by the true one.
  """
  from matplotlib import figure as figures

  images = np.asarray(batch['image'])
  rows = -(-max(len(images), 1) // _COLUMNS)
  lines = len(classes)
  figure = figures.Figure(
    figsize=(1.5 * _COLUMNS, rows * (1.4 + 0.2 * lines) + 0.5),
    layout='constrained',
  )
  figure.suptitle(title, fontsize=10)
  axes = figure.subplots(rows, _COLUMNS, squeeze=False).ravel()
  for axis in axes:
    axis.axis('off')
  for i, (axis, image) in enumerate(zip(axes, images, strict=False)):
    axis.imshow(
      image.squeeze(-1) if image.shape[-1] == 1 else image, cmap='gray_r'
    )
    for line, (task, predicted) in enumerate(classes.items()):
      label = batch['labels'][task][i]
      right = predicted[i] == label
      axis.text(
        0.5,
        -0.02 - 0.15 * line,
        f'{task}: {predicted[i]}' + ('' if right else f' (is {label})'),
        transform=axis.transAxes,
        ha='center',
        va='top',
        fontsize=7,
        color='black' if right else 'firebrick',
      )
  return figure


def _check_out(out):
  """Raises if no picture can be written to that path."""
  from matplotlib import backend_bases

  kinds = backend_bases.FigureCanvasBase.get_supported_filetypes()
  # Without a suffix matplotlib adds its default, `.png`.
  if out.suffix and out.suffix[1:].lower() not in kinds:
    raise ValueError(
      f'--out must end in one of {sorted(kinds)}, got {str(out)!r}'
    )
  if not out.parent.is_dir():
    raise ValueError(f'--out: there is no folder {str(out.parent)!r}')


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the command line; returns the exit status."""
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--workdir', type=pathlib.Path, required=True)
  parser.add_argument('--out', type=pathlib.Path)
  parser.add_argument('--num_images', type=int, default=24)
  parser.add_argument('--choose', choices=('first', 'wrong'), default='first')
  args = parser.parse_args(arguments)
  if args.num_images < 1:
    parser.error(f'--num_images must be positive, got {args.num_images}')
  # Libraries log the tracebacks of failed reads.
  absl.logging.set_verbosity(absl.logging.FATAL)
  try:
    return _main(args)
  except (ValueError, OSError) as error:
    print(f'error: {error}', file=sys.stderr)
    return 1


def _main(args):
  out = args.out or args.workdir / 'predictions.png'
  if args.out:
    _check_out(out)
  experiment, state = restore(args.workdir)
  source = experiment.sources['test']
  # The search for wrong predictions covers the first thousand images.
  batch = source.__getitems__(np.arange(min(len(source), 1000)))
  classes = predict(experiment, state, batch)
  labels = {task: np.asarray(batch['labels'][task]) for task in classes}
  chosen = choose_images(labels, classes, args.num_images, args.choose)
  if not len(chosen):
    print('Every prediction is right; nothing to show.')
    return 0
  config = experiment.config
  title = (
    f'{config.method.name} on {config.problem}, test images after step '
    f'{int(state.step)}'
  )
  figure = draw(
    {
      'image': np.asarray(batch['image'])[chosen],
      'labels': {task: label[chosen] for task, label in labels.items()},
    },
    {task: predicted[chosen] for task, predicted in classes.items()},
    title,
  )
  figure.savefig(out, dpi=150, bbox_inches='tight')
  print(f'Written: {out}')
  return 0


if __name__ == '__main__':
  sys.exit(main())
