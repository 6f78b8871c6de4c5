"""The table of a family: which stored tensors are which of our parameters. Loading and saving read the same one.

    rule("model.layers.{i}.self_attn.q_proj", "layers.{i}.mixer.q")
    rule("model.layers.{i}.block_sparse_moe.experts.{e}.w1.weight", "layers.{i}.ffn.experts.gate", Stack)

A rule names modules, theirs first; the tensors inside follow: weight is weight, bias is bias, and the gain of a norm is
what the hub calls its weight. A rule may also name a single tensor in full, as the second does. {i} stands for every
layer that has such a parameter, {e} for every expert. A table is a dict keyed by our name, so a family that differs in
one place says so in one line:

    YI = override(LLAMA, rule("model.layers.{i}.ln1", "layers.{i}.pre_mixer"), …)

Rules that share their prefixes are written together, theirs: ours.

    under("model.layers.{i}.mlp", "layers.{i}.ffn", {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"})

From there everything is derived:

    expand(table, …)             the rules for one model, with numbers in place of {i} and {e}: a list of Steps
    check(steps, …)              the steps against the headers of the files: every discrepancy in one error
    Step.pieces                  which part of a stored tensor is which part of ours; stream.py moves the bytes

Our parameters come first: a parameter without a rule is an error when it is saved as when it is loaded.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from checkpoints.names.ops import Op, Piece, Same, Shape
from nanollm.config import Layer, ModelConfig
from nanollm.errors import CheckpointError

INSIDE = {"": "", ".weight": ".weight", ".gain": ".weight", ".bias": ".bias"}    # our name inside a module → theirs
READABLE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHOWN = 12                                       # discrepancies of one kind that an error prints; it counts them all


class Header(Protocol):
    """What a file's header says of a tensor; storage/files.py has it."""

    @property
    def shape(self) -> Shape: ...

    @property
    def dtype(self) -> torch.dtype: ...


@dataclass(frozen=True)
class Rule:
    """Which stored tensors are which of our parameters, and how the numbers are arranged.

    either: other rules have the same stored names; every layer has the parameters of one of them."""
    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    op: Op
    either: bool = False


Table = dict[str, Rule]
QKV = ["layers.{i}.mixer.q", "layers.{i}.mixer.k", "layers.{i}.mixer.v"]  # ours, where they are one tensor of theirs
EXPERTS_GATE_UP = ["layers.{i}.ffn.experts.gate", "layers.{i}.ffn.experts.up"]
GATE_UP = ["layers.{i}.ffn.gate", "layers.{i}.ffn.up"]


def rule(theirs: str | Sequence[str], ours: str | Sequence[str], op: Op = Same) -> Rule:
    """One name or several on either side, in the order in which the op takes them."""
    def several(names: str | Sequence[str]) -> tuple[str, ...]:
        return (names,) if isinstance(names, str) else tuple(names)

    return Rule(several(theirs), several(ours), op)


def under(theirs: str, ours: str, names: Mapping[str, str], op: Op = Same) -> list[Rule]:
    """One rule for each pair of names (theirs: ours), which stand under these two modules; "" is the model itself."""
    def join(module: str, name: str) -> str:
        return f"{module}.{name}" if module else name

    return [rule(join(theirs, name), join(ours, mine), op) for name, mine in names.items()]


def either(theirs: str, *ours: str) -> list[Rule]:
    """One stored name for several of ours, of which a layer has one: the norm before a mixer or a feed-forward."""
    return [Rule((theirs,), (mine,), Same, either=True) for mine in ours]


def override(base: Table, *rules: Rule) -> Table:
    """`base` with these rules in place of the ones of the same name. A table that is not one-to-one is refused here."""
    table = base | {name: each for each in rules for name in each.ours}
    assert all(table[name] is each for each in table.values() for name in each.ours), "a rule was replaced in part"
    theirs = [name for each in dict.fromkeys(table.values()) if not each.either for name in each.theirs]
    theirs += {name for each in table.values() if each.either for name in each.theirs}
    twice = sorted({name for name in theirs if theirs.count(name) > 1})
    assert not twice, f"named twice: {twice}"
    return table


def stripped(table: Table, prefix: str) -> Table:
    """The same table for folders whose tensor names lack a prefix. GPT-2 and BLOOM on the hub."""
    return moved(table, prefix, "")


def moved(table: Table, old: str, new: str) -> Table:
    """The same table with `new` in place of the prefix `old`. Gemma-3 and Qwen-VL with their vision towers."""

    def renamed(name: str) -> str:
        return new + name[len(old):] if name.startswith(old) else name

    rules = {each: Rule(tuple(map(renamed, each.theirs)), each.ours, each.op, each.either) for each in table.values()}
    return {name: rules[each] for name, each in table.items()}


