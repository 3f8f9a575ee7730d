"""The whole path through the command line: PRETRAIN, a V3.1 FP8 folder, WARMUP, SPARSE, a V3.2 FP8 folder, inspect;
on 2 data ranks, and on 4 ranks as tensor 2 x context 2 with expert 2."""
import glob
import os
import sys
import unittest

from command_line import *


def expected_names(indexer):
    """The tensors of a release (spec of DeepSeek-V3.1 and V3.2), scales aside: {name: dtype}."""
    fp8, bf16 = "F8_E4M3", "BF16"
    norm = "F32" if indexer else bf16
    names = {"model.embed_tokens.weight": bf16, "model.norm.weight": norm, "lm_head.weight": bf16}
    for layer in range(CONFIG["num_hidden_layers"] + 1):
        at = f"model.layers.{layer}."
        for name in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"):
            names[f"{at}self_attn.{name}.weight"] = fp8
        for name in ("self_attn.q_a_layernorm", "self_attn.kv_a_layernorm", "input_layernorm", "post_attention_layernorm"):
            names[f"{at}{name}.weight"] = norm
        if indexer:
            names.update({f"{at}self_attn.indexer.wq_b.weight": fp8, f"{at}self_attn.indexer.wk.weight": fp8,
                          f"{at}self_attn.indexer.k_norm.weight": "F32", f"{at}self_attn.indexer.k_norm.bias": "F32",
                          f"{at}self_attn.indexer.weights_proj.weight": bf16})
        parts = ["mlp."] if layer < CONFIG["first_k_dense_replace"] else ["mlp.shared_experts."] + [
            f"mlp.experts.{e}." for e in range(CONFIG["n_routed_experts"])]
        for part in parts:
            for name in ("gate_proj", "up_proj", "down_proj"):
                names[f"{at}{part}{name}.weight"] = fp8
        if layer >= CONFIG["first_k_dense_replace"]:
            names[f"{at}mlp.gate.weight"] = bf16
            names[f"{at}mlp.gate.e_score_correction_bias"] = "F32"
        if layer == CONFIG["num_hidden_layers"]:
            names.update({f"{at}embed_tokens.weight": bf16, f"{at}shared_head.head.weight": bf16, f"{at}eh_proj.weight": bf16,
                          f"{at}enorm.weight": norm, f"{at}hnorm.weight": norm, f"{at}shared_head.norm.weight": norm})
    return names


