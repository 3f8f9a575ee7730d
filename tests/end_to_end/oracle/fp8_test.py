"""FP8 exports, both formats, read by transformers' FP8 loader. It infers the block from the grid of scales, so every
dimension here is a multiple of 128. The loader dequantises to bfloat16; powers of two make that exact."""
import os
import sys
import tempfile
import unittest

import torch

import program
import reference

CONFIG = program.config(
    hidden_size=256, num_hidden_layers=2, first_k_dense_replace=1, num_attention_heads=4, q_lora_rank=128, kv_lora_rank=96,
    qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=32, intermediate_size=256, moe_intermediate_size=128,
    n_routed_experts=4, n_group=2, topk_group=1, num_experts_per_tok=2, vocab_size=256, num_nextn_predict_layers=1)
SEQUENCE, TOP_K = 72, 16


class Fp8(unittest.TestCase):
    def test_both_formats(self):
        with tempfile.TemporaryDirectory() as tmp:
            program.write_json(f"{tmp}/config.json", CONFIG)
            program.write_tokens(f"{tmp}/tokens", 40 * SEQUENCE, CONFIG["vocab_size"], 5)
            start = f'init {{ random: true std: 0.1 }} model {{ config: "{tmp}/config.json" }}'
            dense = program.train(tmp, "pretrain", "PRETRAIN", start, SEQUENCE, 5)
            program.call("export", "--from", dense, "--to", f"{tmp}/v31", "--format", "v3.1", "--dtype", "fp8")
            start = f'init {{ from: "{tmp}/v31" std: 0.3 }} model {{ indexer {{ heads: 4 head_dim: 64 top_k: {TOP_K} }} }}'
            sparse = program.train(tmp, "warmup", "WARMUP", start, SEQUENCE, 5)
            program.call("export", "--from", sparse, "--to", f"{tmp}/v32", "--format", "v3.2", "--dtype", "fp8")
            ids = torch.randint(2, 256, (2, SEQUENCE), generator=torch.Generator().manual_seed(5))
            for form, attention in (("v31", "dense"), ("v32", "sparse")):
                model, info = reference.load(f"{tmp}/{form}")
                self.assertFalse(info["missing_keys"] or info["mismatched_keys"], info)
                self.assertFalse([k for k in info["unexpected_keys"] if not k.startswith("model.layers.2.")], info)
                with reference.double_precision(), torch.no_grad():
                    wide = reference.widened(model)
                    expected = reference.run(wide, ids, attention)
                got = program.probe(f"{tmp}/{form}", ids, f"{tmp}/{form}.probe", attention=attention, dtype="fp64")
                print(form, program.compare(self, got, expected, 1e-11))


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1] + sys.argv[2:])
