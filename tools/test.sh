#!/usr/bin/env bash
# Installs what is missing, builds, and runs every test.
# usage: tools/test.sh [--oracle] [ctest arguments...]
#   --oracle   also the tests that compare with Python's transformers (installs 5 GB once)
set -euo pipefail
cd "$(dirname "$0")/.."
setup=()
if [ "${1:-}" = --oracle ]; then setup=(--oracle); shift; fi
tools/setup.sh "${setup[@]}"
tools/build.sh
# A test whose tools are not installed, or whose machine has no GPU, shows as Skipped.
ctest --test-dir "${BUILD:-build}" --output-on-failure -j "$(nproc)" "$@"
