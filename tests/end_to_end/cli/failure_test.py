"""A rank that hangs or dies: the others give up within parallel.deadline, say so, and the run ends with exit status 71.

On CPU ranks here; with two GPUs the same over NCCL. A stopped rank (SIGSTOP) is invisible to mpirun; one that dies
(SIGKILL) is hidden from it by a shell around every rank, as a lost machine would be hidden from the others.
"""
import os
import signal
import subprocess
import sys
import time
import unittest

from command_line import *

DEADLINE = {"CPU": 3, "GPU": 8}  # GPUs take their time at the first step
GRACE = 12  # rank 1 speaks ten seconds after the fact, so that rank 0 may speak for all


def gpus():
    try:
        return subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout.count("GPU ")
    except FileNotFoundError:
        return 0


def ranks_below(pid):
    """Process ids of dsatrain below `pid`, rank 0 first."""
    found, family = {}, {pid}
    for child in sorted(int(name) for name in os.listdir("/proc") if name.isdigit()):  # children come after parents
        try:
            with open(f"/proc/{child}/stat") as f:
                name, fields = f.read().rsplit(")", 1)
            if int(fields.split()[1]) not in family:
                continue
            family.add(child)
            if name.split("(", 1)[1] == "dsatrain":
                with open(f"/proc/{child}/environ", "rb") as f:
                    rank = [v for v in f.read().split(b"\0") if v.startswith(b"OMPI_COMM_WORLD_RANK=")]
                found[int(rank[0].split(b"=")[1])] = child
        except FileNotFoundError:
            pass  # it ended meanwhile
    return [found[r] for r in sorted(found)]


class Failure(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.scratch = Scratch()
        cls.addClassCleanup(cls.scratch.remove)

    def lose(self, rank, how, device, wrap=None):
        """Loses `rank` after a few steps; returns mpirun's exit status, the output and the seconds until the end."""
        command = self.scratch.command(2, "train", "pretrain.textproto", *sets(
            "schedule.steps=100000", "checkpoint.every=100000", "run.eval_every=0", f"parallel.deadline={DEADLINE[device]}",
            f"compute.device={device}", f"run.folder=lost-{device}-{how.name}-{rank}"))
        if wrap:
            at = command.index(DSATRAIN)
            command[at:] = ["sh", "-c", wrap, "sh", *command[at:]]
        process = subprocess.Popen(command, cwd=self.scratch.path, text=True, stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                                   env={**os.environ, "OMP_NUM_THREADS": "1"})
        out = ""
        for line in process.stdout:
            out += line
            if line.startswith("step 5/"):
                break
        victims = ranks_below(process.pid)
        self.assertEqual(len(victims), 2, out)
        begin = time.time()
        os.kill(victims[rank], how)
        try:
            out += process.communicate(timeout=120)[0]
        finally:
            for pid in victims:
                try:
                    os.kill(pid, signal.SIGKILL)  # a stopped process survives a polite end
                except ProcessLookupError:
                    pass
        return process.returncode, out, time.time() - begin

    def check(self, device, ranks):
        for rank in ranks:
            code, out, seconds = self.lose(rank, signal.SIGSTOP, device)
            self.assertEqual(code, 71, out)
            self.assertIn("stands still", out)
            self.assertIn("parallel.deadline", out)
            self.assertLess(seconds, DEADLINE[device] + GRACE, out)
            print(f"{device}: rank {rank} stopped, exit 71 after {seconds:.1f} s", flush=True)
        # The shell keeps mpirun from noticing the death, and passes the exit status of the others on.
        code, out, seconds = self.lose(1, signal.SIGKILL, device, '"$@"; code=$?; [ $code != 137 ] || sleep 60; exit $code')
        self.assertEqual(code, 71, out)
        self.assertIn("stands still", out)
        self.assertLess(seconds, DEADLINE[device] + GRACE, out)
        print(f"{device}: rank 1 killed, exit 71 after {seconds:.1f} s", flush=True)

    def test_cpu_ranks(self):
        self.check("CPU", (0, 1))

    def test_gpu_ranks(self):
        if gpus() < 2:
            self.skipTest("no CUDA device for every one of two ranks")
        self.check("GPU", (1,))


if __name__ == "__main__":
    unittest.main(argv=sys.argv, verbosity=2)
