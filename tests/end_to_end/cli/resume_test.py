"""20 steps at a stretch equal 10 steps, an end, and 10 more, to the last bit: parameters, moments, router bias, losses.

The end is SIGKILL to all ranks or to one at step 13, with the last checkpoint at 10, or SIGUSR1 to mpirun, upon which the
run saves the step it is at and ends with exit status 75. fp32, two data ranks (so the optimizer's state is sharded).
"""
import signal
import sys
import time
import unittest

from command_line import *

STEPS = sets("schedule.steps=20", "run.eval_every=20")
TIMING = {"time", "tokens_per_second", "step_seconds", "data_seconds", "memory_bytes", "checkpoint"}


def ranks_of(mpirun):
    """The process ids of its ranks, rank 0 first."""
    with open(f"/proc/{mpirun.pid}/task/{mpirun.pid}/children") as f:
        children = [int(pid) for pid in f.read().split()]
    def rank(pid):
        with open(f"/proc/{pid}/environ", "rb") as f:
            found = [v for v in f.read().split(b"\0") if v.startswith(b"OMPI_COMM_WORLD_RANK=")]
        return int(found[0].split(b"=")[1])
    return sorted(children, key=rank)


class Resume(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        """The three stages at a stretch; each starts from the one before."""
        cls.scratch = Scratch()
        cls.addClassCleanup(cls.scratch.remove)
        for stage in ("pretrain", "warmup", "sparse"):
            run = cls.scratch.run(2, "train", f"{stage}.textproto", *STEPS)
            assert run.code == 0, run
            if stage == "pretrain":
                run = cls.scratch.run(0, "export", "--from", "pretrain", "--to", "v31")
                assert run.code == 0, run

    def interrupt(self, stage, folder, at_step, how):
        """Starts the stage into `folder`, calls how(mpirun) when the line of at_step appears; returns exit status and output."""
        process = self.scratch.start(2, "train", f"{stage}.textproto", *STEPS, *sets(f"run.folder={folder}"),
                                     stderr=subprocess.STDOUT)
        out = ""
        for line in process.stdout:
            out += line
            if line.startswith(f"step {at_step}/"):
                how(process)
                break
        out += process.communicate(timeout=200)[0]
        return process.returncode, out

    def continue_and_compare(self, stage, folder, from_step):
        run = self.scratch.run(2, "train", f"{stage}.textproto", *STEPS, *sets(f"run.folder={folder}"))
        self.assertEqual(run.code, 0, run)
        self.assertIn(f"(step {from_step})", run.out)
        self.assertIn(f"\nstep {from_step + 1}/20", run.out)
        self.assertNotIn(f"\nstep {from_step}/20", run.out)
        straight, resumed = newest(self.scratch / stage), newest(self.scratch / folder)
        self.assertTrue(straight.endswith("step-00000020") and resumed.endswith("step-00000020"))
        expected, found = native_tensors(straight), native_tensors(resumed)
        self.assertEqual(set(found), set(expected))
        self.assertEqual([name for name in expected if expected[name] != found[name]], [])
        roles = {name.split("/")[0] for name in expected}
        self.assertEqual(roles, {"PARAM", "MOMENT1", "MOMENT2"} | (set() if stage == "warmup" else {"BUFFER"}))
        shards = [[(s["name"], s["xxh3_128"]) for s in manifest(checkpoint)["files"]] for checkpoint in (straight, resumed)]
        self.assertEqual(*shards)  # whole files
        changing = {"recipe_text", "recipe_digest"}  # they name the run folder
        for key, value in state(straight).items():
            if key not in changing:
                self.assertEqual(state(resumed)[key], value, key)
        untimed = [[{k: v for k, v in line.items() if k not in TIMING} for line in metrics(self.scratch / name)]
                   for name in (stage, folder)]
        self.assertEqual(untimed[0], untimed[1])
        self.assertFalse(os.path.exists(os.path.join(self.scratch / folder, "LOCK")))

    def killed(self, stage, folder, victims):
        """SIGKILL at step 13; `victims` of a run's processes."""
        def kill(mpirun):
            for pid in victims(mpirun):
                os.kill(pid, signal.SIGKILL)
        for attempt in range(3):  # on a busy machine step 20 may be done before the signal arrives
            code, out = self.interrupt(stage, folder, 13, kill)
            time.sleep(0.2)  # processes that lost their mpirun are still ending
            if not os.path.exists(os.path.join(self.scratch / folder, "checkpoints", "step-00000020")):
                break
            shutil.rmtree(self.scratch / folder)
        self.assertNotEqual(code, 0, out)
        self.assertTrue(newest(self.scratch / folder).endswith("step-00000010"), out)
        self.assertGreaterEqual(len(metrics(self.scratch / folder)), 13)
        self.continue_and_compare(stage, folder, 10)

    def test_killed_before_the_first_checkpoint(self):
        def kill(mpirun):
            for pid in self.all_ranks(mpirun):
                os.kill(pid, signal.SIGKILL)
        for attempt in range(3):
            self.interrupt("warmup", "warmup_early", 2, kill)
            time.sleep(0.2)
            if not os.path.exists(os.path.join(self.scratch / "warmup_early", "checkpoints", "step-00000010")):
                break
            shutil.rmtree(self.scratch / "warmup_early")
        run = self.scratch.run(0, "inspect", "warmup_early")
        self.assertEqual(run.code, 0, run)
        self.assertIn("run folder", run.out)
        run = self.scratch.run(2, "train", "warmup.textproto", *STEPS, *sets("run.folder=warmup_early"))
        self.assertEqual(run.code, 0, run)
        self.assertIn("start from HF folder v31", run.out)
        self.assertEqual(native_tensors(newest(self.scratch / "warmup_early")), native_tensors(newest(self.scratch / "warmup")))
        self.assertEqual([line["step"] for line in metrics(self.scratch / "warmup_early")], list(range(1, 21)))

    def all_ranks(self, mpirun):
        return ranks_of(mpirun) + [mpirun.pid]

    def stopped(self, stage, folder):
        code, out = self.interrupt(stage, folder, 6, lambda mpirun: mpirun.send_signal(signal.SIGUSR1))
        self.assertEqual(code, 75, out)
        self.assertEqual(out.count("stopped on request after step"), 1, out)
        self.assertIn("pre-empted at step", out)
        checkpoint = newest(self.scratch / folder)
        step = state(checkpoint)["step"]
        self.assertIn(step, range(6, 20))
        self.assertFalse(os.path.exists(os.path.join(self.scratch / folder, "LOCK")))
        self.continue_and_compare(stage, folder, step)

    def test_pretrain_after_sigkill_of_all(self):
        self.killed("pretrain", "pretrain_killed", self.all_ranks)

    def test_warmup_after_sigkill_of_rank_1(self):
        self.killed("warmup", "warmup_killed", lambda mpirun: ranks_of(mpirun)[1:])

    def test_sparse_after_sigkill_of_all(self):
        self.killed("sparse", "sparse_killed", self.all_ranks)

    def test_sparse_after_sigkill_of_rank_0(self):
        self.killed("sparse", "sparse_rank_0", lambda mpirun: ranks_of(mpirun)[:1])

    def test_pretrain_after_sigusr1(self):
        self.stopped("pretrain", "pretrain_stopped")

    def test_warmup_after_sigusr1(self):
        self.stopped("warmup", "warmup_stopped")

    def test_sparse_after_sigusr1(self):
        self.stopped("sparse", "sparse_stopped")

    def test_sigterm_to_the_ranks(self):
        def stop(mpirun):
            for pid in ranks_of(mpirun):
                os.kill(pid, signal.SIGTERM)
        code, out = self.interrupt("warmup", "warmup_terminated", 6, stop)
        self.assertEqual(code, 75, out)
        self.continue_and_compare("warmup", "warmup_terminated", state(newest(self.scratch / "warmup_terminated"))["step"])

    def test_gradients_that_are_not_finite(self):
        run = self.scratch.run(2, "train", "pretrain.textproto", *STEPS, *sets("run.folder=infinite", "optimizer.lr=1e37"))
        self.assertEqual(run.code, 65, run)
        self.assertEqual(run.err.count("gradients were not finite in 5 steps in a row"), 1, run)
        self.assertIn("| skip 5 |", run.out)
        last = metrics(self.scratch / "infinite")[-1]
        self.assertEqual((last["skipped_total"], last["grad_norm_backbone"]), (5, "nan"))
        self.assertFalse(os.path.exists(os.path.join(self.scratch / "infinite", "LOCK")))

    def test_damage_falls_back_to_the_checkpoint_before_and_says_so(self):
        shutil.copytree(self.scratch / "sparse", self.scratch / "damaged")
        with open(os.path.join(newest(self.scratch / "damaged"), "shard-r0001.h5"), "r+b") as f:
            f.seek(-100, os.SEEK_END)
            byte = f.read(1)
            f.seek(-100, os.SEEK_END)
            f.write(bytes([byte[0] ^ 1]))
        run = self.scratch.run(2, "train", "sparse.textproto", *STEPS, *sets("run.folder=damaged"))
        self.assertEqual(run.code, 0, run)
        self.assertIn("skipped step 20: ", run.out)
        self.assertIn("(step 10)", run.out)
        self.assertEqual(native_tensors(newest(self.scratch / "damaged")), native_tensors(newest(self.scratch / "sparse")))


if __name__ == "__main__":
    unittest.main(argv=sys.argv, verbosity=2)
