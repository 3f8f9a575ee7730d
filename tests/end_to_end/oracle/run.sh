#!/usr/bin/env bash
# Runs one of the tests that compare with Python's transformers. Exit status 77: the Python environment is not there.
# usage: run.sh DSATRAIN TEST.py [unittest arguments...]
set -euo pipefail
environment=${DSATRAIN_DEPS:-$HOME/.cache/dsatrain}/oracle
if [ ! -f "$environment/.transformers-5.23.0" ] || [ ! -f "$environment/.accelerate-1.15.0" ]; then
  echo "oracle environment missing (no $environment) run tools/setup.sh --oracle"
  exit 77
fi
binary=$1 test=$2
shift 2
export OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=1
exec "$environment/bin/python" "$(dirname "$0")/$test" "$binary" -v "$@"
