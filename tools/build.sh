#!/usr/bin/env bash
# Builds dsatrain and its tests into build/ (override: BUILD=folder). The binary is build/dsatrain.
# usage: tools/build.sh [target...]
set -euo pipefail
cd "$(dirname "$0")/.."
build=${BUILD:-build}
export CCACHE_BASEDIR=$PWD CCACHE_NOHASHDIR=1
deps=${DSATRAIN_DEPS:-$HOME/.cache/dsatrain}
torch=${DSA_TORCH_DIR:-$(ls -d "$deps"/torch-{cuda,cpu}/lib/python3*/site-packages/torch 2>/dev/null | head -1 || true)}
if [ ! -f "$build/build.ninja" ]; then
  cmake -S . -B "$build" -G Ninja -DCMAKE_CXX_COMPILER_LAUNCHER=ccache -DCMAKE_CUDA_COMPILER_LAUNCHER=ccache ${torch:+-DDSA_TORCH_DIR="$torch"} ${CMAKE_ARGS:-}
fi
cmake --build "$build" -j "${JOBS:-$(nproc)}" ${1:+--target "$@"} -- -k 0
