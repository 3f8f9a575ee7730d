#!/usr/bin/env python3
"""One training step (forward, backward, clipping, AdamW) in dsatrain and in Python's transformers, on the same two
cores: the tiny golden model twice as wide (hidden 256, 4 layers, 8 heads), two sequences of 1,024 tokens, fp32.

    ~/.cache/dsatrain/oracle/bin/python tests/bench/compare_transformers.py build/dsatrain [--rounds 3]

dense: stage PRETRAIN and DeepseekV3ForCausalLM. sparse, top-k 64: stage SPARSE, which trains the indexer too, and
DeepseekV32ForCausalLM, which has no indexer loss. transformers runs with each of its attention and expert
implementations. All alternate, round after round; the fastest step of each counts: on a shared machine it is the
steadiest number.
"""
import argparse
import json
import os
import sys
import tempfile
import time

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

sys.path.insert(0, os.path.dirname(__file__))
import step_bench  # noqa: E402

SEQUENCE, SEQUENCES, STEPS, CORES = 1024, 2, 4, 2
logging.set_verbosity_error()


def transformers_steps(folder, config, attention, experts):
    path = f"{folder}/{config['model_type']}"
    os.makedirs(path, exist_ok=True)
    with open(path + "/config.json", "w") as f:
        json.dump(config, f)
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), attn_implementation=attention,
                                             experts_implementation=experts).float().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-20, weight_decay=0.1, fused=True)
    times = []
    for _ in range(STEPS):
        ids = torch.randint(2, config["vocab_size"], (SEQUENCES, SEQUENCE))
        begin = time.perf_counter()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - begin)
    return min(times)


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("dsatrain")
    a.add_argument("--rounds", type=int, default=3)
    a = a.parse_args()
    binary = os.path.abspath(a.dsatrain)
    torch.set_num_threads(CORES)
    dense = step_bench.model()
    sparse = step_bench.model(architectures=["DeepseekV32ForCausalLM"], model_type="deepseek_v32", index_n_heads=4,
                              index_head_dim=32, index_topk=SEQUENCE // 16)
    best = {}

    def keep(kind, name, seconds):
        best[kind, name] = min(seconds, best.get((kind, name), seconds))

    with tempfile.TemporaryDirectory() as folder:
        step_bench.prepare(folder, dense, (STEPS + 4) * SEQUENCES * SEQUENCE)

        def ours(name, stage, ranks, start=None):
            return step_bench.train(binary, folder, name, stage, ranks, SEQUENCE, SEQUENCES, SEQUENCES // ranks, STEPS,
                                    threads=CORES // ranks, start=start)
        pretrained = ours("pretrained", "PRETRAIN", 1)[1]
        warm = ours("warm", "WARMUP", 1, pretrained)[1]
        for r in range(a.rounds):
            for kind, stage, config, start in (("dense", "PRETRAIN", dense, None), ("sparse", "SPARSE", sparse, warm)):
                for ranks in (1, 2):
                    name = f"dsatrain, {ranks} rank{'s' * (ranks > 1)} x {CORES // ranks} thread{'s' * (ranks < 2)}"
                    keep(kind, name, ours(f"{kind}{ranks}.{r}", stage, ranks, start)[0])
                for attention in ("eager", "sdpa"):
                    for experts in ("eager", "grouped_mm"):
                        keep(kind, f"transformers, {attention} attention, {experts} experts",
                             transformers_steps(folder, config, attention, experts))
    for (kind, name), seconds in sorted(best.items(), key=lambda item: (item[0][0], item[1])):
        print(f"{kind:8}{name:52}{seconds:7.3f} s a step {SEQUENCES * SEQUENCE / seconds:8.0f} tokens/s")


if __name__ == "__main__":
    main()
