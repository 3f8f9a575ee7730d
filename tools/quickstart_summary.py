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


def over(rows, key):
    """Mean of the first and of the last five steps: single batches differ more than training changes."""
    values = [row[key] for row in rows]
    return f"{mean(values[:5]):.3f} -> {mean(values[-5:]):.3f}"


pretrain, warmup, sparse = steps("pretrain"), steps("warmup"), steps("sparse")
k = warmup[-1]["top_k"]
print(f"""
summary ({seconds} s)
  dense pretraining     loss {over(pretrain, 'lm_loss')}, held out {last(pretrain, 'held_out_loss'):.3f}
  indexer warm-up       KL {warmup[0]['kl_mean']:.3f} -> {warmup[-1]['kl_mean']:.3f} (dense), attention mass on the top {k} keys \
{mean(warmup[0]['recall_layer']):.2f} -> {mean(warmup[-1]['recall_layer']):.2f}
  sparse training       loss {over(sparse, 'lm_loss')}, held out {last(sparse, 'held_out_loss'):.3f}
  held-out loss         dense before {last(pretrain, 'held_out_loss'):.3f}, sparse after {last(sparse, 'held_out_loss'):.3f}
  V3.1 checkpoint       {folder}/v31
  V3.2 checkpoint       {folder}/v32
  dashboards            {pathlib.Path(sys.executable).parent}/tensorboard --logdir {folder}""")
