"""What differs between two models on disk, in their configs and in their weights, whatever the layouts.

    config     field by field                 layers.{0..31}.mixer.rope.theta      10000.0      500000.0
    weights    parameter by parameter, of ours: both folders are read through their tables, so names do not matter

    a weight is       when
    equal             its bits are, and its dtype
    equal as cast     the wider of the two, cast to the dtype of the other, has its bits     bfloat16 of a float32 model
    different         else: max |a − b|, and that over the spread max b − min b

Meta and Mistral store the rows of a head of q and k in the order in which RoPE turns neighbours, Hugging Face in that
of halves. One order is made of the other before anything is compared (Interleaving and Halving in names/ops.py), so
that it is no difference.

A rule of either folder is in memory at a time, for an expert's layer that is all its experts; never a model.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from checkpoints import folding
from checkpoints.convert import moves
from checkpoints.layouts.original import with_rope_layout
from checkpoints.names.ops import Halving, Interleaving, Op, Same
from checkpoints.names.table import Step, short
from checkpoints.show.drawing import brief
from checkpoints.source import Source
from checkpoints.storage import stream
from checkpoints.tracing import Gap, Part, as_ours, gap
from nanollm.config import Attention, Layer, ModelConfig, Rope

NO_LOGIT = frozenset({"context"})                # fields that say what a model was trained for, and change no logit


class Field(NamedTuple):
    """A field of the config that differs, as text; of layers that differ alike, folded into one."""
    name: str
    a: str
    b: str

    @property
    def counts(self) -> bool:
        """Whether the field can change the logits."""
        return self.name not in NO_LOGIT


class Weight(NamedTuple):
    """A parameter of ours and how it differs: "equal", "equal as …", "different", or why nothing can be compared."""
    name: str
    how: str
    gap: Gap

    @property
    def same(self) -> bool:
        """Whether both have the same numbers."""
        return self.how.startswith("equal")


# ---- configs

def fields(a: ModelConfig, b: ModelConfig) -> list[Field]:
    """Every field that differs.

    The order of the channels that RoPE turns is none: weights are compared in one order, see the head of the file."""
    if all(_turned(x, y) is not None for x, y in zip(a.layers, b.layers, strict=False)):
        a, b = (with_rope_layout(config, "half") for config in (a, b))
    groups: dict[tuple[str, str, str], list[str]] = {}
    for name, x, y in _leaves(a, b, ""):
        groups.setdefault((folding.pattern(name), x, y), []).append(name)
    return [Field(folding.folded(names), x, y) for (_, x, y), names in groups.items()]


def _leaves(a: Any, b: Any, name: str) -> Iterator[tuple[str, str, str]]:
    if a == b:
        return
    inside = f"{name}." if name else ""
    if dataclasses.is_dataclass(a) and type(a) is type(b):
        for one in dataclasses.fields(a):
            yield from _leaves(getattr(a, one.name), getattr(b, one.name), inside + one.name)
    elif isinstance(a, tuple) and isinstance(b, tuple):
        if len(a) != len(b):
            yield name, f"{len(a)} of them", f"{len(b)} of them"
        for i, (x, y) in enumerate(zip(a, b, strict=False)):
            yield from _leaves(x, y, f"{inside}{i}")
    else:
        first, second = (brief(one) if dataclasses.is_dataclass(one) else repr(one) for one in (a, b))
        yield name, first, second


def _turned(a: Layer, b: Layer) -> Op | None:
    """How the rows of a head of q and k in `a` are arranged in `b`; None: of different kinds, or only partly turned."""
    x, y = (layer.mixer.rope if isinstance(layer.mixer, Attention) else None for layer in (a, b))
    if not isinstance(x, Rope) or not isinstance(y, Rope) or x.layout == y.layout:
        return Same if type(a.mixer) is type(b.mixer) else None
    if (x.fraction, y.fraction) != (1.0, 1.0):
        return None
    return Interleaving if x.layout == "half" else Halving


def arranged(a: ModelConfig, b: ModelConfig, name: str) -> Part:
    """A module or parameter of ours in `a`, and how it is arranged in `b`, under the same name."""
    places = name.split(".")
    if places[0] != "layers" or len(places) < 4 or places[2] != "mixer":
        return Part((name,), name)
    if places[3] not in ("q", "k", "q_norm", "k_norm"):
        return Part((name,), name)
    layer = a.layers[int(places[1])]
    return Part((name,), name, _turned(layer, b.layers[int(places[1])]) or Same, layer)


def same_names(a: Source, b: Source) -> tuple[list[Part], dict[str, list[Part]]]:
    """What to compare of two models that run in our decoder: by depth, and inside each block that both have.

    Names are those of `a`."""
    layers = [f"layers.{i}" for i in range(min(len(a.config.layers), len(b.config.layers)))]
    names = [name for name, module in a.model.named_modules()
             if next(module.parameters(recurse=False), None) is not None or name.endswith((".mixer", ".ffn"))]
    before = ["embed_norm"] if "embed_norm" in names else []
    outline = [Part((name,), name) for name in (*before, *layers, "norm")]
    inside = {layer: [name for name in names if name.startswith(f"{layer}.")] for layer in layers}
    return outline, {layer: [arranged(a.config, b.config, name) for name in inside[layer]] for layer in layers}


# ---- weights

def weights(a: Source, b: Source) -> Iterator[Weight]:
    """Every parameter of either, in the order of `a`, then those that only `b` has.

    Raises CheckpointError on a NaN or an infinity."""
    ours, theirs = a.parameters(), b.parameters()
    shapes = {name: (tuple(ours[name].shape), tuple(theirs[name].shape)) for name in ours if name in theirs}
    both = {name for name, (x, y) in shapes.items() if x == y}
    nothing = Gap(torch.inf, torch.inf)
    for name in ours:
        if name not in shapes:
            yield Weight(name, "only in the first", nothing)
        elif name not in both:
            first, second = ("×".join(map(str, shape)) for shape in shapes[name])
            yield Weight(name, f"{first} and {second}", nothing)
    yield from (Weight(name, "only in the second", nothing) for name in theirs if name not in ours)
    reads, writes = ([step for step in source.steps if both.intersection(step.ours)] for source in (a, b))
    for move in moves(reads, writes):
        mine, other = _values(move.reads, a), _values(move.writes, b)
        for name in (name for name in mine if name in both):
            part, found = arranged(a.config, b.config, name), other[name]
            if part.op is not Same:
                found = as_ours(part.op, part.layer, found, [len(found)])[0]
            yield _weighed(name, mine[name], found)


def _values(steps: list[Step], source: Source) -> dict[str, Tensor]:
    """The parameters of a few steps, as they are stored."""
    shapes = source.parameters()
    found = {name: torch.empty(shapes[name].shape, dtype=source.stored_dtypes[name])
             for step in steps for name in step.ours}
    for step in steps:
        stream.load_step(step, source.stored, found)
    return found


def _weighed(name: str, a: Tensor, b: Tensor) -> Weight:
    apart = gap(a, b)
    if a.dtype == b.dtype and torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8)):
        return Weight(name, "equal", apart)
    for x, y in ((a, b), (b, a)):
        if x.dtype != y.dtype and torch.equal(x.to(y.dtype), y):
            return Weight(name, f"equal as {short(y.dtype)}", apart)
    return Weight(name, "different", apart)
