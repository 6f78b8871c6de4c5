"""The log of a run: log.jsonl, the monitors that get the same numbers, and the report at its end."""

import argparse
import contextlib
import json
import math
from pathlib import Path
from typing import Any, TextIO

import torch
from tqdm import tqdm

from nanollm.errors import RunError, counted
from nanollm.model import Decoder
from nanollm.training import methods, monitors, reward
from nanollm.training.corpus import Corpus
from nanollm.training.plot import loss_curve
from nanollm.training.runs import STOP, write
from nanollm.training.state import Saver


class Log:
    """The log of rank 0. On other ranks it writes nothing.

    A full disk raises no error in the middle of a step, because the other ranks would wait for rank 0. Instead
    `request` asks all ranks to stop after the next step, and then `check` raises the error.
    """

    def __init__(self, folder: Path | None, after: int, options: argparse.Namespace, facts: dict[str, Any]) -> None:
        """folder: None on other ranks. after: the step that the run goes on from. options: they name the monitors.

        Entries of later steps, which an earlier start wrote, are dropped, and so is an incomplete last line.
        """
        self.file: TextIO | None = None
        self.monitors: list[monitors.Monitor] = []
        self.problem: str | None = None
        if folder is None:
            return
        path = folder / "log.jsonl"
        kept = [entry for entry in read_log(path) if entry["step"] <= after] if path.exists() else []
        write(path, "".join(json.dumps(entry) + "\n" for entry in kept))
        self.file = path.open("a", buffering=1)
        self.monitors = monitors.opened(folder, options, after, facts)

    def __call__(self, step: int, **values: Any) -> None:
        if self.file:
            try:
                self.file.write(json.dumps({"step": step, **values}) + "\n")
            except OSError as error:
                self.problem = f"{self.file.name}: cannot write: {error.strerror}"
        if numbers := {name: value for name, value in values.items() if isinstance(value, (int, float))}:
            monitors.send(self.monitors, step, numbers)

    @property
    def request(self) -> int:
        return STOP if self.problem else 0

    def check(self) -> None:
        """Raises RunError if an entry could not be written."""
        if self.problem:
            raise RunError(f"{self.problem}; the last checkpoint is whole: make room, then --resume")

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: object) -> None:
        if self.file:
            with contextlib.suppress(OSError):                  # tries once more what a full disk refused
                self.file.close()
        monitors.close(self.monitors)


def finish(saver: Saver, log: Log, needed: bool = False) -> None:
    """Complete the checkpoint that is being written, if one is. Where that fails training goes on with a warning,
    unless the checkpoint is `needed`."""
    if saver.thread is None:
        return
    step, problem = saver.step, saver.finish()
    log(step, checkpoint=f"steps/{step:08}" if problem is None else f"failed: {problem}")
    if problem and needed:
        raise RunError(f"the checkpoint of step {step} cannot be written: {problem}; make room, then --resume")
    if problem and saver.world.rank == 0:
        tqdm.write(f"warning: no checkpoint at step {step}: {problem}; training goes on, and older checkpoints are as "
                   "they were")


def read_log(path: Path) -> list[dict[str, Any]]:
    """The entries of a log.jsonl, up to the first line that is incomplete."""
    entries = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            entries.append(json.loads(line))
        except ValueError:
            break
    return entries


def begun(options: argparse.Namespace, model: Decoder, ranks: int, step: int) -> str:
    """What a run is, in the line that it begins with. The parameters are those of the model without adapters, in
    whatever number of bits; how many are trained is said where not all of them are."""
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Decoder(model.config).parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    rows = math.ceil(options.steps / options.updates) * options.batch_size
    seen = f"{millions(rows)} rows" if methods.files(options) else f"{millions(rows * options.context)} tokens"
    return (f"{options.init or options.preset}: {millions(parameters)} parameters, "
            + (f"{millions(trained)} trained, " if trained != parameters else "")
            + f"{seen} to see, products in {options.dtype} on {ranks} × {options.device}"
            + (f", on from step {step}" if step else ""))


