#!/usr/bin/env bash
#SBATCH --job-name=mtl_jax
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=8
#SBATCH --time=08:00:00
#SBATCH --signal=TERM@120
#
# One process a task, one jax job over all of them:
#
#   sbatch --nodes=2 launch/slurm.sh \
#     --config=configs/multi_mnist.py:method=f_cagrad --workdir=/scratch/run
#
# Run it from the repository; the arguments go to mtl_jax.main. Two minutes
# before the limit Slurm sends SIGTERM: the run saves and ends, and the same
# command continues from there. With --compilation_cache_dir=/scratch/xla it
# does not compile again.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?start this with sbatch, from the repository}"
. launch/env.sh
make_env "train,cuda${CUDA:-13}"

distributed=()
if [ "${SLURM_NTASKS:-1}" -gt 1 ]; then distributed=(--distributed); fi
exec srun "$VENV_PYTHON" -m mtl_jax.main "${distributed[@]}" "$@"
