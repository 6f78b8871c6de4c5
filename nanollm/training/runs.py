"""The run folder: its lock, its record run.json, and what may be resumed in it. Also the signals that a run answers.

    runs/demo/run.json       every option, the model's config, the data's fingerprint; for each start of the run the
                             time, command, versions and git commit
              log.jsonl      a line for each step, each held-out loss, each sample, each checkpoint
              steps/         checkpoints (state.py)
              data/          tokenized text (data/prepare.py)
              chats/         chats as tokens (data/chat_store.py)
              vocabulary/    the tokenizer with the tokens of --add-tokens (text/adding.py)
              config.json, model.safetensors, tokenizer.json …  the model as a Hugging Face folder
              loss.png       the loss curve
              monitors.json  the ids by which W&B and MLflow know the run
              lock           held by the process that runs here
"""

import argparse
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

from nanollm.config import ModelConfig
from nanollm.data.prepare import discard
from nanollm.errors import ConfigError, RunError
from nanollm.training import state
from nanollm.training.arguments import DEFAULTS, build_parser, kind

OURS = ("config.json", "generation_config.json", "tokenizer*", "*.tiktoken", "tekken.json", "vocab.json", "merges.txt",
        "added_tokens.json", "special_tokens_map.json", "chat_template.*", "model*.safetensors*", "adapter_config.json",
        "adapter_model.safetensors", "score.safetensors", "log.jsonl", "loss.png", "monitors.json")
# Options that may differ on --resume. All but skip_steps change no number except by the order of sums; skip_steps is
# there to leave out the rows that made a run diverge. data is compared by what it holds, wherever that lies.
FREE = {"out", "data", "force", "resume", "config", "device", "micro_batch", "replicas", "recompute", "compile",
        "offload", "eval_every", "sample_every", "save_every", "keep", "prompt", "tensorboard", "wandb", "skip_steps",
        "plan", "world_size", "mfu", "title", "mlflow", "gradient_accumulation", "eval_only", "export", "keep_best",
        "patience", "tasks", "evaluate_every", "tasks_data", "tasks_limit",
        "epochs"}                               # steps and rows say it