def millions(count: int) -> str:
    """A count as a person reads it: 6,960, 0.72 M, 46,702.79 M."""
    return f"{count / 1e6:,.2f} M" if count >= 1e5 else f"{count:,}"


def shown(entry: dict[str, Any], held_out: float | None) -> dict[str, str]:
    """The figures of a step that the progress bar shows."""
    rewarded = "reward" in entry                # then what is held out is a reward, too, with a minus
    values = {
        "reward": entry.get("reward"), "loss": entry.get("loss"),
        "held_out": -held_out if rewarded and held_out is not None else held_out,
        "tokens_per_s": entry.get("tokens_per_second"), "mfu": entry.get("mfu"), "gb": entry.get("memory_gb"),
    }
    return {
        name: f"{value:,}" if isinstance(value, int) else f"{value:.3g}"
        for name, value in values.items() if value is not None
    }


def known_losses(corpus: Corpus) -> dict[str, float]:
    """What a held-out loss compares with, nats per token, where that was counted."""
    facts = corpus.facts
    if facts is None:
        return {}
    return {"unigram": facts.unigram_loss, "gzip": facts.gzip_bits_per_byte / corpus.bits_per_byte(1.0)}


def measured(corpus: Corpus, loss: float) -> list[str]:
    """A held-out loss beside that of gzip and of a unigram model, as lines of text."""
    facts, known = corpus.facts, known_losses(corpus)
    if corpus.rewarded:
        return [f"  {'held out, reward':<44}{-loss:>12.3f}"]
    if corpus.targets_per_byte is None:
        return [f"  {'held out, nats per target':<44}{loss:>12.3f}"]
    head, rows = "held out", [("this model", loss)]
    if facts:
        head += f": {facts.held_out_documents} documents, {facts.held_out_bytes / 1e6:.2f} MB"
        rows += [("gzip -9, on the held-out text by itself", known["gzip"]),
                 ("unigram model: how frequent each token is", known["unigram"])]
    return [f"{head:<46}{'nats/token':>12}{'bits/byte':>12}",
            *(f"  {label:<44}{loss:>12.3f}{corpus.bits_per_byte(loss):>12.3f}" for label, loss in rows)]


def report(folder: Path, corpus: Corpus, title: str) -> str:
    """The held-out loss of the model that was written, as lines of text; draws loss.png."""
    log = read_log(folder / "log.jsonl")
    losses = [(entry["step"], entry["loss"]) for entry in log if "loss" in entry]
    held_out = [(entry["step"], entry["held_out_loss"]) for entry in log if "held_out_loss" in entry]
    exported = [(entry["exported"], entry["exported_loss"]) for entry in log if "exported" in entry][-1:]
    lines = [f"the checkpoint of step {step}, the best, is exported" for step, _ in exported]
    lines += measured(corpus, (exported or held_out)[-1][1]) if held_out else []
    rewards = [entry["reward"] for entry in log if "reward" in entry]
    picture = " (loss.png needs: pip install matplotlib)"
    if losses:
        last = rewards[-50:] or [loss for _, loss in losses[-50:]]
        what = ("reward, ", "round") if rewards else ("", "step")
        label = f"({what[0]}training, last {counted(len(last), what[1])})"
        lines.append(f"  {label:<44}{sum(last) / len(last):>12.3f}")
        references = known_losses(corpus) if held_out else {}
        if loss_curve(folder / "loss.png", losses, held_out, references, title):
            picture = ", loss.png"
    written = "adapter" if (folder / "adapter_config.json").exists() else "model"
    if (folder / reward.FILE).exists():
        written = f"a reward model for --reward-model {folder}: {written}, {reward.FILE}"
    return "\n".join([*lines, f"{folder}: {written}, tokenizer, log.jsonl{picture}"])
