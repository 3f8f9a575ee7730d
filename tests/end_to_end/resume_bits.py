#!/usr/bin/env python3
"""Whether a run of a recipe ends with the same bits after a resume: on this machine, this mesh, at this size. Needs h5py.

    resume_bits.py build/dsatrain RANKS RECIPE [--set path=value]... [--folder runs/resume_bits]

Trains 8 steps with a checkpoint after 4, takes the last one away, runs the same command again, which goes on from step 4,
and compares every tensor of the two last checkpoints. Exit status 0: no bit differs; 1: some do, with their names.
"""
import argparse
import pathlib
import shutil
import subprocess
import sys

import h5py

FOUR_AND_EIGHT = ["schedule.steps=8", "schedule.warmup_steps=2", "checkpoint.every=4", "run.eval_every=8"]


def datasets(checkpoint):
    """{file/name: bytes} of every tensor of a checkpoint's shards, one at a time."""
    for shard in sorted(checkpoint.glob("*.h5")):
        with h5py.File(shard) as file:
            names = []
            file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
            for name in names:
                yield f"{shard.name}/{name}", file[name][()].tobytes()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dsatrain")
    parser.add_argument("ranks", type=int)
    parser.add_argument("recipe")
    parser.add_argument("--set", action="append", default=[], metavar="path=value")
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("runs/resume_bits"))
    arguments = parser.parse_args()
    kept = arguments.folder.with_name(arguments.folder.name + ".kept")
    for folder in (arguments.folder, kept):
        shutil.rmtree(folder, ignore_errors=True)
    command = ["mpirun", "-np", str(arguments.ranks)] if arguments.ranks > 1 else []
    command += [arguments.dsatrain, "train", arguments.recipe]
    for setting in arguments.set + FOUR_AND_EIGHT + [f"run.folder={arguments.folder}"]:
        command += ["--set", setting]
    last = arguments.folder / "checkpoints" / "step-00000008"
    print("$", *command, flush=True)
    subprocess.run(command, check=True)
    last.rename(kept)
    subprocess.run(command, check=True)
    once, resumed = datasets(kept), datasets(last)
    tensors = differ = 0
    for (name, want), (other, got) in zip(once, resumed, strict=True):
        tensors += 1
        if name != other or want != got:
            differ += 1
            print(f"differs: {name}" + ("" if name == other else f" is {other}"))
    print(f"{tensors} tensors, {differ} differ after the resume")
    for folder in (arguments.folder, kept):
        shutil.rmtree(folder)
    return 1 if differ or not tensors else 0


if __name__ == "__main__":
    sys.exit(main())