# What a run learns by. Another method has other options, so that two runs have no one difference.
METHODS = ("preference", "reward", "grpo", "ppo", "teacher", "chat")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock the folder inside the block. It is made where it does not exist, and removed again if nothing was put in.

    Raises RunError where another process has the lock, which may be a worker that a killed torchrun left behind. The
    lock is released when the process ends, however it ends.
    """
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
            raise RunError(f"{folder}: another run is at work in it (process {process}); "
                           "wait for it, end it, or name another folder with --out") from None
        except OSError as error:
            raise RunError(f"{folder}: cannot be locked: {error.strerror}; "
                           "name a folder on another disk with --out") from None
        with contextlib.suppress(OSError):                      # a full disk is reported when the run writes its record
            file.truncate(0)
            file.write(str(os.getpid()).encode())
        discard(folder / "data")                                # of a run that was killed while it tokenized text
        try:
            yield
        finally:
            discard(folder / "data")
            if {path.name for path in folder.iterdir()} == {"lock"}:
                (folder / "lock").unlink()
                with contextlib.suppress(OSError):              # another run may have put something in
                    for path in new:
                        path.rmdir()


def check(folder: Path, options: dict[str, Any], resume: bool, force: bool) -> None:
    """Raise RunError unless the folder is new, or holds a run and --resume or --force says what to do with it."""
    try:
        there = {path.name for path in folder.iterdir()}
    except (FileNotFoundError, NotADirectoryError):             # `locked` has a message for the second
        there = {folder.name} if folder.exists() else set()
    except OSError as error:
        raise RunError(f"{folder}: cannot be read: {error.strerror}; name another folder with --out") from None
    # .run.json.tmp: of a run that was killed at its start
    if not there - {"lock", "data", "chats", "vocabulary", ".run.json.tmp"}:
        return
    if not (folder / "run.json").is_file():
        raise RunError(f"{folder}: not empty, and not made by train.py; name another folder with --out")
    if resume and not force:
        compare(folder, {"options": options})
    if not resume and not force:
        found = state.complete(folder / "steps")
        checkpoint = f" with a checkpoint at step {int(found[-1].name)}" if found else ""
        raise RunError(f"{folder}: holds a run{checkpoint}; "
                       "--resume goes on with it, --force starts over, --out names another folder")


def compare(folder: Path, facts: dict[str, Any]) -> None:
    """Raise RunError that lists each difference from run.json, if there is one, that would change what is computed.

    Where the model is another one, --force cannot go on: the weights have other shapes. That happens to a toy of
    presets.py after a version that changes it. An option that an older version did not have was not given there;
    another fact that it did not record counts as None.
    """
    path, changed, advice = folder / "run.json", [], "with --resume --force it goes on like that all the same"
    if not path.exists():
        return
    try:
        before = json.loads(path.read_text())
        before["options"] = usual(facts.get("options", {})) | before["options"]
        with contextlib.suppress(ConfigError):                  # fields that came later have their defaults
            before["model"] = ModelConfig.from_dict(before["model"]).to_dict() if "model" in before else {}
        was, now = method(before["options"]), method(before["options"] | facts.get("options", {}))
        if was != now:
            raise RunError(f"{folder}: holds another run ({was} → {now}); a run goes on with the method that it began "
                           "with: repeat its command with --resume; --out names another folder, "
                           f"{from_it(folder, before['options'])}")
        for part, values in facts.items():
            for name, value in values.items():
                old = before.get(part, {}).get(name)
                if name == "chat" and isinstance(old, str):     # of a version with one set
                    old = [old]
                if part == "options" and (name in FREE or same_option(name, old, value)) or old == plain(value):
                    continue
                label = "--" + name.replace("_", "-") if part == "options" else f"{part}.{name}"
                nested = part == "model" and isinstance(value, list | dict)             # the layers: pages
                changed.append(f"other {label}" if nested else f"{label} {old} → {plain(value)}")
                if part == "model":
                    advice = "--force starts over, --out names another folder"
                elif name == "steps":
                    advice = ("the learning rate falls over all of --steps, so the steps that are done had other rates "
                              f"than in a run of {value}; with --resume --force it goes on at the rates of a run of "
                              f"{value}; --out names another folder, {from_it(folder, before['options'])}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{path}: not a record of train.py: {error!r}") from None
    if changed:
        raise RunError(f"{folder}: holds another run ({'; '.join(changed)}); {advice}")


def method(options: dict[str, Any]) -> str:
    """What a run learns by, as its options say it."""
    name = next((name for name in METHODS if options.get(name)), None)
    return f"--{name}{' --loss ' + options['loss'] if options.get('loss') else ''}" if name else "text"


def from_it(folder: Path, options: dict[str, Any]) -> str:
    """How a run begins from what this one became, after the name of its own folder."""
    if options.get("lora_rank") or options.get("adapter"):
        return f"where --adapter {folder} beside the same --init begins from its adapter"
    return f"where --init {folder} begins from its model"


def usual(options: dict[str, Any]) -> dict[str, Any]:
    """Every option where it is not given, for a run of this kind, as run.json has it."""
    usual = vars(build_parser("").parse_args([]))
    column = kind(argparse.Namespace(**usual | options))
    return plain(usual | {name: values[column] for name, values in DEFAULTS.items()})


def same_option(name: str, old: Any, new: Any) -> bool:
    """Whether an option means what it did: it depends on the data and is not settled yet, or it names the same files
    by other paths."""
    news, olds = new if isinstance(new, list) else [new], old if isinstance(old, list) else [old]
    if new is None:
        return name in DEFAULTS
    paths = name == "chat" or all(isinstance(path, Path) for path in news)
    return (paths and len(news) == len(olds) > 0 and None not in olds
            and all(os.path.realpath(a) == os.path.realpath(b) for a, b in zip(olds, news, strict=True)))


def plain(facts: Any) -> Any:
    """The facts as JSON gives them back: paths become strings, tuples lists."""
    return json.loads(json.dumps(facts, default=str))


def clear(folder: Path) -> None:
    """Delete what an earlier run left, so that a run that is cut short leaves no model of another run.

    The tokenized text stays. So does run.json until the next one replaces it: it marks the folder as one of train.py.
    """
    for checkpoint in state.complete(folder / "steps"):
        state.retire(checkpoint)
    for pattern in OURS:
        for path in folder.glob(pattern):
            path.unlink()


def record(folder: Path, facts: dict[str, Any], resume: bool) -> None:
    """Write run.json: the facts (options, model and data), and under "starts" this start after the earlier ones."""
    path, starts = folder / "run.json", []
    if resume and path.exists():
        with contextlib.suppress(ValueError, KeyError, TypeError):      # not a record of train.py: only with --force
            starts = json.loads(path.read_text())["starts"]
    packages = {name: version(name) for name in ("torch", "numpy", "safetensors", "tokenizers", "triton")}
    start = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": [sys.executable, *sys.argv], "git": git(), "host": platform.node(),
        "python": platform.python_version(), "packages": packages, "ranks": int(os.environ.get("WORLD_SIZE", 1)),
    }
    write(path, json.dumps(plain(facts) | {"starts": [*starts, start]}, indent=2) + "\n")


def write(path: Path, text: str) -> None:
    """Write a draft and rename it, so that the file has its old text or all of the new.

    Raises RunError where it cannot be written.
    """
    draft = path.with_name(f".{path.name}.tmp")
    try:
        draft.write_text(text)
        os.replace(draft, path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise RunError(f"{path}: cannot write: {error.strerror}; make room, then --resume") from None


@contextlib.contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A temporary model folder, whose files are moved into `folder` at the end of the block.

    Raises RunError where they cannot be written.
    """
    for left in folder.glob(".model.*"):                        # of a run that was killed at this point
        shutil.rmtree(left, ignore_errors=True)
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".model.") as draft:
            yield Path(draft) / "model"
            for path in (Path(draft) / "model").iterdir():
                os.replace(path, folder / path.name)
    except OSError as error:
        raise RunError(f"{folder}: the model cannot be written: {error.strerror or error}; "
                       "its last checkpoint is whole: make room, then --resume") from None


