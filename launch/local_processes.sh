#!/usr/bin/env bash
# Many processes on this host, to try the behaviour of a pod.
#
#   PROCESSES=2 bash launch/local_processes.sh \
#     --config=configs/multi_digits.py:method=f_cagrad,runlocal --workdir=/tmp/run
#
# Every process gets DEVICES virtual CPU devices (default 2). The arguments go to
# mtl_jax.main. If one process fails, the others are stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/env.sh
make_env train

processes=${PROCESSES:-2}
port=${PORT:-$("$VENV_PYTHON" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')}
export JAX_PLATFORMS=cpu
export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=${DEVICES:-2}"

children=()
# Each child gets one signal: it saves at the first and ends at the second.
stop() {
  trap - EXIT
  kill "${children[@]}" 2>/dev/null || true
}
trap stop EXIT
trap 'stop; wait; exit 75' TERM
# Ctrl-C also reaches the children. A child that is still starting ignores it; a
# second Ctrl-C ends them all.
trap 'trap - EXIT; trap "stop; wait; exit 75" INT; wait; exit 75' INT
for ((i = 0; i < processes; i++)); do
  "$VENV_PYTHON" -m mtl_jax.main --coordinator_address="127.0.0.1:$port" \
    --num_processes="$processes" --process_id="$i" "$@" &
  children+=($!)
done
for ((i = 0; i < processes; i++)); do wait -n; done
trap - EXIT
