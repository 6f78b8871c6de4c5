"""The run folder: whose it is, what was asked, what happened.

    runs/demo/run.json       every option, the model's config, the data's fingerprint, versions, git state; one entry a start
              log.jsonl      a line a step, and one for each look at the held-out text, each sample, each checkpoint
              steps/         checkpoints (state.py)            data/      text made ready (data/prepare.py)
              config.json, model.safetensors, tokenizer.json …  the model as a Hugging Face folder      loss.png
              lock           held by the run that is at work here
"""

import contextlib
import fcntl
import gc
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from nanollm.errors import RunError
from nanollm.training import state

OURS = ("config.json", "generation_config.json", "tokenizer*", "*.tiktoken", "tekken.json", "vocab.json", "merges.txt", "added_tokens.json",
        "special_tokens_map.json", "chat_template.jinja", "model*.safetensors*", "log.jsonl", "loss.png")
# These may differ when a run goes on: they do not change what is computed, but for the order of sums
FREE = {"out", "force", "resume", "config", "device", "micro_batch", "replicas", "recompute", "compile", "offload", "eval_every", "sample_every",
        "save_every", "keep", "prompt", "tensorboard", "wandb", "skip_steps", "plan", "world_size", "mfu", "title"}


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder, which is made if need be and goes again if nothing was put in. Raises RunError where another process holds it, a worker
    left over by a killed torchrun included. The lock goes with the process, however it ends."""
    try:
        new = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock").open("a+b", buffering=0)
    except OSError as error:
        raise RunError(f"{folder}: cannot write: {error.strerror}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise RunError(f"{folder}: another run is at work in it (process {file.read().decode(errors='replace').strip() or 'unknown'}); wait for it, end it, or name another folder with --out") from None
        except OSError as error:
            raise RunError(f"{folder}: cannot be locked: {error.strerror}; name a folder on another disk with --out") from None
        with contextlib.suppress(OSError):                      # a full disk: the run will hear of it when it writes what matters
            file.truncate(0)
            file.write(str(os.getpid()).encode())
        try:
            yield
        finally:
            if {path.name for path in folder.iterdir()} == {"lock"}:
                (folder / "lock").unlink()
                with contextlib.suppress(OSError):              # another run may have moved in beside it
                    for path in new:
                        path.rmdir()


def check(folder: Path, options: dict[str, Any], resume: bool, force: bool) -> None:
    """Raise RunError unless the folder is new, or holds a run and it is said what is to become of it."""
    try:
        there = {path.name for path in folder.iterdir()}
    except (FileNotFoundError, NotADirectoryError):             # of the second kind `locked` knows more
        there = {folder.name} if folder.exists() else set()
    except OSError as error:
        raise RunError(f"{folder}: cannot be read: {error.strerror}; name another folder with --out") from None
    if not there - {"lock", "data", ".run.json.tmp"}:           # the last: killed when it began
        return
    if not (folder / "run.json").is_file():
        raise RunError(f"{folder}: not empty, and not made by train.py; name another folder with --out")
    if resume and not force:
        compare(folder, {"options": options})
    if not resume and not force:
        last = state.complete(folder / "steps")
        raise RunError(f"{folder}: holds a run{f' with a checkpoint at step {int(last[-1].name)}' if last else ''}; "
                       "--resume goes on with it, --force starts over, --out names another folder")


def compare(folder: Path, facts: dict[str, Any]) -> None:
    """Raise RunError that lists each difference from run.json which would make another computation of the run."""
    try:
        before = json.loads((folder / "run.json").read_text())
        changed = [f"{'--' + name.replace('_', '-') if part == 'options' else f'{part}.{name}'} {before[part].get(name)} → {value}"
                   for part, values in plain(facts).items() for name, value in values.items() if name not in FREE and before[part].get(name) != value]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{folder / 'run.json'}: not a record of train.py: {error!r}") from None
    if changed:
        raise RunError(f"{folder}: holds another run ({'; '.join(changed)}); with --resume --force it goes on like that all the same")


def plain(facts: dict[str, Any]) -> dict[str, Any]:
    """As JSON will give it back: paths are strings, tuples lists."""
    return json.loads(json.dumps(facts, default=str))


def clear(folder: Path) -> None:
    """Away with what an earlier run left, but for its prepared text, and run.json, which says whose folder it is until the next one has
    its place: a run that is cut short leaves no model but its own."""
    for checkpoint in state.complete(folder / "steps"):
        state.retire(checkpoint)
    for pattern in OURS:
        for path in folder.glob(pattern):
            path.unlink()


def record(folder: Path, facts: dict[str, Any], resume: bool) -> None:
    """Write run.json: facts are the options, the model and the data. What a run that goes on had before stays under "starts"."""
    path, starts = folder / "run.json", []
    if resume and path.exists():
        with contextlib.suppress(ValueError, KeyError, TypeError):              # not a record: only --force comes this far with one
            starts = json.loads(path.read_text())["starts"]
    packages = {name: version(name) for name in ("torch", "numpy", "safetensors", "tokenizers", "triton")}
    start = {"time": datetime.now(timezone.utc).isoformat(timespec="seconds"), "command": [sys.executable, *sys.argv], "git": git(), "host": platform.node(),
             "python": platform.python_version(), "packages": packages, "ranks": int(os.environ.get("WORLD_SIZE", 1))}
    write(path, json.dumps(plain(facts) | {"starts": [*starts, start]}, indent=2) + "\n")


def write(path: Path, text: str) -> None:
    """Beside its place, then into it: the file is what it was, or what it shall be. Raises RunError where it cannot be written."""
    draft = path.with_name(f".{path.name}.tmp")
    try:
        draft.write_text(text)
        os.replace(draft, path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise RunError(f"{path}: cannot write: {error.strerror}; make room, then --resume") from None


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A place to make a model folder in, whose files move into `folder` when the block is done. Raises RunError where they cannot."""
    for left in folder.glob(".model.*"):                        # by a run that was killed here
        shutil.rmtree(left, ignore_errors=True)
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".model.") as draft:
            yield Path(draft) / "model"
            for path in (Path(draft) / "model").iterdir():
                os.replace(path, folder / path.name)
    except OSError as error:
        raise RunError(f"{folder}: the model cannot be written: {error.strerror or error}; its last checkpoint is whole: make room, then --resume") from None


