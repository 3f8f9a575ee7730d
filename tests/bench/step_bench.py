#!/usr/bin/env python3
"""Tokens per second of `dsatrain train` steps on CPU ranks. Needs nothing but Python.

    step_bench.py build/dsatrain                 all stages on 1 and 2 ranks; SPARSE against dense at 4,096 tokens
    step_bench.py build/dsatrain --only stages   the first table alone; --only long the second

A step is forward, backward, reduction and AdamW, as metrics.jsonl times it; the fastest step counts, on a shared machine
the steadiest number. One thread a rank, so 2 ranks use 2 cores.
"""
import argparse
import json
import os
import random
import struct
import subprocess
import sys
import tempfile

YARN = {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn"}


def model(**fields):
    """config.json of a small model: the tiny golden model twice as wide, with the fields given changed."""
    c = {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "hidden_size": 256,
         "num_hidden_layers": 4, "first_k_dense_replace": 1, "num_attention_heads": 8, "num_key_value_heads": 8,
         "q_lora_rank": 96, "kv_lora_rank": 128, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32,
         "intermediate_size": 384, "moe_intermediate_size": 128, "n_routed_experts": 8, "n_shared_experts": 1,
         "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "norm_topk_prob": True,
         "scoring_func": "sigmoid", "topk_method": "noaux_tc", "hidden_act": "silu", "rms_norm_eps": 1e-6,
         "rope_theta": 10000, "rope_scaling": YARN, "max_position_embeddings": 163840, "vocab_size": 512,
         "num_nextn_predict_layers": 0, "initializer_range": 0.02, "tie_word_embeddings": False, "attention_bias": False,
         "attention_dropout": 0.0, "moe_layer_freq": 1, "bos_token_id": 0, "eos_token_id": 1, "torch_dtype": "float32"}
    c.update(fields)
    return c


def write_tokens(prefix, count, vocabulary, seed=7):
    """Random tokens as a Megatron data set of one document: prefix.bin, prefix.idx."""
    numbers = random.Random(seed)
    ids = [numbers.randrange(2, vocabulary) for _ in range(count)]
    with open(prefix + ".bin", "wb") as f:
        f.write(struct.pack(f"<{count}H", *ids))
    with open(prefix + ".idx", "wb") as f:
        f.write(b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 1, 2) + struct.pack("<iqqq", count, 0, 0, 1))


def train(binary, folder, name, stage, ranks, sequence, sequences, micro, steps, threads=1, start=None, extra=""):
    """Runs one stage; returns (seconds of the fastest step, run folder). start: a run folder, else random weights."""
    origin = f'init {{ from: "{start}" }}' if start else f'init {{ random: true std: 0.02 }} model {{ config: "{folder}/config.json" }}'
    if stage == "WARMUP":
        origin += f" model {{ indexer {{ heads: 4 head_dim: 32 top_k: {sequence // 16} }} }}"
    recipe = f"""
stage: {stage}
{origin}
data {{ tokens: "{folder}/tokens.idx" sequence_length: {sequence} }}
batch {{ sequences: {sequences} micro_sequences: {micro} }}
optimizer {{ lr: 1e-3 }}
schedule {{ steps: {steps} }}
compute {{ device: CPU precision: FP32 recompute: NONE threads: {threads} }}
run {{ folder: "{folder}/{name}" }}
{extra}
"""
    path = f"{folder}/{name}.textproto"
    with open(path, "w") as f:
        f.write(recipe)
    command = [binary, "train", path]
    if ranks > 1:
        command = ["mpirun", "-np", str(ranks), "--oversubscribe", "--bind-to", "none"] + (
            ["--allow-run-as-root"] if os.geteuid() == 0 else []) + command
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": str(threads)}, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed\n{done.stdout}")
    with open(f"{folder}/{name}/metrics.jsonl") as f:
        seconds = [json.loads(line)["step_seconds"] for line in f]
    return min(seconds), f"{folder}/{name}"


def prepare(folder, config, tokens):
    with open(folder + "/config.json", "w") as f:
        json.dump(config, f)
    write_tokens(folder + "/tokens", tokens, config["vocab_size"])


def bench_stages(binary):
    sequence, sequences, steps = 1024, 4, 7
    print(f"hidden 256, 4 layers, 8 heads, 8 experts top-3; {sequences} sequences of {sequence}, top-k 64, fp32")
    print(f"{'stage':10}{'1 rank':>18}{'2 ranks (data)':>18}{'2 ranks (tensor)':>18}   tokens/s, speed-up")
    with tempfile.TemporaryDirectory() as folder:
        prepare(folder, model(), steps * sequences * sequence + 8 * sequence)
        start = None
        for stage in ("PRETRAIN", "WARMUP", "SPARSE"):
            line, first = f"{stage:10}", None
            for ranks, split in ((1, ""), (2, ""), (2, "parallel { tensor: 2 }")):
                seconds, run = train(binary, folder, f"{stage}{ranks}{len(split)}", stage, ranks, sequence, sequences, 2,
                                     steps, start=start, extra=split)
                first = first or (seconds, run)
                line += f"{sequences * sequence / seconds:11.0f} {first[0] / seconds:5.2f}x"
            print(line, flush=True)
            start = first[1]


def bench_long(binary):
    sequence, steps = 4096, 4
    heads = model(num_attention_heads=16, num_key_value_heads=16, num_hidden_layers=2, q_lora_rank=192)
    with tempfile.TemporaryDirectory() as folder:
        prepare(folder, heads, steps * sequence + 8 * sequence)
        print(f"16 heads, 2 layers, one sequence of {sequence}, top-k {sequence // 16}, one rank, one thread")
        dense, run = train(binary, folder, "dense", "PRETRAIN", 1, sequence, 1, 1, steps)
        _, run = train(binary, folder, "warm", "WARMUP", 1, sequence, 1, 1, 1, start=run)
        sparse, _ = train(binary, folder, "sparse", "SPARSE", 1, sequence, 1, 1, steps, start=run)
        print(f"PRETRAIN (dense) {sequence / dense:8.0f} tokens/s\nSPARSE           {sequence / sparse:8.0f} tokens/s, "
              f"{dense / sparse:.2f}x")


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("dsatrain")
    a.add_argument("--only", choices=("stages", "long"))
    a = a.parse_args()
    if a.only != "long":
        bench_stages(os.path.abspath(a.dsatrain))
    if a.only != "stages":
        bench_long(os.path.abspath(a.dsatrain))


if __name__ == "__main__":
    main()