@dataclass(frozen=True)
class Step:
    """A rule with the numbers filled in: these stored tensors are these parameters, of this layer."""
    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    op: Op
    layer: Layer | None

    def shapes(self, parameters: Mapping[str, Tensor]) -> dict[str, Shape]:
        """What each stored tensor's header says, for these parameters, which may be on the meta device."""
        shapes = self.op.shapes([parameters[name] for name in self.ours], self.layer)
        assert len(shapes) == len(self.theirs), f"{self.ours}: {len(shapes)} tensors for {len(self.theirs)} names"
        return dict(zip(self.theirs, shapes, strict=True))

    def pieces(self, parameters: Mapping[str, Tensor]) -> Iterator[tuple[str, Piece]]:
        """(stored tensor, view of ours) in the order in which the stored tensor holds them."""
        ours = [parameters[name] for name in self.ours]
        yield from ((self.theirs[k], piece) for k, piece in self.op.pieces(ours, self.layer))


def expand(table: Table, parameters: Mapping[str, Tensor], config: ModelConfig) -> list[Step]:
    """One step for each rule and layer. Raises CheckpointError if a parameter has no rule."""
    steps: dict[tuple[str, ...], Step] = {}
    orphans = []
    for name in parameters:
        layer, pattern = _split_layer(name)
        ways = ((own, one) for own in (name, pattern) for one in INSIDE if own.endswith(one))
        own, found = next(((own, one) for own, one in ways if own.removesuffix(one) in table), ("", None))
        if found is None:
            orphans.append(name)
            continue
        each = table[own.removesuffix(found)]
        ours = tuple(one.replace("{i}", layer) + found for one in each.ours)
        if ours not in steps:
            theirs = [one.replace("{i}", layer) + INSIDE[found] for one in each.theirs]
            experts = range(len(parameters[name])) if any("{e}" in one for one in theirs) else (0,)
            names = tuple(one.replace("{e}", str(e)) for one in theirs for e in experts)
            steps[ours] = Step(names, ours, each.op, config.layers[int(layer)] if layer else None)
    if orphans:
        raise CheckpointError(_list("parameters that this family has no name for", orphans))
    times = Counter(name for step in steps.values() for name in step.theirs)
    if twice := [name for name, count in times.items() if count > 1]:
        raise CheckpointError(_list("stored tensors that would be several parameters of one layer", twice))
    return list(steps.values())


def _split_layer(name: str) -> tuple[str, str]:
    """layers.3.mixer.q.weight → ("3", "layers.{i}.mixer.q.weight")"""
    found = re.match(r"layers\.(\d+)\.", name)
    return (found[1], "layers.{i}." + name[found.end():]) if found else ("", name)


def missing(steps: Iterable[Step], stored: Mapping[str, Header]) -> list[str]:
    """The stored tensors that the steps need and the files do not have."""
    return [name for step in steps for name in step.theirs if name not in stored]


def reshaped(steps: Iterable[Step], parameters: Mapping[str, Tensor], stored: Mapping[str, Header]) -> list[str]:
    """The stored tensors that have another shape than the steps expect, each with both shapes."""
    wanted = ((name, want) for step in steps for name, want in step.shapes(parameters).items())
    return [f"{name}: {stored[name].shape} stored, {want}" for name, want in wanted
            if name in stored and stored[name].shape != want]


def unexpected(
    steps: Iterable[Step], stored: Mapping[str, Header], ignorable: Iterable[str], ignore: Iterable[str]
) -> list[str]:
    """Stored tensors that nothing uses. `ignorable` has patterns of the family, `ignore` the caller's exact names."""
    used = {name for step in steps for name in step.theirs} | set(ignore)
    patterns = set(ignorable)
    return [name for name in stored if name not in used and re.sub(r"\.\d+\.", ".{i}.", name) not in patterns]


def check(
    steps: Sequence[Step],
    parameters: Mapping[str, Tensor],
    stored: Mapping[str, Header],
    ignorable: Iterable[str] = (),
    ignore: Iterable[str] = (),
    where: str = "weights",
    said_by: str = "config.json",
) -> None:
    """Raise one CheckpointError with every tensor that is missing, unexpected, of another shape or of another type.

    `parameters` are on the meta device and nothing is read."""
    shapes = [f"{each} by {said_by}" for each in reshaped(steps, parameters, stored)]
    present = [name for step in steps for name in step.theirs if name in stored]
    types = [f"{name}: {short(stored[name].dtype)} stored, floats of 16 bits or more expected"
             for name in present if stored[name].dtype not in READABLE]
    spare = unexpected(steps, stored, ignorable, ignore)
    problems = [_list(*kind) for kind in (
        ("missing", missing(steps, stored)),
        ("unexpected (to pass over one of them: --ignore NAME)", spare),
        ("of another shape", shapes),
        ("of another type", types),
    ) if kind[1]]
    if problems:
        say = "says" if said_by.endswith(".json") else "say"
        raise CheckpointError(f"{where}: the tensors are not what {said_by} {say}\n" + "\n".join(problems))


def short(dtype: torch.dtype) -> str:
    """torch.float32 → float32"""
    return str(dtype).removeprefix("torch.")


def _list(title: str, names: Sequence[str]) -> str:
    rest = [f"    … and {len(names) - SHOWN} more"] if len(names) > SHOWN else []
    return "\n".join([f"  {len(names)} {title}:", *(f"    {name}" for name in names[:SHOWN]), *rest])
