#!/usr/bin/env bash
# Trains single-task networks, equal weights, CAGrad and flat-minima CAGrad on
# Multi-Digits (real scans, no download), three seeds each, and shows the table.
# A second call skips finished runs. PYTHON chooses the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/env.sh
make_env train

out=runs/quickstart
"$VENV_PYTHON" launch/sweep.py --config=configs/multi_digits.py \
  --methods=stl,linear,cagrad,f_cagrad --seeds=0,1,2 --root="$out"
echo
"$VENV_PYTHON" -m mtl_jax.report "$out" --out="$out/report"
