"""Multi-Digits: two overlapped 8x8 digits, real data without a download.

Stands for: no row of a paper. The same construction as Multi-MNIST on the
  digits that come with scikit-learn, small enough for a first run.
Command: python -m mtl_jax.main --config=configs/multi_digits.py:method=f_cagrad
  --workdir=runs/multi_digits/f_cagrad
Hardware: two CPU cores. Time: about 5 s of training for a plain method, 10 s
  for f_cagrad, and the start-up.
Expected score: test accuracy in per cent, mean over tasks and 3 seeds: stl
  94.2, linear 91.8, cagrad 91.8, f_cagrad 93.4, all of them in
  results/multi_digits_quickstart.json. The radius 0.2 of f_cagrad is the best
  on the validation split among 0.05, 0.1 and 0.2.

Arguments: `method`, `seed`, `runlocal`; see `configs/methods.py` for methods.
"""

import ml_collections

from configs import common
from configs import methods


def get_config(argument: str = '') -> ml_collections.ConfigDict:
  """The config; `argument` is the text after the colon on the command line."""
  args = common.parse_arguments(
    argument, method='f_cagrad', seed=0, runlocal=False
  )
  config = common.make_config(
    problem='multi_digits',
    method=methods.entry(args.method, rho=0.2),
    model='mlp',
    model_kwargs={'widths': (256, 128), 'dropout': 0.0, 'remat': 'none'},
    seed=args.seed,
  )
  config.batch_size = 128
  config.epochs = 60
  config.eval_every_epochs = 4
  config.log_every_steps = 37
  if args.runlocal:
    common.run_local(config, widths=(16, 8))
  return config.lock()
