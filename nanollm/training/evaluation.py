"""The held-out (validation) loss, which of a run's evaluations was the best, and which checkpoint that means.

    evaluation        at step 0, every --eval-every steps, at the end
    rows              64 of the held-out ones, evenly spaced and the same each time, so that steps can be compared; all
                      of them at the end of the run
    --keep-best       the checkpoint of the best evaluation stays beside the newest, and is exported at the end
    --patience N      the run ends after N evaluations in a row that were no better: early stopping

"Best" is the lowest loss on those 64 rows; a loss that is no number is no better than any. With --tasks it is the
highest mean over the tasks, as the lowest of its negatives (benchmarks/evaluate/training.py).
"""

import argparse
import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nanollm.data.stream import Source
from nanollm.errors import RunError
from nanollm.model import Decoder
from nanollm.training import distributed, state
from nanollm.training.distributed import DTYPES, World
from nanollm.training.losses import Loss, means

ROWS = 64               # of an evaluation between steps


@dataclass
class Best:
    """The best evaluation of a run so far. A checkpoint keeps it among its facts."""
    step: int = 0
    loss: float | None = None           # None: nothing was evaluated yet
    since: int = 0                      # evaluations after it
    newest: float | None = None         # the held-out loss of the newest evaluation

    def judge(self, step: int, loss: float) -> bool:
        """Take in one evaluation; whether it is the best so far."""
        if better := math.isfinite(loss) and (self.loss is None or loss < self.loss):
            self.step, self.loss, self.since = step, loss, 0
        else:
            self.since += 1
        return better

    def exhausted(self, patience: int | None) -> bool:
        """Whether early stopping ends the run."""
        return patience is not None and self.since >= patience

    def restored(self, folder: Path, step: int, tensors: Mapping[str, Tensor], world: World) -> bool:
        """Put the best checkpoint of runs/NAME/steps in the place of the last step. False where it is the last step
        itself, or could not be kept."""
        path = folder / f"{self.step:08}"
        if self.loss is None or self.step == step:
            return False
        if not world.broadcast(path.exists()):                  # it could not be written, or was not asked for then
            if world.rank == 0:
                warnings.warn(f"{path} was not kept: the model is that of step {step}", stacklevel=2)
            return False
        world.on_all_ranks(lambda: state.load(path, tensors))
        return True

    def facts(self) -> dict[str, float | None]:
        """As a checkpoint keeps it: `Best(**facts)` is the same again."""
        return dataclasses.asdict(self)


@torch.no_grad()
def held_out_means(
    model: Decoder, loss: Loss, source: Source | None, world: World, options: argparse.Namespace,
    most: int | None = None,
) -> dict[str, float]:
    """What the method says of `most` rows of the source, evenly spaced, or of all: "loss", nats per token as a rule,
    and what else it has.

    The ranks share the rows out. Outside of a step the model is in eval mode, see phase.py.
    """
    assert source is not None
    rows = spaced(source.rows, most)
    each, parts, count = options.micro_batch, list[Tensor](), 0
    for at in range(0, len(rows), each * world.size):
        mine = rows[at + world.rank * each :][:each]
        batch = source.stack([source.row(i) for i in mine or rows[:1]])     # all ranks take part in each forward pass
        with distributed.cast(model, DTYPES[options.dtype]):
            _, sums = loss(model, batch.to(world.device), options)
        if mine:
            parts.append(torch.stack([*sums.values()]).double())
            count += batch.divisor
    for module in distributed.sharded_modules(model):
        module.reshard()                        # a backward pass would have; without one what was gathered stays
    mine_of_all = torch.stack(parts).sum(0).tolist() if parts else [0.0] * len(sums)
    *totals, targets = world.all_reduce(*mine_of_all, count)
    return means(dict(zip(sums, totals, strict=True)), targets)


def spaced(rows: int, most: int | None) -> range:
    """`most` rows of so many, evenly spaced, or all."""
    return range(0, rows, 1 if most is None else math.ceil(rows / most))


def need_held_out(options: argparse.Namespace, source: Source | None) -> None:
    """Raise RunError where an option needs held-out rows, and there are none."""
    for name in ("eval_only", "keep_best", "patience"):
        if getattr(options, name) and source is None and (name == "eval_only" or not options.tasks):
            raise RunError(f"--{name.replace('_', '-')} needs a held-out loss, and of this data nothing is held out")


def find_checkpoint(folder: Path, which: str) -> Path:
    """The checkpoint in runs/NAME/steps that --export names: a step, "last" or "best". Raises RunError."""
    kept = state.complete(folder)
    if not kept:
        raise RunError(f"{folder}: no checkpoint yet")
    if which == "last":
        return kept[-1]
    step = best_step(state.read_manifest(kept[-1])["facts"]) if which == "best" else int(which)
    found = next((path for path in kept if int(path.name) == step), None)
    if found is None:
        what = f"the best one, of step {step}, was not kept; --keep-best keeps it" if which == "best" else (
            f"none of step {step}")
        raise RunError(f"{folder}: {what}; there {listed([int(path.name) for path in kept])}, or last")
    return found


def best_step(facts: dict) -> int:
    """Of the facts of a checkpoint. Raises RunError where the run had not evaluated anything."""
    best = Best(**facts.get("best", {}))
    if best.loss is None:
        raise RunError("this run has evaluated nothing yet, so no checkpoint is its best; --export last or a step")
    return best.step


def listed(steps: Sequence[int]) -> str:
    """The kept steps, for a message."""
    return f"is step {steps[0]}" if len(steps) == 1 else f"are steps {', '.join(map(str, steps))}"
