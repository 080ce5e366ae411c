#!/usr/bin/env bash
# Makes the environment and runs the tests; further arguments go to pytest:
#   bash launch/test.sh                           # as in .ci/run
#   bash launch/test.sh --all                     # the slow ones too
#   bash launch/test.sh tests/transforms -k cagrad
# PYTHON chooses the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/env.sh
make_env train,dev

which=(-m 'not slow')
if [ "${1-}" = --all ]; then
  which=()
  shift
fi
# Two workers at most: every worker runs eight virtual devices.
workers=$("$VENV_PYTHON" -c 'import os; print(min(2, os.cpu_count() or 1))')
exec "$VENV_PYTHON" -m pytest -n "$workers" --dist=loadgroup ${which[@]+"${which[@]}"} "$@"
