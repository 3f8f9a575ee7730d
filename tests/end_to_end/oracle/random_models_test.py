"""Models of other shapes than the golden ones, against transformers.

Trained: dsatrain's own path from random weights (PRETRAIN, export v3.1, WARMUP from that folder, export v3.2); the runs
and the exported folders give transformers' logits, routing, selection and KL in fp64.
Drawn: shape and weights from a seed (DSA_ORACLE_SEED=N tries others); every inner value, the LM loss' gradients and
the indexers' gradients in fp64, on 1, 2 and 4 ranks.
"""
import hashlib
import os
import sys
import tempfile
import unittest

import numpy as np
import torch
from safetensors.torch import save_file

import program
import reference

# In fp64 both programs agree to about 1e-13 of the largest; the margin is for gradients through many small numbers.
FP64 = 1e-11

WIDE = program.config(
    hidden_size=96, num_hidden_layers=3, first_k_dense_replace=1, num_attention_heads=6, q_lora_rank=40, kv_lora_rank=32,
    qk_nope_head_dim=24, qk_rope_head_dim=16, v_head_dim=20, intermediate_size=160, moe_intermediate_size=48,
    n_routed_experts=12, n_group=3, topk_group=2, num_experts_per_tok=4, n_shared_experts=2, vocab_size=300,
    num_nextn_predict_layers=1)
PARAMETERS_SPELLING = program.config(
    hidden_size=64, num_hidden_layers=2, first_k_dense_replace=0, num_attention_heads=4, q_lora_rank=32, kv_lora_rank=48,
    qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=24, intermediate_size=96, moe_intermediate_size=40,
    n_routed_experts=16, n_group=1, topk_group=1, num_experts_per_tok=5, vocab_size=260, norm_topk_prob=False,
    routed_scaling_factor=1.5, rope_scaling=None, rope_theta=None,
    rope_parameters={"rope_type": "yarn", "rope_theta": 50000.0, "factor": 16.0, "beta_fast": 32, "beta_slow": 1,
                     "mscale": 0.7, "mscale_all_dim": 0.7, "original_max_position_embeddings": 2048})
NO_YARN = program.config(
    hidden_size=80, num_hidden_layers=3, first_k_dense_replace=2, num_attention_heads=2, q_lora_rank=24, kv_lora_rank=40,
    qk_nope_head_dim=12, qk_rope_head_dim=20, v_head_dim=16, intermediate_size=100, moe_intermediate_size=24,
    n_routed_experts=6, n_group=2, topk_group=1, num_experts_per_tok=2, vocab_size=290, num_nextn_predict_layers=1,
    rope_scaling=None, rope_theta=500000)
SEQUENCE, TOP_K = 72, 12


def wide_reference(folder, ids, attention, gradients=False, mtp=False):
    model, info = reference.load(folder)
    with reference.double_precision():
        wide = reference.widened(model)
        values = reference.run(wide, ids, attention, gradients)
        if mtp:
            with torch.no_grad():
                values["mtp.logits"] = reference.multi_token_prediction(folder, wide, ids, attention)
    return values, info


def comparable(expected, attention):
    """Dense attention selects all keys in transformers; probe still writes the selection of its top-k."""
    return {name: v for name, v in expected.items() if attention == "sparse" or not name.endswith("topk_mask")}


class Trained(unittest.TestCase):
    def check(self, config, seed):
        with tempfile.TemporaryDirectory() as tmp:
            program.write_json(f"{tmp}/config.json", config)
            program.write_tokens(f"{tmp}/tokens", 40 * SEQUENCE, config["vocab_size"], seed)
            start = f'init {{ random: true std: 0.1 seed: {seed} }} model {{ config: "{tmp}/config.json" }}'
            dense = program.train(tmp, "pretrain", "PRETRAIN", start, SEQUENCE, seed)
            program.call("export", "--from", dense, "--to", f"{tmp}/v31", "--format", "v3.1", "--dtype", "fp32")
            start = f'init {{ from: "{tmp}/v31" std: 0.3 }} model {{ indexer {{ heads: 6 head_dim: 24 top_k: {TOP_K} }} }}'
            sparse = program.train(tmp, "warmup", "WARMUP", start, SEQUENCE, seed)
            program.call("export", "--from", sparse, "--to", f"{tmp}/v32", "--format", "v3.2", "--dtype", "fp32")
            ids = torch.randint(2, config["vocab_size"], (2, SEQUENCE), generator=torch.Generator().manual_seed(seed))
            mtp = config["num_nextn_predict_layers"] > 0
            for folder, attention in ((dense, "dense"), (sparse, "sparse"), (sparse, "dense")):
                exported = f"{tmp}/{'v31' if folder == dense else 'v32'}"
                expected, info = wide_reference(exported, ids, attention, mtp=mtp)
                # transformers has no MTP: that layer alone is unknown to it.
                own = f"model.layers.{config['num_hidden_layers']}." if mtp else "none"
                self.assertFalse(info["missing_keys"] or info["mismatched_keys"], info)
                self.assertFalse([k for k in info["unexpected_keys"] if not k.startswith(own)], info)
                name = f"{os.path.basename(folder)}.{attention}"
                got = program.probe(folder, ids, f"{tmp}/{name}", attention=attention, dtype="fp64")
                print(name, program.compare(self, got, comparable(expected, attention), FP64))

    def test_wide_with_mtp(self):
        self.check(WIDE, 11)

    def test_rope_parameters_spelling(self):
        self.check(PARAMETERS_SPELLING, 12)

    def test_without_yarn_with_mtp(self):
        self.check(NO_YARN, 13)


