"""Where two models part: both run on the same tokens, and what their parts read and give is compared.

    tokens ── embed ─▣─ layer 0 ─▣─ layer 1 ─▣─ … ─▣─ norm ─▣─ head ── logits ▣        compared at ▣, depth by depth

    ours with transformers'           the table of names tells which part is which: a rule names the modules of a weight
    ours with ours, in other weights  the parts have the same names

The first block that differs is run again, and looked into in the order in which its parts run. Differences are
relative; here the rows of q are in reverse order:

    inside layers.1  it reads  it gives
    pre_mixer               0         0
    mixer.q                 0   6.9e-01   ← it reads the same and gives something else: its weights, or their order
    mixer.k                 0         0
    mixer.v                 0         0
    mixer.o           7.9e-01   7.4e-01     if this differed first, the cause would be rotation, mask or scale

What is packed into one module there and is three of ours is taken apart by the op of its rule, since the outputs of a
matrix lie in the order of its rows. So q, k and v are told apart in a Phi-3 too.

    relative difference of a and b     max |a − b| / (max b − min b),  b the other model's
"""

import os.path
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from checkpoints.names.ops import Op, Same
from checkpoints.names.table import INSIDE, Step
from checkpoints.storage import stream
from nanollm.config import Layer
from nanollm.model import Decoder

BETWEEN = {                                      # what lies between a part and those before it, and is no module
    "mixer.o": "attention itself: rotation, mask, scale of the scores",
    "ffn.down": "the activation, and the product with the gate",
}


class Gap(NamedTuple):
    """How far two tensors are apart."""
    largest: float
    relative: float

    def within(self, bound: float) -> bool:
        """Whether the relative difference is no larger than this."""
        return self.relative <= bound            # false for a NaN


def gap(a: Tensor, b: Tensor) -> Gap:
    """Of two tensors of one shape; the formula is at the head of the file."""
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    chunks = zip(a.reshape(-1).split(stream.RUN), b.reshape(-1).split(stream.RUN), strict=True)
    runs = [(x.to(wide), y.to(wide)) for x, y in chunks]
    ends = [((x - y).abs().amax(), y.amax(), (-y).amax()) for x, y in runs]
    largest, high, low = (torch.stack(found).amax().item() for found in zip(*ends, strict=True))
    spread = high + low
    return Gap(largest, largest / spread if spread > 0 else largest and torch.inf)


@dataclass(frozen=True)
class Part:
    """Modules of ours that are one module there, and how their outputs are arranged in it."""
    ours: tuple[str, ...]
    theirs: str
    op: Op = Same
    layer: Layer | None = None


@dataclass(frozen=True)
class Side:
    """A model that can be run and looked into."""
    model: nn.Module
    run: Callable[[Tensor], Tensor]              # tokens (B, T) → logits (B, T, V)
    prefix: str = ""                             # of modules, that stored names may lack; GPT-2 on the hub

    def module(self, name: str) -> nn.Module | None:
        """The module of a name, None if there is none."""
        modules = dict(self.model.named_modules())
        renamed = f"{self.prefix}.{name.partition('.')[2]}"     # stored under another first part; Nemotron-H
        return modules.get(name) or modules.get(f"{self.prefix}.{name}") or modules.get(renamed)


def side(model: Decoder) -> Side:
    return Side(model, model)


# ---- which part is which

def outline(steps: Sequence[Step], layers: int) -> list[Part]:
    """The blocks, in their order, and before and after them a norm that has weights. `steps` load the model."""
    norms = {step.ours[0]: Part((_owner(step.ours[0]),), _owner(step.theirs[0]))
             for step in steps if step.ours[0] in ("embed_norm.gain", "norm.gain")}
    blocks = [_around(steps, f"layers.{i}") for i in range(layers)]
    found = [norms.get("embed_norm.gain"), *blocks, norms.get("norm.gain")]
    return [part for part in found if part is not None]


