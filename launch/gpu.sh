#!/usr/bin/env bash
# Trains on all GPUs of this machine in one process:
#
#   bash launch/gpu.sh --config=configs/multi_mnist.py:method=f_cagrad \
#     --workdir=runs/f_cagrad
#
# CUDA=12 or 13 (default) chooses the jax to install, CUDA_VISIBLE_DEVICES the
# devices. The arguments go to mtl_jax.main. With --compilation_cache_dir=DIR a
# restarted run does not compile again.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/env.sh
make_env "train,cuda${CUDA:-13}"
exec "$VENV_PYTHON" -m mtl_jax.main "$@"
