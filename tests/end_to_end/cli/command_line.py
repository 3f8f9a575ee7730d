"""What the tests of dsatrain's command line share: a scratch folder, a tiny model, text as tokens, recipes, mpirun.

The binary is $DSATRAIN. Needs h5py and safetensors: without them the script starts itself again with the Python that
tools/setup.sh installed, and where that is missing too it ends with exit status 77 (skipped).
"""
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile

SOURCE = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", "..", ".."))
GOLDEN = os.path.join(SOURCE, "tests", "golden")
DSATRAIN = os.path.abspath(os.environ.get("DSATRAIN", os.path.join(SOURCE, "build", "dsatrain")))
TOP_K, LENGTH = 16, 64

try:
    import h5py
    import numpy as np
except ImportError:
    tools = os.path.join(os.environ.get("DSATRAIN_DEPS", os.path.expanduser("~/.cache/dsatrain")), "tools/bin/python")
    if os.path.exists(tools) and os.environ.get("DSATRAIN_TEST_RESTARTED") is None:
        os.environ["DSATRAIN_TEST_RESTARTED"] = "1"
        os.execv(tools, [tools] + sys.argv)
    print("skipped: h5py and safetensors are missing, run tools/setup.sh")
    sys.exit(77)

# A DeepSeek-V3 model: dense layer, two MoE layers, MTP layer; 258 byte tokens. It splits over tensor 2 x expert 2.
CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "attention_bias": False,
    "attention_dropout": 0.0, "bos_token_id": 256, "eos_token_id": 257, "first_k_dense_replace": 1, "hidden_act": "silu",
    "hidden_size": 64, "initializer_range": 0.02, "intermediate_size": 96, "kv_lora_rank": 32,
    "max_position_embeddings": 4096, "moe_intermediate_size": 32, "moe_layer_freq": 1, "n_group": 2,
    "n_routed_experts": 4, "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 4,
    "num_experts_per_tok": 2, "num_hidden_layers": 3, "num_key_value_heads": 4, "num_nextn_predict_layers": 1,
    "q_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "rms_norm_eps": 1e-06, "rope_scaling": None,
    "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "tie_word_embeddings": False,
    "topk_group": 2, "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "v_head_dim": 16, "vocab_size": 258}

RECIPES = {
    "base": """
        data { tokens: "tokens.h5" sequence_length: 64 held_out: 4 }
        batch { sequences: 8 micro_sequences: 2 }
        compute { device: CPU precision: FP32 recompute: NONE query_block: 32 }
        checkpoint { every: 10 }""",
    "pretrain": """extends: "base.textproto"
        stage: PRETRAIN
        model { config: "config.json" }
        init { random: true std: 0.02 }
        optimizer { lr: 4e-3 }
        schedule { steps: 6 }
        loss { router_bias_speed: 0.001 }
        run { folder: "pretrain" eval_every: 3 }""",
    "warmup": """extends: "base.textproto"
        stage: WARMUP
        model { indexer { heads: 2 head_dim: 16 top_k: 16 } }
        init { from: "v31" std: 0.02 }
        optimizer { lr: 1e-2 }
        schedule { steps: 6 }
        run { folder: "warmup" eval_every: 3 }""",
    "sparse": """extends: "base.textproto"
        stage: SPARSE
        init { from: "warmup" }
        optimizer { lr: 1e-3 indexer_lr: 3e-3 }
        schedule { steps: 6 }
        run { folder: "sparse" eval_every: 3 }"""}

WORDS = "the a of to and in is it you that hacker code bug program machine user file run time old new real hack".split()


def write_tokens(path, vocabulary=258, tokenizer=None, limit=None, documents=40, seed=7):
    """Documents of words as byte tokens, BOS ... EOS; ids below `limit` only when given."""
    draw = random.Random(seed)
    ids, offsets = [], [0]
    for _ in range(documents):
        text = " ".join(draw.choice(WORDS) for _ in range(draw.randrange(20, 120)))
        ids += [256] + list(text.encode()) + [257] if limit is None else [b % limit for b in text.encode()]
        offsets.append(len(ids))
    with h5py.File(path, "w") as f:
        f.create_dataset("tokens", data=np.asarray(ids, "<u4"))
        f.create_dataset("document_offsets", data=np.asarray(offsets, "<i8"))
        f.attrs["format"] = "dsatrain.tokens"
        f.attrs["tokenizer_sha256"] = tokenizer or hashlib.sha256(b"byte").hexdigest()
        f.attrs["source"] = "words"
        for key, value in {"version": 1, "vocab_size": vocabulary, "bos_id": -1, "eos_id": -1}.items():
            f.attrs[key] = np.int64(value)