def draw(seed):
    """A V3.2 config that 4 ranks can split (tensor 2, expert 2, context 2), and its weights under the released names."""
    r = np.random.default_rng(seed)

    def pick(*choices):
        return int(r.choice(choices))
    # With one expert a token its normalised weight is constant and the router's gradient rounding noise: 2 or more.
    groups, group_size = pick(2, 4), pick(2, 4)
    kept = pick(*range(1, groups + 1))
    c = program.config(
        architectures=["DeepseekV32ForCausalLM"], model_type="deepseek_v32", hidden_size=pick(64, 96, 112),
        num_hidden_layers=3, first_k_dense_replace=pick(0, 1, 2), num_attention_heads=pick(2, 4, 6), q_lora_rank=pick(24, 40),
        kv_lora_rank=pick(32, 48), qk_nope_head_dim=pick(12, 16, 24), qk_rope_head_dim=pick(8, 16), v_head_dim=pick(12, 16, 20),
        intermediate_size=pick(96, 128), moe_intermediate_size=pick(32, 48), n_routed_experts=groups * group_size,
        n_group=groups, topk_group=kept, num_experts_per_tok=pick(*range(2, max(kept * group_size, 3))), n_shared_experts=pick(1, 2),
        routed_scaling_factor=float(r.choice([1.0, 2.5])), vocab_size=pick(128, 258, 300), index_n_heads=pick(2, 4, 8),
        index_head_dim=pick(16, 24, 32), index_topk=pick(7, 12, 16), torch_dtype="float32")
    w = {}

    def add(name, *shape, std=0.25, mean=0.0):
        own = np.random.default_rng(list(hashlib.sha256(f"{seed}/{name}".encode()).digest()))
        w[name] = torch.from_numpy((own.standard_normal(shape) * std + mean).astype(np.float32))
        return w[name]

    def ffn(stem, width):
        add(f"{stem}.gate_proj.weight", width, H)
        add(f"{stem}.up_proj.weight", width, H)
        add(f"{stem}.down_proj.weight", H, width)
    H, heads, query, latent = c["hidden_size"], c["num_attention_heads"], c["q_lora_rank"], c["kv_lora_rank"]
    nope, rope, value, I = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"], c["moe_intermediate_size"]
    add("model.embed_tokens.weight", c["vocab_size"], H, std=1.0)
    for L in range(c["num_hidden_layers"]):
        layer = f"model.layers.{L}."
        for name, size in (("input_layernorm", H), ("post_attention_layernorm", H), ("self_attn.q_a_layernorm", query),
                           ("self_attn.kv_a_layernorm", latent)):
            add(f"{layer}{name}.weight", size, std=0.2, mean=1.0)
        attention = layer + "self_attn."
        add(attention + "q_a_proj.weight", query, H)
        add(attention + "q_b_proj.weight", heads * (nope + rope), query)
        add(attention + "kv_a_proj_with_mqa.weight", latent + rope, H)
        add(attention + "kv_b_proj.weight", heads * (nope + value), latent)
        add(attention + "o_proj.weight", H, heads * value)
        # The first two heads are opposites: one of them is always open, so no score is exactly 0 and none ties.
        q = add(attention + "indexer.wq_b.weight", c["index_n_heads"] * c["index_head_dim"], query)
        q[c["index_head_dim"]:2 * c["index_head_dim"]] = -q[:c["index_head_dim"]]
        add(attention + "indexer.wk.weight", c["index_head_dim"], H)
        add(attention + "indexer.k_norm.weight", c["index_head_dim"], std=0.2, mean=1.0)
        add(attention + "indexer.k_norm.bias", c["index_head_dim"], std=0.2)
        add(attention + "indexer.weights_proj.weight", c["index_n_heads"], H)
        if L < c["first_k_dense_replace"]:
            ffn(layer + "mlp", c["intermediate_size"])
            continue
        add(layer + "mlp.gate.weight", c["n_routed_experts"], H)
        add(layer + "mlp.gate.e_score_correction_bias", c["n_routed_experts"], std=0.1)
        for e in range(c["n_routed_experts"]):
            ffn(f"{layer}mlp.experts.{e}", I)
        ffn(layer + "mlp.shared_experts", I * c["n_shared_experts"])
    add("model.norm.weight", H, std=0.2, mean=1.0)
    add("lm_head.weight", c["vocab_size"], H)
    return c, w


class Drawn(unittest.TestCase):
    MESHES = ((1, ()), (2, ("--tensor", "2")), (4, ("--tensor", "2", "--expert", "2", "--context", "2")))

    def test_gradients_on_meshes(self):
        seed = int(os.environ.get("DSA_ORACLE_SEED", "2026"))
        config, weights = draw(seed)
        print(f"seed {seed}:", {k: v for k, v in config.items() if isinstance(v, int) and not isinstance(v, bool)})
        with tempfile.TemporaryDirectory() as tmp:
            os.mkdir(f"{tmp}/model")
            program.write_json(f"{tmp}/model/config.json", config)
            save_file(weights, f"{tmp}/model/model.safetensors", metadata={"format": "pt"})
            ids = torch.randint(2, config["vocab_size"], (3, 53), generator=torch.Generator().manual_seed(seed))
            for attention in ("sparse", "dense"):
                expected, _ = wide_reference(f"{tmp}/model", ids, attention, gradients=True)
                for ranks, mesh in self.MESHES:
                    got = program.probe(f"{tmp}/model", ids, f"{tmp}/{attention}{ranks}", "--gradients", *mesh,
                                        attention=attention, dtype="fp64", ranks=ranks)
                    print(attention, ranks, "ranks:", program.compare(self, got, comparable(expected, attention), FP64))
                    backbone = {n for n in got if n.startswith("grad.")}
                    self.assertEqual(backbone, {n for n in expected if n.startswith("grad.")})


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1] + sys.argv[2:])
