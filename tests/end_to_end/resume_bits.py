#!/usr/bin/env python3
"""Whether a run of a recipe ends with the same bits after a resume: on this machine, this mesh, at this size.

    resume_bits.py build/dsatrain RANKS RECIPE [--set path=value]... [--folder runs/resume_bits]

Trains 8 steps with a checkpoint after 4, takes the last one away, runs the same command again, which goes on from step 4,
and compares the files of the two last checkpoints byte for byte. Exit status 0: equal; 1: some differ, with their names.
"""
import argparse
import filecmp
import pathlib
import shutil
import subprocess
import sys

FOUR_AND_EIGHT = ["schedule.steps=8", "schedule.warmup_steps=2", "checkpoint.every=4", "run.eval_every=8"]


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
    names = sorted({path.name for folder in (kept, last) for path in folder.iterdir()})
    _, differ, missing = filecmp.cmpfiles(kept, last, names, shallow=False)
    for name in differ + missing:
        print(f"differs: {name}")
    print(f"{len(names)} files, {len(differ + missing)} differ after the resume")
    if not differ + missing:
        for folder in (arguments.folder, kept):
            shutil.rmtree(folder)
    return 1 if differ + missing else 0


if __name__ == "__main__":
    sys.exit(main())
