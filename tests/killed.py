"""train.py, killed in the middle of something: the child of test_resume.py.

    python tests/killed.py PLACE STEP [the options of train.py]    alone, under torchrun; or `run`, forked (forked.py)

    forward     in step STEP, after the first layer                         one rank, the last
    optimizer   in step STEP, after the first of the optimizers             one rank, the last
    shard       in checkpoint STEP, half of a rank's file written           one rank, the last
    manifest    in checkpoint STEP, manifest.json there, its CRC not yet
    rename      in checkpoint STEP, all of it written, not yet in its place
    renamed     in checkpoint STEP, just in its place
    pruning     of checkpoint STEP, which has lost its name and one file
    export      the last checkpoint complete, the model folder not yet

SIGKILL cannot be caught: nothing of Python, torch or the trainer gets to run after it. The product knows nothing of
this file.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import train
from nanollm import block, cli
from nanollm.training import optim, state

PLACE, STEP, LAST = "", 0, False    # what `run` was asked; whether this is the last rank
now = 0                             # the step that is being taken, counted from 1


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def wrap(owner: Any, name: str, around: Callable) -> None:
    """Put around(original, *args) in the place of owner.name."""
    original = getattr(owner, name)
    setattr(owner, name, lambda *args, **kwargs: around(original, *args, **kwargs))


def take_step(original: Callable, run: train.Run, *args: Any) -> Any:
    global now
    now = run.step + 1
    return original(run, *args)


def forward(original: Callable, *args: Any) -> Any:
    out = original(*args)
    if now == STEP and LAST:
        die()
    return out


def step(original: Callable, optimizers: list, lr: float) -> None:
    if now == STEP:
        original(optimizers[:1], lr)            # of two ranks both must take part
        if LAST:
            die()
    original(optimizers, lr)


def write_shards(original: Callable, path: Path, tensors: dict) -> None:
    original(path, tensors)
    if path.parent.name == f".{STEP:08}.tmp" and LAST:
        os.truncate(path, path.stat().st_size // 2)
        die()


def write_manifest(original: Callable, folder: Path, values: dict) -> None:
    if values["step"] == STEP:
        (folder / "manifest.json").write_text(json.dumps(values))
        die()
    original(folder, values)


def publish(original: Callable, draft: Path, whole: Path) -> None:
    if int(whole.name) == STEP:
        if PLACE == "renamed":
            os.rename(draft, whole)
        die()
    original(draft, whole)


def retire(original: Callable, folder: Path) -> None:
    if int(folder.name) == STEP:
        aside = folder.parent / f".{folder.name}.old.tmp"
        os.rename(folder, aside)
        min(aside.glob("rank-*")).unlink()
        die()
    original(folder)


def export(original: Callable, run: train.Run) -> None:
    if run.step == STEP and LAST:
        die()
    original(run)


PLACES = {
    "forward": (block.Block, "forward", forward), "optimizer": (optim, "step", step),
    "shard": (state, "write_shards", write_shards), "manifest": (state, "write_manifest", write_manifest),
    "rename": (state, "publish", publish), "renamed": (state, "publish", publish),
    "pruning": (state, "retire", retire), "export": (train, "export", export),
}


def run() -> None:
    global PLACE, STEP, LAST
    PLACE, STEP = sys.argv[1], int(sys.argv[2])
    LAST = os.environ.get("RANK", "0") == str(int(os.environ.get("WORLD_SIZE", "1")) - 1)
    wrap(train, "take_step", take_step)
    wrap(*PLACES[PLACE])
    sys.argv = ["train.py", *sys.argv[3:]]
    train.run()


if __name__ == "__main__":
    cli.main(run)
