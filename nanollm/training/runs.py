"""The run folder: whose it is, what was asked, what happened.

    runs/demo/run.json       options, the model's config, a fingerprint of the data; versions, git state of each start
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

OURS = ("config.json", "generation_config.json", "tokenizer*", "*.tiktoken", "tekken.json", "vocab.json", "merges.txt",
        "added_tokens.json", "special_tokens_map.json", "chat_template.jinja", "model*.safetensors*", "log.jsonl",
        "loss.png")
# Options that may differ when a run is resumed: they do not change what is computed, but for the order of sums
FREE = {"out", "force", "resume", "config", "device", "micro_batch", "replicas", "recompute", "compile", "offload",
        "eval_every", "sample_every", "save_every", "keep", "prompt", "tensorboard", "wandb", "skip_steps", "plan",
        "world_size", "mfu", "title"}


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder, which is made if need be and removed again if nothing was put in. Raises RunError where another
    process holds it, a worker left over by a killed torchrun included. The lock ends with the process, however that
    ends."""
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
            process = file.read().decode(errors="replace").strip() or "unknown"
            raise RunError(f"{folder}: another run is at work in it (process {process}); wait for it, end it, or name "
                           "another folder with --out") from None
        except OSError as error:
            raise RunError(f"{folder}: cannot be locked: {error.strerror}; name a folder on another disk with "
                           "--out") from None
        with contextlib.suppress(OSError):                      # a full disk is reported when it matters
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
    """Raise RunError unless the folder is new, or holds a run and --resume or --force says what becomes of it."""
    try:
        there = {path.name for path in folder.iterdir()}
    except (FileNotFoundError, NotADirectoryError):             # the second kind is reported by `locked`
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
    """Raise RunError that lists each difference from run.json which would change the numbers of the run."""
    try:
        before = json.loads((folder / "run.json").read_text())
        changed = []
        for part, values in plain(facts).items():
            for name, value in values.items():
                if name not in FREE and before[part].get(name) != value:
                    label = "--" + name.replace("_", "-") if part == "options" else f"{part}.{name}"
                    changed.append(f"{label} {before[part].get(name)} → {value}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{folder / 'run.json'}: not a record of train.py: {error!r}") from None
    if changed:
        raise RunError(f"{folder}: holds another run ({'; '.join(changed)}); with --resume --force it goes on like "
                       "that all the same")


def plain(facts: dict[str, Any]) -> dict[str, Any]:
    """As JSON will give it back: paths are strings, tuples lists."""
    return json.loads(json.dumps(facts, default=str))


def clear(folder: Path) -> None:
    """Delete what an earlier run left, so that a run that is cut short leaves no model but its own. Prepared text
    stays, and so does run.json, which says whose folder it is until the next one replaces it."""
    for checkpoint in state.complete(folder / "steps"):
        state.retire(checkpoint)
    for pattern in OURS:
        for path in folder.glob(pattern):
            path.unlink()


def record(folder: Path, facts: dict[str, Any], resume: bool) -> None:
    """Write run.json: facts are the options, the model and the data. Starts of a resumed run are added up."""
    path, starts = folder / "run.json", []
    if resume and path.exists():
        with contextlib.suppress(ValueError, KeyError, TypeError):      # not a record: only --force comes this far
            starts = json.loads(path.read_text())["starts"]
    packages = {name: version(name) for name in ("torch", "numpy", "safetensors", "tokenizers", "triton")}
    start = {"time": datetime.now(timezone.utc).isoformat(timespec="seconds"), "command": [sys.executable, *sys.argv],
             "git": git(), "host": platform.node(), "python": platform.python_version(), "packages": packages,
             "ranks": int(os.environ.get("WORLD_SIZE", 1))}
    write(path, json.dumps(plain(facts) | {"starts": [*starts, start]}, indent=2) + "\n")


def write(path: Path, text: str) -> None:
    """Write a file beside its place and rename it: it is old or new, never half. Raises RunError where it cannot."""
    draft = path.with_name(f".{path.name}.tmp")
    try:
        draft.write_text(text)
        os.replace(draft, path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise RunError(f"{path}: cannot write: {error.strerror}; make room, then --resume") from None


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A folder for a model, whose files move into `folder` after the block. Raises RunError where they cannot."""
    for left in folder.glob(".model.*"):                        # by a run that was killed here
        shutil.rmtree(left, ignore_errors=True)
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".model.") as draft:
            yield Path(draft) / "model"
            for path in (Path(draft) / "model").iterdir():
                os.replace(path, folder / path.name)
    except OSError as error:
        raise RunError(f"{folder}: the model cannot be written: {error.strerror or error}; its last checkpoint is "
                       "whole: make room, then --resume") from None


# ---- signals

SAVE, LEAVE, STOP = 1, 2, 3     # requests: of SIGUSR1, of SIGTERM, of a log that cannot be written. The largest counts


class Requests:
    """The largest request of a signal since the last step."""

    def __init__(self) -> None:
        self.pending = 0

    def add(self, request: int) -> None:
        """What a signal handler does."""
        self.pending = max(self.pending, request)

    def served(self, request: int) -> None:
        """All ranks have agreed on `request`. A larger one came after that, and is for the next step."""
        if self.pending <= request:
            self.pending = 0


@contextlib.contextmanager
def signals() -> Iterator[Requests]:
    """Inside the block a signal does not end the process, but becomes a request, which the loop serves after a step."""
    requests = Requests()
    before = {signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: requests.add(LEAVE)),
              signal.SIGUSR1: signal.signal(signal.SIGUSR1, lambda *_: requests.add(SAVE))}
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def gc_frozen() -> Iterator[None]:
    """Inside the block Python's garbage collector passes over older objects: in large runs that would stall steps."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


# ---- records

def start(folder: Path, facts: dict[str, Any], resume: bool, force: bool) -> None:
    """Make the folder this run's, and write run.json. A resumed run must be the one there, any other replaces it."""
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
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None
