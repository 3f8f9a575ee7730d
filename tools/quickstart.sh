#!/usr/bin/env bash
# The whole path on a CPU, on real text: tokenise, pretrain dense, export a V3.1 checkpoint, warm up the indexer,
# train sparse, export a V3.2 checkpoint. Everything lands in runs/tiny. Re-runnable: it starts afresh.
# usage: tools/quickstart.sh
set -euo pipefail
cd "$(dirname "$0")/.."
tools/setup.sh
tools/build.sh dsatrain
dsatrain=${BUILD:-build}/dsatrain
python=${DSATRAIN_DEPS:-$HOME/.cache/dsatrain}/tools/bin/python
run="mpirun -np 2 --oversubscribe --bind-to none"
if [ "$(id -u)" -eq 0 ]; then run="$run --allow-run-as-root"; fi
export OMP_NUM_THREADS=1
say() { printf '\n\033[1m$ %s\033[0m\n' "$*"; "$@"; }

rm -rf runs/tiny
mkdir -p runs/tiny
started=$(date +%s)
say $python tools/tokenize.py --tokenizer byte --out runs/tiny/tokens.h5 /usr/share/doc/jargon-text/jargon.txt.gz
say $run $dsatrain train recipes/tiny_pretrain.textproto
say $dsatrain export --from runs/tiny/pretrain --to runs/tiny/v31
say $run $dsatrain train recipes/tiny_warmup.textproto
say $run $dsatrain train recipes/tiny_sparse.textproto
say $dsatrain export --from runs/tiny/sparse --to runs/tiny/v32
say $dsatrain inspect runs/tiny/v32
$python tools/quickstart_summary.py runs/tiny "$(($(date +%s) - started))"