def parts_of(steps: Sequence[Step], block: Part) -> list[Part]:
    """The modules inside a block, and its mixer and its ffn as a whole."""
    inside = [step for step in steps if step.ours[0].startswith(f"{block.ours[0]}.") and len(step.theirs) == 1]
    found: dict[tuple[str, ...], Part] = {}
    for step in inside:
        modules = tuple(map(_owner, step.ours))
        # other parameters are no module by themselves
        if all(_last(name) in INSIDE for name in (*step.ours, *step.theirs)):
            found.setdefault(modules, Part(modules, _owner(step.theirs[0]), step.op, step.layer))
    whole = [_around(steps, f"{block.ours[0]}.{half}") for half in ("mixer", "ffn")]
    return [*found.values(), *(part for part in whole if part.theirs not in ("", block.theirs))]


def _around(steps: Sequence[Step], ours: str) -> Part:
    """The module there that has all that a module of ours has: the longest prefix that the names have in common.
    Without what is stored under another layer (Zamba2's adapters, in a block that several layers share)."""
    names = [_owner(name).split(".") for step in steps if step.ours[0].startswith(f"{ours}.") for name in step.theirs]
    number = ours.split(".")[1]
    own = [name for name in names if next(filter(str.isdigit, name), number) == number]
    return Part((ours,), ".".join(os.path.commonprefix(own)))


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _last(name: str) -> str:
    return "." + name.rpartition(".")[2]


# ---- what they read and give

class Seen(NamedTuple):
    """What a module read and gave: the first tensor on either side, on the CPU."""
    read: Tensor
    gave: Tensor
    alone: bool                                  # it read no second tensor of the shape that it gives: no residual
    several: bool                                # it gave a second tensor of that shape: which of them is ours?


