#!/usr/bin/env python3
"""The curves of tools/small_gpu.sh's three runs as one picture, and their figures as a table on stdout.

usage: small_gpu_plot.py FOLDER OUT.png      (FOLDER/{pretrain,warmup,sparse}/metrics.jsonl)
Needs matplotlib.
"""
import json
import pathlib
import statistics
import sys

sys.path.pop(0)  # tools/tokenize.py is not Python's own tokenize, which matplotlib needs
import matplotlib  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

STAGES = ("pretrain", "warmup", "sparse")


def rows(folder, stage):
    return [json.loads(line) for line in (folder / stage / "metrics.jsonl").read_text().splitlines()]


def held_out(stage_rows):
    """[(step, loss)], the loss before the first step as step 0."""
    first = stage_rows[0].get("held_out_before")
    points = [] if first is None else [(0, first)]
    return points + [(r["step"], r["held_out_loss"]) for r in stage_rows if r.get("held_out_loss") is not None]


def average(values):
    return sum(values) / len(values)


def draw(runs, out):
    figure, axes = plt.subplots(2, 2, figsize=(11, 6.4), constrained_layout=True)
    loss, kl, recall, load = axes[0][0], axes[0][1], axes[1][0], axes[1][1]
    begin = 0
    for stage, color in zip(STAGES, ("#30638e", "#d1495b", "#2a7f62")):
        data = runs[stage]
        x = [begin + r["step"] for r in data]
        loss.plot(x, [r["lm_loss"] for r in data], color=color, lw=0.8, alpha=0.6, label=stage)
        points = held_out(data)
        loss.plot([begin + s for s, _ in points], [v for _, v in points], "o", color=color, ms=4)
        load.plot(x, [r["expert_load_max_over_mean"] for r in data], color=color, lw=0.9, label=stage)
        if stage != "pretrain":
            kl.plot(x, [r["kl_mean"] for r in data], color=color, lw=0.9, label=stage)
            recall.plot(x, [average(r["recall_layer"]) for r in data], color=color, lw=0.9, label=stage)
        begin += len(data)
    top_k = runs["sparse"][-1]["top_k"]
    for axis, title in ((loss, "loss, nats a token (dots: held out)"), (kl, "indexer's KL, nats a row, mean of layers"),
                        (recall, f"attention mass on the top {top_k} keys"), (load, "busiest expert / mean, worst layer")):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8)
    kl.set_yscale("log")
    figure.savefig(out, dpi=110)


def main():
    folder, out = pathlib.Path(sys.argv[1]), sys.argv[2]
    runs = {stage: rows(folder, stage) for stage in STAGES}
    draw(runs, out)
    print("| stage | steps | tokens | s/step (median) | tokens/s | peak GiB | loss, first 5 -> last 5 | held out, before -> after |")
    print("|---|---|---|---|---|---|---|---|")
    for stage in STAGES:
        data = runs[stage]
        seconds = statistics.median(r["step_seconds"] for r in data)
        losses, points = [r["lm_loss"] for r in data], held_out(data)
        print(f"| {stage} | {len(data)} | {data[-1]['tokens_total']:,} | {seconds:.3f} "
              f"| {data[-1]['tokens_total'] / len(data) / seconds:,.0f} | {data[-1]['memory_bytes'] / 2**30:.1f} "
              f"| {average(losses[:5]):.3f} -> {average(losses[-5:]):.3f} | {points[0][1]:.3f} -> {points[-1][1]:.3f} |")
    for stage in ("warmup", "sparse"):
        first, last = runs[stage][0], runs[stage][-1]
        print(f"{stage}: KL {first['kl_mean']:.4f} -> {last['kl_mean']:.4f}, attention mass on the top {last['top_k']} "
              f"{average(first['recall_layer']):.3f} -> {average(last['recall_layer']):.3f}")
    check = folder / "dense_check" / "metrics.jsonl"
    if check.exists():
        print(f"held out with dense attention over the final weights: {json.loads(check.read_text().splitlines()[0])['held_out_before']:.3f}")


if __name__ == "__main__":
    main()
