#!/usr/bin/env bash
# Trains on all GPUs of this machine, as one process:
#
#   bash launch/gpu.sh --config=configs/multi_mnist.py:method=f_cagrad \
#     --workdir=runs/f_cagrad
#
# CUDA=12 or 13 (default) chooses the jax to install; CUDA_VISIBLE_DEVICES the
# devices. The arguments go to mtl_jax.main; --compilation_cache_dir=DIR spares
# a run that is started again its compilation.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/env.sh
make_env "train,cuda${CUDA:-13}"
exec "$VENV_PYTHON" -m mtl_jax.main "$@"