# ---- signals

# Requests: of SIGUSR1, of SIGTERM, of Ctrl-C, of a log that cannot be written. The largest counts.
SAVE, LEAVE, INTERRUPT, STOP = 1, 2, 3, 4

CTRL_C = "\nCtrl-C: the run saves a checkpoint after this step and leaves; once more ends it at once"


class Requests:
    """The largest request of a signal since the last one was served."""

    def __init__(self) -> None:
        self.pending = 0

    def served(self, request: int) -> None:
        """All ranks have agreed on `request`. A larger one came after that, and waits for the next step."""
        if self.pending <= request:
            self.pending = 0


@contextlib.contextmanager
def signals() -> Iterator[Requests]:
    """Inside the block SIGTERM, SIGUSR1 and a first Ctrl-C do not end the process: they are requests, which the loop
    serves. A second Ctrl-C ends it. Where Ctrl-C is ignored, as in the background of a script, it is here too."""
    requests, meaning = Requests(), {signal.SIGTERM: LEAVE, signal.SIGUSR1: SAVE, signal.SIGINT: INTERRUPT}
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        del meaning[signal.SIGINT]

    def handle(number: int, _: object) -> None:
        requests.pending = max(requests.pending, meaning[signal.Signals(number)])
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)
            say(CTRL_C)

    before = {number: signal.signal(number, handle) for number in meaning}
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def say(line: str) -> None:
    """A line on standard error, on rank 0. By the system's own call, which a signal's handler may make at any time."""
    if os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):                      # standard error is closed
            os.write(2, f"{line}\n".encode())


def end_as_asked(request: int) -> None:
    """Raise KeyboardInterrupt where Ctrl-C ended the run, so that a shell does not go on to what is next."""
    if request == INTERRUPT:
        raise KeyboardInterrupt


@contextlib.contextmanager
def gc_frozen() -> Iterator[None]:
    """Inside the block Python's garbage collector skips older objects: on large runs, visiting them stalls steps."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


# ---- records

def start(folder: Path, facts: dict[str, Any], resume: bool) -> None:
    """The first change of a run folder, when all is checked: clear it for a new run; then write run.json."""
    if not resume or not (folder / "run.json").exists():
        try:
            clear(folder)
        except OSError as error:
            raise RunError(f"{folder}: the run in it cannot be cleared away: {error}") from None
    record(folder, facts, resume)


def version(package: str) -> str | None:
    """The installed version of a package; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def git() -> str | None:
    """The commit of this source, with -dirty where files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None