class Run:
    """A finished process."""
    def __init__(self, code, out, err):
        self.code, self.out, self.err = code, out, err

    def __str__(self):
        return f"exit {self.code}\n--- stdout\n{self.out[-3000:]}\n--- stderr\n{self.err[-3000:]}"


class Scratch:
    """A folder with config.json, tokens.h5 and the recipes, in which everything runs."""
    def __init__(self):
        self.path = tempfile.mkdtemp(prefix="dsatrain-e2e-")
        with open(self / "config.json", "w") as f:
            json.dump(CONFIG, f, indent=2)
        write_tokens(self / "tokens.h5")
        for name, text in RECIPES.items():
            with open(self / f"{name}.textproto", "w") as f:
                f.write(text + "\n")

    def __truediv__(self, name):
        return os.path.join(self.path, name)

    def remove(self):
        shutil.rmtree(self.path)

    def command(self, ranks, *arguments):
        mpirun = ["mpirun", "-np", str(ranks), "--oversubscribe", "--bind-to", "none"]
        mpirun += ["--allow-run-as-root"] if os.geteuid() == 0 else []
        return (mpirun if ranks else []) + [DSATRAIN, *arguments]

    def start(self, ranks, *arguments, cwd=None, **options):
        return subprocess.Popen(self.command(ranks, *arguments), cwd=cwd or self.path, text=True, stdout=subprocess.PIPE,
                                env={**os.environ, "OMP_NUM_THREADS": "1"}, stdin=subprocess.DEVNULL, **options)

    def run(self, ranks, *arguments, cwd=None):
        """ranks 0: without mpirun."""
        process = self.start(ranks, *arguments, cwd=cwd, stderr=subprocess.PIPE)
        out, err = process.communicate(timeout=200)
        return Run(process.returncode, out, err)

    def tree(self):
        """Every path below with size, time of change and content."""
        found = {}
        for folder, folders, files in os.walk(self.path):
            for name in folders:
                found[os.path.join(folder, name)] = "folder"
            for name in files:
                path = os.path.join(folder, name)
                with open(path, "rb") as f:
                    found[path] = (os.stat(path).st_mtime_ns, hashlib.sha256(f.read()).hexdigest())
        return found


def sets(*values):
    return [word for value in values for word in ("--set", value)]


def newest(run_folder):
    folder = os.path.join(run_folder, "checkpoints")
    return os.path.join(folder, max(n for n in os.listdir(folder) if n.startswith("step-") and "." not in n))


def manifest(checkpoint):
    with open(os.path.join(checkpoint, "MANIFEST.json")) as f:
        return json.load(f)


def state(checkpoint):
    return manifest(checkpoint)["state"]


def native_tensors(checkpoint):
    """{"ROLE/NAME@offset": (dtype, shape, bytes)} of all shards, read by h5py."""
    found = {}
    for name in sorted(os.listdir(checkpoint)):
        if not name.endswith(".h5"):
            continue
        with h5py.File(os.path.join(checkpoint, name)) as f:
            def take(path, item):
                if isinstance(item, h5py.Dataset):
                    assert path not in found, path
                    found[path] = (str(item.dtype), item.shape, item[()].tobytes())
            f.visititems(take)
    return found


def metrics(run_folder):
    with open(os.path.join(run_folder, "metrics.jsonl")) as f:
        return [json.loads(line) for line in f]


def safetensors_of(folder):
    """{name: (dtype, shape, bytes)} of an HF folder, read by the safetensors package."""
    import safetensors
    found = {}
    for name in sorted(os.listdir(folder)):
        if name.endswith(".safetensors"):
            with open(os.path.join(folder, name), "rb") as f:
                for tensor, value in safetensors.deserialize(f.read()):
                    assert tensor not in found, tensor
                    found[tensor] = (value["dtype"], value["shape"], bytes(value["data"]))
    return found