# ---- signals

SAVE, LEAVE, STOP = 1, 2, 3     # what SIGUSR1 and SIGTERM ask for, and what a log that cannot be written does


class Asked:
    """The most that a signal has asked of this process since the last answer."""

    def __init__(self) -> None:
        self.wish = 0

    def answered(self, wish: int) -> None:
        if self.wish <= wish:                   # one that came after the ranks agreed on `wish` is for the next step
            self.wish = 0


@contextlib.contextmanager
def signals() -> Iterator[Asked]:
    """Inside the block a signal does not end the process; the loop looks at what was asked for after each step."""
    asked = Asked()
    before = {number: signal.signal(number, lambda *_, wish=wish: setattr(asked, "wish", max(asked.wish, wish)))
              for number, wish in ((signal.SIGTERM, LEAVE), (signal.SIGUSR1, SAVE))}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def settled() -> Iterator[None]:
    """Inside the block Python's garbage collector does not look again at what was there before: on large runs it would stall steps."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


# ---- records

def start(folder: Path, facts: dict[str, Any], resume: bool, force: bool) -> None:
    """Make the folder this run's: what goes on is compared with what was, anything else is cleared away; then run.json is written."""
    if resume and (folder / "run.json").exists():
        if not force:
            compare(folder, facts)
    else:
        try:
            clear(folder)
        except OSError as error:
            raise RunError(f"{folder}: the run in it cannot be cleared away: {error}") from None
    record(folder, facts, resume)


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def git() -> str | None:
    """The commit of this source, with -dirty where files differ from it."""
    try:
        found = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None
