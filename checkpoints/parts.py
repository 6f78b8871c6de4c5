"""One rank's part of a folder, read without the rest: tensor parallelism (nanollm/inference/tensor_parallel.py).

    folder ── open_source ──→ the whole model, on the meta device        as ever: all of the plan is checked
           ── divide ───────→ the rank's model, and which part of each parameter it has
           ── cut ──────────→ of each stored tensor what belongs to that part, as if it were all there is
           ── fill ─────────→ as ever: it reads a smaller model from smaller tensors

What of a stored tensor is the rank's? The rule that says where our parameters lie in it (names/ops.py) is asked for the
pieces of *marks*: tensors of the parameters' shapes that say for each element whether the rank has it. q, k and v in
one tensor, with K = 2, for the first of two ranks, which has the heads of the first key/value head:

    marks     q ■ ■ □ □    k ■ □    v ■ □
    pieces    q q k v q q k v   →   ■ ■ ■ ■ □ □ □ □     so the rank reads the first half, which is q q k v, K = 1

Marks are views of one row of bits, so they take no memory. Ranges of rows are read in one stretch, of columns row by
row: in both ways no byte that belongs to another rank.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from checkpoints.layouts import hub
from checkpoints.names import table
from checkpoints.names.ops import Beside, Piece
from checkpoints.source import Source, open_source
from checkpoints.storage.files import Stored
from nanollm.errors import CheckpointError, InputError
from nanollm.inference.quantize import KINDS, plan_for
from nanollm.inference.tensor_parallel import Part, Share, connect, divide
from nanollm.model import Decoder


def load_part(source: str | Path, rank: int, ranks: int, *, dtype: torch.dtype | None = None,
              device: str | torch.device = "cpu", ignore: Collection[str] = (), quantize: str | None = None) -> Decoder:
    """What `checkpoints.load` gives, divided among ranks: the logits of all of them are those of the whole model.

    Every rank calls this, and torch.distributed must have begun when the model runs. `quantize` rounds what a rank has,
    so its groups and scales are not those of the whole model. Raises what `load` does, and InputError for a layer that
    cannot be divided; CheckpointError for files that cannot be read in parts. Then nothing was allocated."""
    if not 0 <= rank < ranks or quantize not in (None, *KINDS):
        raise InputError(f"rank {rank} of {ranks}, quantize {quantize!r}: expected a rank from 0 to {ranks - 1}, and "
                         f"{', '.join(KINDS)}, or None")
    found = open_source(hub.local_path(source), ignore)
    part = divide(found.model, rank, ranks)
    found = cut(found, part)
    model = found.fill(dtype, device, plan_for(found.model, quantize) if quantize else None)
    return connect(model)


@dataclass(frozen=True)
class Strip:
    """Rows of a stored tensor, `width` elements each, and what is the rank's of each of them."""
    first: int                                   # where they begin, in elements
    rows: int
    width: int
    ranges: tuple[range, ...]

    @property
    def kept(self) -> int:
        """The elements of a row that are the rank's."""
        return sum(map(len, self.ranges))


@dataclass(frozen=True)
class Cut(Stored):
    """What of a stored tensor is the rank's, end to end, as if it were all of it. Without a strip it is zeros."""
    whole: Stored
    strips: tuple[Strip, ...]

    def read_run(self, first: int, run: Tensor) -> None:
        """As Stored.read_run."""
        flat, last, top = run.view(-1), first + run.numel(), 0
        if not self.strips:
            flat.zero_()
        for strip in self.strips:                # `top`: where it begins here
            start, end = (first - top) // strip.kept, -(-(last - top) // strip.kept)
            for row in range(max(0, start), min(end, strip.rows)):
                at = top + row * strip.kept
                for each in strip.ranges:
                    low, high = max(at, first), min(at + len(each), last)
                    if low < high:
                        place = strip.first + row * strip.width + each.start + low - at
                        self.whole.read_run(place, flat[low - first : high - first])
                    at += len(each)
            top += strip.rows * strip.kept