class WholePath(unittest.TestCase):
    def good(self, ranks, *arguments, cwd=None):
        run = self.scratch.run(ranks, *arguments, cwd=cwd)
        self.assertEqual(run.code, 0, run)
        return run

    def check_folder(self, name, indexer):
        folder = self.scratch / name
        tensors = safetensors_of(folder)
        expected = expected_names(indexer)
        scales = {n + "_scale_inv" for n, dtype in expected.items() if dtype == "F8_E4M3"}
        self.assertEqual(set(tensors), set(expected) | scales)
        for tensor, dtype in expected.items():
            self.assertEqual(tensors[tensor][0], dtype, tensor)
        for scale in scales:
            rows, columns = tensors[scale.removesuffix("_scale_inv")][1]
            self.assertEqual(tensors[scale][:2], ("F32", [-(-rows // 128), -(-columns // 128)]), scale)
        with open(os.path.join(folder, "config.json")) as f:
            config = json.load(f)
        self.assertEqual(config["model_type"], "deepseek_v32" if indexer else "deepseek_v3")
        self.assertEqual(config["quantization_config"]["quant_method"], "fp8")
        if indexer:
            self.assertEqual((config["index_n_heads"], config["index_head_dim"], config["index_topk"]), (2, 16, TOP_K))
        with open(os.path.join(folder, "model.safetensors.index.json")) as f:
            self.assertEqual(set(json.load(f)["weight_map"]), set(tensors))
        self.assertEqual([n for n in os.listdir(folder) if "tmp" in n], [])
        return tensors

    def check_metrics(self, stage, steps, keys, absent):
        lines = metrics(self.scratch / stage)
        self.assertEqual([line["step"] for line in lines], list(range(1, steps + 1)))
        every = {"stage", "time", "expert_load_max_over_mean", "skipped_total", "tokens_total", "tokens_per_second",
                 "step_seconds", "data_seconds", "memory_bytes"}
        layers = CONFIG["num_hidden_layers"] + CONFIG["num_nextn_predict_layers"]
        for line in lines:
            self.assertEqual((every | set(keys)) - set(line), set(), f"{stage} step {line['step']}")
            self.assertEqual(set(absent) & set(line), set())
            self.assertEqual(line["stage"], stage)
            self.assertEqual(line["tokens_total"], line["step"] * 8 * LENGTH)
            for key in set(keys) & {"kl_layer", "recall_layer", "entropy_layer"}:
                self.assertEqual(len(line[key]), layers)
            for key in keys:
                for value in line[key] if isinstance(line[key], list) else [line[key]]:
                    self.assertTrue(value >= 0 and value < 1e6, f"{key} = {value}")  # NaN and Inf are strings
        self.assertEqual(["held_out_loss" in line for line in lines], [line["step"] % 3 == 0 for line in lines])

    def check_events(self, stage, steps, tags):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        events = EventAccumulator(self.scratch / stage)
        events.Reload()
        found = events.Tags()["scalars"]
        tags = tags + ["moe/load_max_over_mean", "perf/tok_s", "perf/step_ms", "mem/peak_gib", "stability/skip",
                       "eval/held_out_loss"]
        self.assertEqual(set(tags) - set(found), set(), f"{stage}: {found}")
        for tag in tags:
            self.assertEqual([e.step for e in events.Scalars(tag)],
                             [s for s in range(1, steps + 1) if tag != "eval/held_out_loss" or s % 3 == 0], tag)
        for line in metrics(self.scratch / stage):
            for tag, key in (("train/lm_loss", "lm_loss"), ("train/kl_mean", "kl_mean")):
                if key in line:
                    event = events.Scalars(tag)[line["step"] - 1].value
                    self.assertAlmostEqual(event, line[key], delta=1e-6 * abs(line[key]))

    def whole_path(self, ranks, mesh):
        scratch = self.scratch
        mesh = sets(*mesh)
        backbone = ["lm_loss", "mtp_loss", "grad_norm_backbone", "lr"]
        indexer = ["kl_mean", "kl_layer", "recall_layer", "entropy_layer", "grad_norm_indexer", "indexer_lr", "top_k"]
        per_layer = [f"{tag}/{layer:02}" for tag in ("train/kl_layer", "dsa/recall_layer", "dsa/entropy_layer")
                     for layer in range(4)]
        backbone_tags = ["train/lm_loss", "train/mtp_loss", "grad_norm/backbone", "lr/backbone"]
        indexer_tags = ["train/kl_mean", "dsa/recall_at_k", "dsa/entropy", "grad_norm/indexer", "lr/indexer"] + per_layer

        run = self.good(ranks, "train", "pretrain.textproto", *mesh)
        self.assertIn("start from random weights", run.out)
        self.assertIn("step 6/6 pretrain", run.out)
        self.assertIn("all 6 steps done", run.out)
        self.check_metrics("pretrain", 6, backbone, indexer)
        self.check_events("pretrain", 6, backbone_tags)
        stored = native_tensors(newest(scratch / "pretrain"))
        self.assertEqual({name.split("/")[0] for name in stored}, {"PARAM", "MOMENT1", "MOMENT2", "BUFFER"})

        self.good(0, "export", "--from", "pretrain", "--to", "v31")
        v31 = self.check_folder("v31", indexer=False)

        run = self.good(ranks, "train", "warmup.textproto", *mesh)
        self.assertIn("HF folder v31", run.out)
        self.assertIn("tokenizer not compared: v31 has no tokenizer.json", run.out)
        self.assertIn("step 6/6 warmup", run.out)
        self.check_metrics("warmup", 6, indexer + ["lm_loss", "mtp_loss"], ["grad_norm_backbone", "lr"])
        self.check_events("warmup", 6, indexer_tags)
        checkpoint = newest(scratch / "warmup")
        for name in native_tensors(checkpoint):
            self.assertIn(".self_attn.indexer.", name, "a warm-up checkpoint holds nothing else")
        self.assertEqual(os.path.realpath(state(checkpoint)["base_path"]), os.path.realpath(scratch / "v31"))

        # What the warm-up froze keeps its bytes. Exported from another folder: the base must still be found.
        self.good(0, "export", "--from", scratch / "warmup", "--to", scratch / "v32_warmup", cwd="/")
        v32 = self.check_folder("v32_warmup", indexer=True)
        frozen = [name for name, (dtype, _, _) in v31.items() if dtype == "F8_E4M3"]
        self.assertGreater(len(frozen), 50)
        for name in frozen + [name + "_scale_inv" for name in frozen] + ["model.embed_tokens.weight", "lm_head.weight"]:
            self.assertEqual(v32[name], v31[name], name)

        run = self.good(ranks, "train", "sparse.textproto", *mesh)
        self.assertIn("tokenizer the model's own", run.out)
        self.assertIn("step 6/6 sparse", run.out)
        self.check_metrics("sparse", 6, backbone + indexer, [])
        self.check_events("sparse", 6, backbone_tags + indexer_tags)
        self.good(0, "export", "--from", "sparse", "--to", "v32")
        trained = self.check_folder("v32", indexer=True)
        self.assertNotEqual(trained["model.embed_tokens.weight"], v31["model.embed_tokens.weight"])
        self.assertNotEqual(trained["model.layers.1.mlp.gate.weight"], v31["model.layers.1.mlp.gate.weight"])

        for path, words in {"v31": ["V3.1", "F8_E4M3", "health"], "v32": ["V3.2", "indexer 2 x 16 top-16", "health"],
                            "warmup": ["run folder", "resumes at", "v31"], checkpoint: ["stage warmup", "PARAM", "MOMENT1"],
                            "tokens.h5": ["token file", "documents", "vocabulary"]}.items():
            run = self.good(0, "inspect", path)
            for word in words:
                self.assertIn(word, run.out, path)
            self.assertNotIn("PROBLEM", run.out)
        for folder in ("pretrain", "warmup", "sparse"):
            self.assertFalse(os.path.exists(os.path.join(scratch / folder, "LOCK")))
            self.assertEqual(len(glob.glob(os.path.join(scratch / folder, "events.out.tfevents.*"))), 1)

        # All steps are done: the same command again changes no checkpoint and says so.
        before = native_tensors(newest(scratch / "sparse"))
        run = self.good(ranks, "train", "sparse.textproto", *mesh)
        self.assertIn("none left of 6", run.out)
        self.assertEqual(native_tensors(newest(scratch / "sparse")), before)

    def setUp(self):
        self.scratch = Scratch()
        self.addCleanup(self.scratch.remove)

    def test_on_two_data_ranks(self):
        self.whole_path(2, [])

    def test_on_four_ranks_tensor_context_expert(self):
        self.whole_path(4, ["parallel.tensor=2", "parallel.context=2", "parallel.expert=2"])


if __name__ == "__main__":
    unittest.main(argv=sys.argv, verbosity=2)
