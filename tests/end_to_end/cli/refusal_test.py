"""Every wrong input is refused before any work: the right exit status, one message `problem (why) suggestion` said once,
also under mpirun -np 2, and not a byte anywhere that was not there before."""
import struct
import sys
import unittest
import unittest.mock

from command_line import *


class Refusals(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        """A V3.1 folder, a short warm-up from it (one rank, no mpirun), and what the single tests break."""
        cls.scratch = scratch = Scratch()
        cls.addClassCleanup(scratch.remove)
        for arguments in (["train", "pretrain.textproto"], ["export", "--from", "pretrain", "--to", "v31"],
                          ["train", "warmup.textproto"]):
            run = scratch.run(0, *arguments, *(sets("schedule.steps=1", "run.eval_every=0")
                                                                                if arguments[0] == "train" else []))
            assert run.code == 0, run
        with open(scratch / "other_config.json", "w") as f:
            json.dump({**CONFIG, "hidden_size": 128, "num_hidden_layers": 2}, f)
        write_tokens(scratch / "ids_beyond.h5", vocabulary=100)
        write_tokens(scratch / "vocabulary_beyond.h5", vocabulary=600, limit=600)
        write_tokens(scratch / "other_tokenizer.h5", tokenizer="0" * 64)
        with open(scratch / "a_file", "w") as f:
            f.write("in the way")

    def refused(self, ranks, arguments, code, *words):
        """Runs, and checks status, message and the untouched folder."""
        before = self.scratch.tree()
        run = self.scratch.run(ranks, *arguments)
        self.assertEqual(run.code, code, run)
        said = [line for line in (run.out + "\n" + run.err).splitlines() if "error:" in line]
        self.assertEqual(len(said), 1, run)
        for word in words:
            self.assertIn(word, run.out + run.err, run)
        self.assertNotIn("internal", run.err)
        self.assertNotIn("[rank", run.err)
        if code == 3:
            self.assertRegex(said[0], r"^error: [^(]+ \(.+\) .+")
        self.assertEqual(self.scratch.tree(), before)
        return said[0]

    def train(self, stage, code, words, *values, ranks=2):
        return self.refused(ranks, ["train", f"{stage}.textproto", *sets(*values)], code, *words)

    def broken(self, change):
        """A copy of v31 after change(header of its shard, index); headers are edited in place, so lengths must not change."""
        folder = self.scratch / "broken"
        shutil.copytree(self.scratch / "v31", folder)
        self.addCleanup(shutil.rmtree, folder)
        index_path = os.path.join(folder, "model.safetensors.index.json")
        with open(index_path) as f:
            index = json.load(f)
        shard = os.path.join(folder, sorted(set(index["weight_map"].values()))[0])
        with open(shard, "rb") as f:
            n = struct.unpack("<Q", f.read(8))[0]
            header = json.loads(f.read(n))
            data = f.read()
        change(header, index["weight_map"])
        text = json.dumps(header).encode()
        with open(shard, "wb") as f:
            f.write(struct.pack("<Q", len(text)) + text + data)
        with open(index_path, "w") as f:
            json.dump(index, f)
        return shard

    # The recipe: exit status 2.

    def test_unknown_field(self):
        with open(self.scratch / "unknown.textproto", "w") as f:
            f.write('extends: "warmup.textproto"\nbatch { sequenzes: 8 }\n')
        self.refused(2, ["train", "unknown.textproto"], 2, "unknown.textproto:2:9", "sequenzes", "sequences")

    def test_unknown_field_on_the_command_line(self):
        self.train("warmup", 2, ["batch.sequenzes", "--set"], "batch.sequenzes=8")

    def test_recipe_that_is_not_there(self):
        self.refused(2, ["train", "nowhere.textproto"], 2, "nowhere.textproto")

    def test_mesh_that_does_not_fit_the_ranks(self):
        self.train("warmup", 2, ["parallel.tensor=3", "the 2 ranks"], "parallel.tensor=3", "data.sequence_length=96")

    def test_too_few_ranks(self):
        self.train("warmup", 2, ["parallel.tensor=2 x parallel.context=2", "multiple of 4"], "parallel.tensor=2",
                   "parallel.context=2")

    def test_ranks_that_slurm_started(self):
        os.environ.update(PMIX_RANK="0", SLURM_STEP_NUM_TASKS="3")
        self.addCleanup(lambda: [os.environ.pop(name) for name in ("PMIX_RANK", "SLURM_STEP_NUM_TASKS")])
        self.train("warmup", 2, ["the 3 ranks"], "parallel.tensor=2", ranks=0)

    def test_mesh_that_does_not_divide_the_model(self):
        with open(self.scratch / "three_heads.json", "w") as f:
            json.dump({**CONFIG, "num_attention_heads": 3, "num_key_value_heads": 3}, f)
        self.train("pretrain", 2, ["parallel.tensor=2", "num_attention_heads=3", "legal: 1"], "parallel.tensor=2",
                   "model.config=three_heads.json", "run.folder=new")

    def test_gpu_that_is_not_there(self):
        with unittest.mock.patch.dict(os.environ, {"CUDA_VISIBLE_DEVICES": ""}):  # also where there is one
            for ranks in (0, 2):
                said = self.train("warmup", 2, ["cannot use a GPU", "compute.device: CPU"], "compute.device=GPU",
                                  "batch.sequences=8", "run.folder=new", ranks=ranks)
                self.assertRegex(said, r"^error: [^(]+ \(.+\) .+")

    def test_batch_that_does_not_split(self):
        self.train("warmup", 2, ["batch.sequences", "2 data ranks"], "batch.sequences=6")

    def test_sparse_from_a_folder_without_indexer(self):
        self.train("sparse", 2, ["stage SPARSE needs an indexer", "WARMUP", "1 error."], "init.from=v31", "run.folder=new")

    # Inputs and checkpoints: exit status 3.

    def test_folder_that_is_not_there(self):
        self.train("warmup", 3, ["nowhere", "no such folder"], "init.from=nowhere", "run.folder=new")

    def test_missing_shard(self):
        shard = self.broken(lambda header, index: None)
        os.unlink(shard)
        self.train("warmup", 3, [os.path.basename(shard)], "init.from=broken", "run.folder=new")

    def test_truncated_shard(self):
        shard = self.broken(lambda header, index: None)
        os.truncate(shard, os.path.getsize(shard) - 1)
        self.train("warmup", 3, [os.path.basename(shard)], "init.from=broken", "run.folder=new")

    def test_wrong_shape(self):
        def change(header, index):
            shape = header["model.layers.1.mlp.gate.weight"]["shape"]
            shape.reverse()
        self.broken(change)
        self.train("warmup", 3, ["model.layers.1.mlp.gate.weight is [64, 4] instead of [4, 64]"], "init.from=broken",
                   "run.folder=new")

    def test_wrong_dtype(self):
        def change(header, index):
            header["model.norm.weight"]["dtype"] = "I16"
        self.broken(change)
        self.train("warmup", 3, ["model.norm.weight", "I16"], "init.from=broken", "run.folder=new")

    def test_missing_tensor(self):
        name = "model.layers.2.mlp.experts.3.up_proj.weight"
        def change(header, index):
            header["stray"], index["stray"] = header.pop(name), index.pop(name)
            header["stray_scale_inv"], index["stray_scale_inv"] = header.pop(name + "_scale_inv"), index.pop(name + "_scale_inv")
        self.broken(change)
        self.train("warmup", 3, [f"missing: {name}", "unexpected: stray"], "init.from=broken", "run.folder=new")

    def test_token_file_that_is_not_there(self):
        self.train("warmup", 3, ["nowhere.h5"], "data.tokens=nowhere.h5", "run.folder=new")

    def test_token_beyond_its_vocabulary(self):
        self.train("warmup", 3, ["ids_beyond.h5", "its vocabulary ends at 100"], "data.tokens=ids_beyond.h5", "run.folder=new")

    def test_vocabulary_beyond_the_model(self):
        self.train("warmup", 3, ["600 exceeds the model's 258"], "data.tokens=vocabulary_beyond.h5", "run.folder=new")

    def test_too_few_tokens(self):
        self.train("warmup", 3, ["tokens.h5", "held out"], "data.held_out=100000", "run.folder=new")

    def test_other_tokenizer_than_the_checkpoint(self):
        self.train("sparse", 3, ["0" * 64, "tokenizer"], "data.tokens=other_tokenizer.h5", "run.folder=new",
                   "schedule.steps=1")

    def test_other_tokenizer_than_the_model_folder(self):
        self.broken(lambda header, index: None)
        with open(self.scratch / "broken/tokenizer.json", "w") as f:
            f.write("{}")
        self.train("warmup", 3, [hashlib.sha256(b"{}").hexdigest(), "tokenizer"], "init.from=broken", "run.folder=new")

    def test_same_tokenizer_as_the_model_folder(self):
        self.broken(lambda header, index: None)
        with open(self.scratch / "broken/tokenizer.json", "w") as f:
            f.write("token " * 500_000)
        write_tokens(self.scratch / "same.h5", tokenizer=hashlib.sha256(b"token " * 500_000).hexdigest())
        self.addCleanup(shutil.rmtree, self.scratch / "same")
        run = self.scratch.run(1, "train", "warmup.textproto", *sets("init.from=broken", "run.folder=same", "schedule.steps=1",
                                                                   "data.tokens=same.h5"))
        self.assertEqual(run.code, 0, run)
        self.assertIn("tokenizer the model's own", run.out)

    def test_unwritable_run_folder(self):
        self.train("warmup", 3, ["cannot create the run folder a_file/run"], "run.folder=a_file/run")

    def test_run_folder_that_is_a_file(self):
        self.train("warmup", 3, ["a_file"], "run.folder=a_file")

    def test_run_folder_in_use(self):
        import socket
        lock = os.path.join(self.scratch / "warmup", "LOCK")
        with open(f"/proc/{os.getpid()}/stat") as f:
            start = f.read().rsplit(")", 1)[1].split()[19]
        with open("/proc/sys/kernel/random/boot_id") as f:
            boot = f.read().strip()
        with open(lock, "w") as f:
            f.write(f"{socket.gethostname()} {os.getpid()} {boot}/{start}\n")
        self.addCleanup(os.unlink, lock)
        self.train("warmup", 3, ["is in use", str(os.getpid())], "schedule.steps=2")

    def test_checkpoint_of_another_model(self):
        self.train("pretrain", 3, ["hidden_size 64", "hidden_size 128", "num_hidden_layers 3"], "schedule.steps=2",
                   "model.config=other_config.json")

    def test_checkpoint_of_another_stage(self):
        self.train("warmup", 3, ["the stage", "pretrain"], "run.folder=pretrain")

    def test_checkpoint_of_another_top_k(self):
        self.train("warmup", 3, ["top-k there is 16", "8"], "model.indexer.top_k=8", "schedule.steps=2")

    def test_checkpoint_of_other_data(self):
        self.train("warmup", 3, ["the data"], "data.seed=5", "schedule.steps=2")

    def test_base_of_a_checkpoint_that_is_gone(self):
        os.rename(self.scratch / "v31", self.scratch / "moved")
        self.addCleanup(os.rename, self.scratch / "moved", self.scratch / "v31")
        self.train("sparse", 3, ["v31", "is gone"], "run.folder=new")

    def test_no_sound_checkpoint(self):
        shutil.copytree(self.scratch / "warmup", self.scratch / "torn")
        self.addCleanup(shutil.rmtree, self.scratch / "torn")
        os.truncate(os.path.join(newest(self.scratch / "torn"), "MANIFEST.json"), 100)
        self.train("warmup", 3, ["cannot resume the run in torn", "none of its checkpoints is sound"], "run.folder=torn")

    # The other subcommands.

    def test_export_onto_an_existing_folder(self):
        self.refused(0, ["export", "--from", "warmup", "--to", "v31"], 3, "exists already")

    def test_export_under_a_file(self):
        self.refused(0, ["export", "--from", "warmup", "--to", "a_file/folder"], 3, "a_file")

    def test_export_names_what_a_killed_one_left(self):
        os.mkdir(self.scratch / "twice.tmp-17")
        self.addCleanup(lambda: [shutil.rmtree(self.scratch / name) for name in ("twice.tmp-17", "twice")])
        run = self.scratch.run(0, "export", "--from", "warmup", "--to", "twice/")
        self.assertEqual(run.code, 0, run)
        self.assertIn("twice.tmp-17 is left", run.out)
        self.assertEqual(len(safetensors_of(self.scratch / "twice")), len(safetensors_of(self.scratch / "v31")) + 4 * 7)

    def test_export_of_nothing(self):
        self.refused(0, ["export", "--from", "nowhere", "--to", "new"], 3, "nowhere")

    def test_export_of_an_indexer_that_is_not_there(self):
        self.refused(0, ["export", "--from", "pretrain", "--to", "new", "--format", "v3.2"], 3, "no indexer")

    def test_export_of_an_unknown_dtype(self):
        self.refused(0, ["export", "--from", "pretrain", "--to", "new", "--dtype", "int4"], 2, "int4")

    def probe(self, tokens, code, *words, out="probe.safetensors", ranks=0, mesh=()):
        self.refused(ranks, ["probe", "--model", "v31", "--tokens", tokens, "--attention", "dense", "--dtype", "fp32", "--out",
                             out, *mesh], code, *words)

    def write_ids(self, ids):
        from safetensors.numpy import save_file
        save_file({"input_ids": np.asarray(ids, np.int32)}, self.scratch / "ids.safetensors")
        self.addCleanup(os.unlink, self.scratch / "ids.safetensors")
        return "ids.safetensors"

    def test_probe_without_tokens(self):
        self.probe("nowhere.safetensors", 3, "nowhere.safetensors")

    def test_probe_of_tokens_beyond_the_vocabulary(self):
        self.probe(self.write_ids([[1, 2, 258] * 8]), 3, "258", "vocabulary", ranks=2)

    def test_probe_of_negative_tokens(self):
        self.probe(self.write_ids([[1, -2, 3]]), 3, "-2")

    def test_probe_of_tokens_of_another_rank(self):
        self.probe(self.write_ids([1, 2, 3]), 3, "[batch, time]")

    def test_probe_onto_an_existing_file(self):
        self.probe(self.write_ids([[1, 2, 3]]), 3, "exists", out="a_file")

    def test_probe_into_a_folder_that_is_not_there(self):
        self.probe(self.write_ids([[1, 2, 3]]), 3, "there is no folder", out="nowhere/out.safetensors")

    def test_probe_on_a_mesh_that_does_not_fit(self):
        self.probe(self.write_ids([[1, 2, 3]]), 2, "2", ranks=2, mesh=["--tensor", "3"])

    def test_probe_of_sparse_attention_without_indexer(self):
        tokens = self.write_ids([list(range(40))])
        self.refused(0, ["probe", "--model", "v31", "--tokens", tokens, "--attention", "sparse", "--dtype", "fp32", "--out",
                         "new.safetensors"], 3, "indexer")

    def test_inspect_nothing(self):
        self.refused(0, ["inspect", "nowhere"], 3, "it is not there")

    def test_inspect_finds_the_wrong_shape(self):
        self.broken(lambda header, index: header["model.layers.1.mlp.gate.weight"]["shape"].reverse())
        run = self.scratch.run(0, "inspect", "broken")
        self.assertEqual(run.code, 3, run)
        self.assertIn("PROBLEM", run.out)

    # The command line itself.

    def test_unknown_subcommand(self):
        for ranks in (0, 2):
            self.refused(ranks, ["convert"], 2, "no subcommand convert", "train, export, probe, inspect, recipe")

    def test_nothing(self):
        self.refused(0, [], 2, "subcommand is required")

    def test_unknown_option(self):
        self.refused(0, ["train", "warmup.textproto", "--sett", "a=b"], 2, "--sett")

    def test_help(self):
        words = {"": ["train", "export", "probe", "inspect", "recipe"],
                 "train": ["--set", "mpirun", "resume", "SIGUSR1", "Exit status"],
                 "export": ["--from", "--to", "v3.1", "v3.2", "fp8", "bf16", "fp32"],
                 "probe": ["--model", "--tokens", "--attention", "--dtype", "--gradients", "--tensor", "--indexer-seed", "logits"],
                 "inspect": ["path", "Exit status"], "recipe": ["--set", "Example"]}
        for command, expected in words.items():
            run = self.scratch.run(0, *command.split(), "--help")
            self.assertEqual((run.code, run.err), (0, ""), run)
            for word in expected:
                self.assertIn(word, run.out, command)


if __name__ == "__main__":
    unittest.main(argv=sys.argv, verbosity=2)