def watch(one: Side, names: Sequence[str], tokens: Tensor) -> tuple[dict[str, Seen], Tensor]:
    """Run a model; what the modules of these names read and gave, in the order in which they ended, and the logits."""
    seen: dict[str, Seen] = {}
    modules = {name: module for name in names if (module := one.module(name)) is not None}

    def note(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = [*args, *kwargs.values()]
        read, gave = _first(given), _first([output])
        if read is not None and gave is not None:
            shaped = [sum(isinstance(value, Tensor) and value.shape == gave.shape for value in values)
                      for values in (given, output if isinstance(output, tuple) else ())]
            seen.setdefault(name, Seen(read.detach().cpu().clone(), gave.detach().cpu().clone(), shaped[0] < 2,
                                       shaped[1] > 1))

    hooks = [module.register_forward_hook(partial(note, name), with_kwargs=True) for name, module in modules.items()]
    added = [module for module in modules.values() if hasattr(module, "add")]
    for module in added:                         # a norm of ours that is called together with a sum, past its forward
        module.add = partial(_add, module)  # type: ignore[assignment]  # nn.Module declares tensors and modules only
    try:
        with torch.inference_mode():
            return seen, one.run(tokens)
    finally:
        for hook in hooks:
            hook.remove()
        for module in added:
            del module.add


def _add(norm: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    total = x + y
    return total, norm(total)


def _first(values: Sequence[Any]) -> Tensor | None:
    """The first tensor among what was given or returned, of tuples in there the first."""
    for value in values:
        found = value if isinstance(value, Tensor) else _first(value) if isinstance(value, (tuple, list)) else None
        if found is not None:
            return found
    return None


def as_ours(op: Op, layer: Layer | None, rows: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """Rows of one tensor there (R, …) → the rows of each of ours, (count, …), by the arrangement of their weights."""
    ours = [rows.new_empty(count, *rows.shape[1:]) for count in counts]
    at = 0
    for _, piece in op.pieces(ours, layer):
        assert isinstance(piece, Tensor), "of three dimensions, so no op transposes it"
        count = piece.numel() // rows[0].numel()
        piece.copy_(rows[at : at + count].reshape(piece.shape))
        at += count
    return ours


# ---- the comparison

class Line(NamedTuple):
    """A part of a block: how far apart is what it reads, and what it gives."""
    name: str
    read: Gap
    gave: Gap


@dataclass
class Inside:
    """What was found in a block."""
    lines: list[Line] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)         # parts that could not be compared, and why

    def verdict(self, bound: float) -> tuple[str, str]:
        """(the part at which the models part, what that means)."""
        for line in self.lines:
            part = line.name.split(".", 2)[2]
            if not line.read.within(bound):
                between = BETWEEN.get(part, "what is no module, such as the residual")
                return part, f"it reads something else, though all that ran before it agrees; between them is {between}"
            if not line.gave.within(bound):
                return part, f"it reads the same and gives something else: {self._cause(part)}"
        return "", "no part that was compared differs; the cause is in one that was not, or in how they are added"

    @staticmethod
    def _cause(part: str) -> str:
        if part in ("mixer", "ffn"):
            return "what in it was not compared, such as a scan or experts"
        if "norm" in part or part.startswith(("pre_", "post_")):
            return "its gain, its bias or its ε"
        return "its weights, or the order of their rows"


def by_depth(ours: Side, theirs: Side, outline: Sequence[Part], tokens: Tensor) -> Iterator[tuple[str, Gap]]:
    """(embedding, each block, last norm, logits; how far apart). A block that has no counterpart is left out."""
    mine, logits = watch(ours, [part.ours[0] for part in outline], tokens)
    other, their_logits = watch(theirs, [part.theirs for part in outline], tokens)
    both = [part for part in outline if part.ours[0] in mine and part.theirs in other]
    for part in both:
        a, b, name = mine[part.ours[0]], other[part.theirs], part.ours[0]
        if part is both[0] and name == "layers.0":
            yield "embedding", gap(a.read, b.read)
        yield "embedding" if name == "embed_norm" else name, gap(a.gave, b.gave)
    yield "logits", gap(logits, their_logits)


def look_inside(ours: Side, theirs: Side, parts: Sequence[Part], tokens: Tensor) -> Inside:
    """The parts of a block, in the order in which ours run."""
    mine, _ = watch(ours, [name for part in parts for name in part.ours], tokens)
    other, _ = watch(theirs, [part.theirs for part in parts], tokens)
    found = Inside()
    lines: dict[str, Line] = {}
    for part in parts:
        if not all(name in mine for name in part.ours):
            found.skipped.append(f"{', '.join(part.ours)}: not run as a module here")
        elif part.theirs not in other:
            found.skipped.append(f"{', '.join(part.ours)}: no {part.theirs} there")
        elif not other[part.theirs].alone:
            reason = f"{part.theirs} reads two tensors, such as the residual that it adds"
            found.skipped.append(f"{', '.join(part.ours)}: {reason}")
        elif other[part.theirs].several:
            found.skipped.append(f"{', '.join(part.ours)}: {part.theirs} gives several tensors of one shape")
        else:
            lines |= _compared(part, mine, other[part.theirs], found.skipped)
    found.lines = [lines[name] for name in mine if name in lines]
    return found


def _compared(part: Part, mine: Mapping[str, Seen], other: Seen, skipped: list[str]) -> dict[str, Line]:
    """A line for each of our modules in a part, if the tensors have comparable shapes."""
    gaves, reads = [mine[name].gave for name in part.ours], mine[part.ours[0]].read
    width = sum(gave.shape[-1] for gave in gaves)
    given = _alike(gaves[0], other.gave) and other.gave.shape[-1] == width
    if not given or not _alike(reads, other.read) or reads.shape[-1] != other.read.shape[-1]:
        here, there = tuple(gaves[0].shape), tuple(other.gave.shape)
        skipped.append(f"{', '.join(part.ours)}: {here} here, {part.theirs} gives {there}")
        return {}
    rows = as_ours(part.op, part.layer, other.gave.movedim(-1, 0), [gave.shape[-1] for gave in gaves])
    read = gap(reads, other.read.reshape(reads.shape))
    gaps = (gap(gave, row.movedim(0, -1).reshape(gave.shape)) for gave, row in zip(gaves, rows, strict=True))
    return {name: Line(name, read, gave) for name, gave in zip(part.ours, gaps, strict=True)}


def _alike(a: Tensor, b: Tensor) -> bool:
    """Whether all but the last dimension agree, or are those of one, flattened: (B, T, ·) and (B T, ·)."""
    return a.shape[:-1] == b.shape[:-1] or (2 in (a.ndim, b.ndim) and a.shape[:-1].numel() == b.shape[:-1].numel())