def cut(found: Source, part: Part) -> Source:
    """A folder as the rank sees it: its smaller model, and stored tensors that have no more than that.

    Raises CheckpointError for tensors that cannot be read in parts, or are arranged by something that is divided."""
    whole, mine = found.parameters(), dict(part.model.named_parameters())
    marks = {name: mark(part.shares.get(name), tuple(tensor.shape)) for name, tensor in whole.items()}
    steps, stored = table.expand(found.names, mine, part.model.config), dict(found.stored)
    for number, (before, after) in enumerate(zip(found.steps, steps, strict=True)):
        if part.shares.keys().isdisjoint(before.ours):
            continue
        strips = strips_of(before, marks)
        if len(after.theirs) < len(before.theirs):               # a tensor a head: those of this rank's heads
            after = replace(after, theirs=tuple(name for name in before.theirs if strips[name]))
            steps[number] = after
        have = [(name, strip.rows * strip.kept) for name in before.theirs for strip in strips[name]]
        need = [(name, piece.numel()) for name, piece in after.pieces(mine)]
        if have and have != need:
            raise CheckpointError(f"{found.name}: {before.theirs[0]}: what it has of several heads is arranged in a "
                                  "way that is not divided among ranks; run it on one process")
        shapes = after.shapes(mine)
        for name in after.theirs:
            one = stored[name]
            if type(one) is not Stored:
                raise CheckpointError(f"{found.name}: {name} is no plain tensor of safetensors, so it is not read in "
                                      "parts; `python -m checkpoints.convert` writes a folder that is")
            stored[name] = Cut(one.file, one.dtype, shapes[name], one.start, one.size, one, tuple(strips[name]))
    return replace(found, model=part.model, steps=steps, stored=stored)


def mark(share: Share | None, shape: tuple[int, ...]) -> Tensor:
    """Which elements of a parameter of this shape the rank has: bool, a view of the dimension that is divided."""
    if share is None:
        return torch.ones((), dtype=torch.bool).expand(shape)
    row = torch.zeros(shape[share.dim], dtype=torch.bool)
    for each in share.kept:
        row[each.start : each.stop] = True
    return row.view([-1 if dim == share.dim else 1 for dim in range(len(shape))]).expand(shape)


def strips_of(step: table.Step, marks: Mapping[str, Tensor]) -> dict[str, list[Strip]]:
    """What of each stored tensor of a step is the rank's, piece by piece, without those of which nothing is."""
    found: dict[str, list[Strip]] = {name: [] for name in step.theirs}
    places = dict.fromkeys(step.theirs, 0)
    for name, piece in step.pieces(marks):
        strip = strip_of(piece, places[name])
        places[name] += piece.numel()
        if strip.kept:
            found[name].append(strip)
    return found


def strip_of(piece: Piece, first: int) -> Strip:
    """A piece of marks as rows that are alike: those above the first dimension in which marks differ."""
    views = piece.views if isinstance(piece, Beside) else [piece]
    shape = views[0].shape
    differ = [dim for dim in range(len(shape)) if any(one.shape[dim] > 1 and one.stride(dim) for one in views)]
    top, end = (differ[0], differ[-1] + 1) if differ else (0, 0)
    row = [one[(0,) * top] for one in views]
    if len(views) == 1:                          # below the last such dimension, too, all are alike
        row = [row[0][(slice(None),) * (end - top) + (0,) * (len(shape) - end)].reshape(-1)]
    flags = torch.cat(row, -1).flatten()
    rows = math.prod(shape[:top])
    width = piece.numel() // rows
    edges = F.pad(flags.int(), (1, 1)).diff().nonzero().flatten().tolist()
    each = width // len(flags)                   # elements of a flag
    ranges = tuple(range(low * each, high * each) for low, high in zip(edges[::2], edges[1::2], strict=True))
    return Strip(first, rows, width, ranges)
