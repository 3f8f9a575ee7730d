"""`dsatrain` driven from Python: token files, model configs, recipes, probes, exports; and the comparison."""
import json
import os
import struct
import subprocess
import sys

import numpy as np
import torch
from safetensors.torch import load_file, save_file

BINARY, GOLDEN = os.path.abspath(sys.argv[1]), os.path.join(os.path.dirname(__file__), "../../golden")

YARN = {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn"}


def call(*arguments, ranks=1):
    command = [BINARY, *map(str, arguments)]
    if ranks > 1:
        command = ["mpirun", "-np", str(ranks), "--oversubscribe", "--bind-to", "none",
                   *(["--allow-run-as-root"] if os.geteuid() == 0 else []), *command]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT)
    if done.returncode:
        raise AssertionError(f"{' '.join(command)} ended with {done.returncode}\n{done.stdout}")
    return done.stdout


def probe(model, ids, out, *options, attention, dtype, ranks=1):
    save_file({"input_ids": ids.to(torch.int32)}, out + ".ids")
    call("probe", "--model", model, "--tokens", out + ".ids", "--attention", attention, "--dtype", dtype, "--out", out,
         *options, ranks=ranks)
    return load_file(out)


def config(**fields):
    """A V3.1 config.json of the released style; the fields given win."""
    c = {"architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 0,
         "eos_token_id": 1, "hidden_act": "silu", "initializer_range": 0.02, "max_position_embeddings": 163840,
         "model_type": "deepseek_v3", "moe_layer_freq": 1, "norm_topk_prob": True, "num_nextn_predict_layers": 0,
         "rms_norm_eps": 1e-06, "rope_scaling": YARN, "rope_theta": 10000, "routed_scaling_factor": 2.5,
         "scoring_func": "sigmoid", "tie_word_embeddings": False, "topk_method": "noaux_tc", "torch_dtype": "bfloat16",
         "transformers_version": "4.44.2", "use_cache": True, "n_shared_experts": 1}
    c.update(fields)
    c["num_key_value_heads"] = c["num_attention_heads"]
    return {key: value for key, value in c.items() if value is not None}


def write_json(path, value):
    with open(path, "w") as f:
        json.dump(value, f, indent=2)


def write_tokens(prefix, count, vocabulary, seed):
    """Random tokens as a Megatron data set of one document."""
    ids = np.random.default_rng(seed).integers(2, vocabulary, count).astype(np.uint16)
    ids.tofile(prefix + ".bin")
    with open(prefix + ".idx", "wb") as f:
        f.write(b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 1, 2) + struct.pack("<iqqq", count, 0, 0, 1))


def train(folder, name, stage, origin, sequence, seed, steps=2):
    """One stage on random tokens in fp32; `origin` is recipe text. Returns the run folder."""
    recipe = f"""
stage: {stage}
{origin}
data {{ tokens: "{folder}/tokens.idx" sequence_length: {sequence} seed: {seed} }}
batch {{ sequences: 2 }}
optimizer {{ lr: 1e-2 eps: 1e-8 }}
schedule {{ steps: {steps} }}
loss {{ {"router_bias_speed: 0.05" if stage == "PRETRAIN" else ""} }}
compute {{ device: CPU precision: FP32 recompute: NONE query_block: 16 }}
run {{ folder: "{folder}/{name}" }}
"""
    path = f"{folder}/{name}.textproto"
    with open(path, "w") as f:
        f.write(recipe)
    call("train", path)
    return f"{folder}/{name}"


def difference(got, expected):
    """Largest |got - expected| over the largest |expected|; infinities and NaN must stand at the same places."""
    got, expected = got.double(), expected.double()
    if got.shape != expected.shape:
        return float("inf")
    finite = torch.isfinite(expected)
    if not torch.equal(torch.isfinite(got), finite) or not torch.equal(got[~finite], expected[~finite]):
        return float("inf")
    return ((got - expected)[finite].abs().max() / expected[finite].abs().max().clamp_min(1e-30)).item()


def compare(test, got, expected, tolerance, only=None):
    """Every expected tensor is there and agrees; sets of keys and experts are equal. Returns the largest difference."""
    worst = (0.0, "")
    for name, value in sorted(expected.items()):
        if only and not name.startswith(only):
            continue
        test.assertIn(name, got)
        if name.endswith(("topk_mask", ".experts")):
            test.assertTrue(torch.equal(got[name].long(), value.long()), f"{name} differs")
            continue
        worst = max(worst, (difference(got[name], value), name))
        test.assertLessEqual(worst[0], tolerance, worst[1])
    return worst
