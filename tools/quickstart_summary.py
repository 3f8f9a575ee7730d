"""Prints what the quickstart's three runs reached, from their metrics.jsonl.

usage: quickstart_summary.py FOLDER SECONDS
"""
import json
import pathlib
import sys

folder, seconds = pathlib.Path(sys.argv[1]), sys.argv[2]


def steps(stage):
    return [json.loads(line) for line in (folder / stage / "metrics.jsonl").read_text().splitlines()]


def last(rows, key):
    return next((row[key] for row in reversed(rows) if row.get(key) is not None), float("nan"))


def mean(values):
    return sum(values) / len(values)


pretrain, warmup, sparse = steps("pretrain"), steps("warmup"), steps("sparse")
k = warmup[-1]["top_k"]
print(f"""
summary ({seconds} s)
  dense pretraining     loss {pretrain[0]['lm_loss']:.3f} -> {pretrain[-1]['lm_loss']:.3f}, held out {last(pretrain, 'held_out_loss'):.3f}
  indexer warm-up       KL {warmup[0]['kl_mean']:.3f} -> {warmup[-1]['kl_mean']:.3f}, attention mass on the top {k} keys \
{mean(warmup[0]['recall_layer']):.2f} -> {mean(warmup[-1]['recall_layer']):.2f}
  sparse training       loss {sparse[0]['lm_loss']:.3f} -> {sparse[-1]['lm_loss']:.3f}, held out {last(sparse, 'held_out_loss'):.3f}
  held-out loss         dense before {last(pretrain, 'held_out_loss'):.3f}, sparse after {last(sparse, 'held_out_loss'):.3f}
  V3.1 checkpoint       {folder}/v31
  V3.2 checkpoint       {folder}/v32
  dashboards            {pathlib.Path(sys.executable).parent}/tensorboard --logdir {folder}""")
