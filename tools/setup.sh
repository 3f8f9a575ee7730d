#!/usr/bin/env bash
# Installs what dsatrain needs on Debian 12 and is not there yet: Debian packages (as root), LibTorch, and the Python
# tools of tokenisation and tests. Without root it works when the packages are installed.
# usage: tools/setup.sh [--cuda] [--oracle]
#   --cuda     LibTorch with CUDA (5 GB) instead of the CPU-only one (1.3 GB)
#   --oracle   also Python's transformers, for the tests that compare with it (5 GB)
# Python environments lie in ${DSATRAIN_DEPS:-~/.cache/dsatrain}.
set -euo pipefail

deps=${DSATRAIN_DEPS:-$HOME/.cache/dsatrain}
cuda=0 oracle=0
for argument in "$@"; do
  case $argument in
    --cuda) cuda=1 ;;
    --oracle) oracle=1 ;;
    *) echo "unknown option $argument (known: --cuda, --oracle)" >&2; exit 2 ;;
  esac
done

packages="g++ cmake ninja-build ccache git python3 python3-venv libopenmpi-dev openmpi-bin libhdf5-dev hdf5-tools
  protobuf-compiler libprotobuf-dev libgtest-dev libgmock-dev libcli11-dev libfmt-dev nlohmann-json3-dev
  libxxhash-dev libisal-dev libssl-dev jargon-text"
missing=$(for p in $packages; do dpkg-query -W -f='${Status}' "$p" 2>/dev/null | grep -q 'install ok installed' || echo "$p"; done)
if [ -n "$missing" ]; then
  if [ "$(id -u)" -ne 0 ]; then
    echo "cannot install $(echo $missing) (not root) run tools/setup.sh as root once" >&2
    exit 3
  fi
  echo "installing" $missing
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null
fi

# environment NAME: a virtual environment under $deps; pip installs into it run once, recorded in a stamp.
environment() {
  [ -x "$deps/$1/bin/python" ] || python3 -m venv "$deps/$1"
}
install_once() {  # environment, stamp, pip arguments...
  local env=$1 stamp="$deps/$1/.$2"; shift 2
  [ -f "$stamp" ] && return
  echo "installing into $deps/$env: $*"
  "$deps/$env/bin/pip" install -q --disable-pip-version-check "$@"
  touch "$stamp"
}

if [ $cuda = 1 ]; then
  environment torch-cuda
  install_once torch-cuda torch-2.11.0 torch==2.11.0
else
  # libtorch_cpu.so is linked against these two small CUDA libraries; nothing else of CUDA is needed.
  environment torch-cpu
  install_once torch-cpu torch-2.11.0 --no-deps torch==2.11.0
  install_once torch-cpu cuda-runtime-13.0 "nvidia-cuda-runtime==13.0.*" "nvidia-cuda-cupti==13.0.*"
fi
environment tools
install_once tools tools-1 h5py numpy tokenizers safetensors tensorboard matplotlib
if [ $oracle = 1 ]; then
  environment oracle
  install_once oracle transformers-5.23.0 torch==2.11.0 transformers==5.23.0 safetensors numpy
  install_once oracle accelerate-1.15.0 accelerate==1.15.0  # transformers' FP8 loader asks for it
fi
