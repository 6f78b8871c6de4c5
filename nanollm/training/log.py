"""The log of a run: log.jsonl, TensorBoard and Weights & Biases where asked for, and the report at its end."""

import contextlib
import json
from pathlib import Path
from typing import Any, TextIO

from nanollm.errors import RunError
from nanollm.training.corpus import Corpus
from nanollm.training.plot import loss_curve
from nanollm.training.runs import STOP, write


class Log:
    """The log of rank 0. On other ranks it writes nothing.

    A full disk raises no error in the middle of a step, because the other ranks would wait for rank 0. Instead
    `request` asks all ranks to stop after the next step, and then `check` raises the error.
    """

    def __init__(
        self, folder: Path | None, after: int, tensorboard: bool, wandb: str | None, facts: dict[str, Any]
    ) -> None:
        """folder: None on other ranks. after: the step that the run goes on from.

        Entries of later steps, which an earlier start wrote, are dropped, and so is an incomplete last line.
        """
        self.file: TextIO | None = None
        self.tensorboard: Any = None
        self.wandb: Any = None
        self.problem: str | None = None
        if folder is None:
            return
        path = folder / "log.jsonl"
        kept = [entry for entry in read_log(path) if entry["step"] <= after] if path.exists() else []
        write(path, "".join(json.dumps(entry) + "\n" for entry in kept))
        self.file = path.open("a", buffering=1)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            self.tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=after + 1)
        if wandb:
            import wandb as weights_and_biases
            self.wandb = weights_and_biases.init(
                project=wandb, name=folder.name, dir=str(folder), config=facts, resume="allow"
            )

    def __call__(self, step: int, **values: Any) -> None:
        numbers = {name: value for name, value in values.items() if isinstance(value, (int, float))}
        if self.file:
            try:
                self.file.write(json.dumps({"step": step, **values}) + "\n")
            except OSError as error:
                self.problem = f"{self.file.name}: cannot write: {error.strerror}"
        if self.tensorboard:
            for name, value in numbers.items():
                self.tensorboard.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log(numbers, step=step)

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
        if self.tensorboard:
            self.tensorboard.close()
        if self.wandb:
            self.wandb.finish()


def read_log(path: Path) -> list[dict[str, Any]]:
    """The entries of a log.jsonl, up to the first line that is incomplete."""
    entries = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            entries.append(json.loads(line))
        except ValueError:
            break
    return entries


def shown(entry: dict[str, Any], held_out: float | None) -> dict[str, str]:
    """The figures of a step that the progress bar shows."""
    values = {
        "loss": entry.get("loss"), "held_out": held_out, "tokens_per_s": entry.get("tokens_per_second"),
        "mfu": entry.get("mfu"), "gb": entry.get("memory_gb"),
    }
    return {
        name: f"{value:,}" if isinstance(value, int) else f"{value:.3g}"
        for name, value in values.items() if value is not None
    }


def report(folder: Path, corpus: Corpus, title: str) -> str:
    """The final held-out loss beside that of gzip and of a unigram model, as lines of text; draws loss.png."""
    log = read_log(folder / "log.jsonl")
    losses = [(entry["step"], entry["loss"]) for entry in log if "loss" in entry]
    held_out = [(entry["step"], entry["held_out_loss"]) for entry in log if "held_out_loss" in entry]
    facts, references, lines = corpus.facts, {}, []
    if facts and held_out:
        gzip, unigram = facts.gzip_bits_per_byte / corpus.bits_per_byte(1.0), facts.unigram_loss
        references = {"unigram": unigram, "gzip": gzip}
        head = f"held out: {facts.held_out_documents} documents, {facts.held_out_bytes / 1e6:.2f} MB"
        lines = [f"{head:<46}{'nats/token':>12}{'bits/byte':>12}"]
        rows = (
            ("this model", held_out[-1][1]),
            ("gzip -9, on the held-out text by itself", gzip),
            ("unigram model: how frequent each token is", unigram),
        )
        lines += [f"  {label:<44}{loss:>12.3f}{corpus.bits_per_byte(loss):>12.3f}" for label, loss in rows]
    elif held_out:
        lines = [f"  {'held out, nats per target':<44}{held_out[-1][1]:>12.3f}"]
    picture = " (loss.png needs: pip install matplotlib)"
    if losses:
        last = [loss for _, loss in losses[-50:]]
        lines.append(f"  {'(training, last 50 steps)':<44}{sum(last) / len(last):>12.3f}")
        if loss_curve(folder / "loss.png", losses, held_out, references, title):
            picture = ", loss.png"
    return "\n".join([*lines, f"{folder}: model, tokenizer, log.jsonl{picture}"])
