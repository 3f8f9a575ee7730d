#!/usr/bin/env python3
"""Python's transformers on the layer that `dsa_bench layer` measures: one DeepseekV32 decoder layer of the 671B model, batch 1,
bf16, forward and backward on one GPU, sparse through its indexer (which has no loss there) by scaled dot-product attention.

    python3 tests/bench/transformers_layer.py [--lengths 4096,8192] [--json FILE]
"""
import argparse
import json
import time

import torch
import transformers
from transformers.models.deepseek_v32 import modeling_deepseek_v32 as m
from transformers.models.deepseek_v32.configuration_deepseek_v32 import DeepseekV32Config

CONFIG = dict(hidden_size=7168, num_hidden_layers=1, first_k_dense_replace=1, num_attention_heads=128, num_key_value_heads=128,
              q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
              intermediate_size=18432, index_n_heads=64, index_head_dim=128, index_topk=2048, vocab_size=1024,
              mlp_layer_types=["dense"])


def measure(tokens, repeats):
    config = DeepseekV32Config(**CONFIG)
    config._attn_implementation = "sdpa"
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        layer = m.DeepseekV32DecoderLayer(config, 0).train()
        rotary = m.DeepseekV32RotaryEmbedding(config)
        torch.set_default_dtype(torch.float32)
        for p in layer.parameters():
            torch.nn.init.normal_(p, std=0.02) if p.dim() > 1 else torch.nn.init.ones_(p)
        x = torch.randn(1, tokens, config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        dy = torch.randn_like(x)
        positions = torch.arange(tokens)[None]
        mask = torch.full((tokens, tokens), float("-inf")).triu(1)[None, None].to(torch.bfloat16)
    times = []
    torch.cuda.reset_peak_memory_stats()
    for _ in range(repeats + 1):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        y = layer(x, attention_mask=mask, position_ids=positions, position_embeddings=rotary(x, positions))
        (y[0] if isinstance(y, tuple) else y).backward(dy)
        layer.zero_grad()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - begin) * 1e3)
    return sorted(times[1:])[repeats // 2], torch.cuda.max_memory_allocated() / 2**30


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("--lengths", default="4096,8192")
    a.add_argument("--repeats", type=int, default=3)
    a.add_argument("--json")
    a = a.parse_args()
    print(f"transformers {transformers.__version__}, torch {torch.__version__}, {torch.cuda.get_device_name()}")
    results = []
    for tokens in map(int, a.lengths.split(",")):
        try:
            ms, peak = measure(tokens, a.repeats)
            print(f"transformers sparse {tokens:8d} {ms:10.1f} ms {peak:7.1f} GiB")
            results.append(dict(mode="transformers", tokens=tokens, ms=ms, peak_gib=peak))
        except torch.OutOfMemoryError as e:
            print(f"transformers sparse {tokens:8d} out of memory: {str(e)[:120]}")
            results.append(dict(mode="transformers", tokens=tokens, out_of_memory=True))
        torch.cuda.empty_cache()
    if a.json:
        with open(a.json, "w") as f:
            json.dump(results, f, indent=1)


if __name__ == "__main__":
    main()
