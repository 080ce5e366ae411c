#!/usr/bin/env bash
# Trains on every worker of a TPU VM slice. Run it where gcloud is logged in:
#
#   TPU=my-slice ZONE=europe-west4-b bash launch/tpu_vm.sh \
#     --config=configs/multi_mnist.py:method=f_cagrad --workdir=/mnt/shared/run
#
# The repository must be in ~/mtl_jax on every worker, and the workdir in a
# folder that all workers see (a Filestore share, or a bucket mounted with
# gcsfuse). The arguments go to mtl_jax.main. A slice is one jax job, so the
# command has to start on all workers (--worker=all). Otherwise the started ones
# wait for the others until the initialisation times out. With
# --compilation_cache_dir in the shared folder a restarted run does not compile
# again.
set -euo pipefail
: "${TPU:?set TPU to the name of the TPU VM}" "${ZONE:?set ZONE to its zone}"

command="cd ~/mtl_jax && . launch/env.sh && make_env train,tpu && \
  \"\$VENV_PYTHON\" -m mtl_jax.main --distributed $(printf '%q ' "$@")"
exec gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all \
  --command="bash -c $(printf '%q' "$command")"
