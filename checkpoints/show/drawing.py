"""The picture of a model: the pattern of its layers, and a box for each kind of layer with its wiring and matrices.

    ┌─ 5 × sliding ───────────────────────────────────────────────────── 12,345 parameters each ─┐
    │  x ─┬→ RMSNorm → Attention → RMSNorm → + ─┬→ RMSNorm → MLP → RMSNorm → + →                 │
    │     └──────────────────────────────────┘  └────────────────────────────┘                   │
    │  pre_mixer   RMSNorm(ε=1e-06)   gain 64                                                    │
    │  mixer       Attention(H=8, K=2, d=16, rope=Rope(θ=10000), window=9)                       │
    │              q 128×64   k 32×64   v 32×64   o 64×128                                       │
    └────────────────────────────────────────────────────────────────────────────────────────────┘

A part is named as its config says it: the class, the fields that have no default (with the letter that the code has for
a size) and those that are not at their default. A matrix is rows × columns, as it is stored: y = W x.
"""

import dataclasses
import itertools
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nanollm.config import Layer, ModelConfig, Norm, SharedBlockScan, Sines
from nanollm.errors import counted
from nanollm.model import Decoder

WIDTH = 100
LONGEST = 40                                                # layers in a pattern that repeats
LETTERS = {"heads": "H", "kv_heads": "K", "head_dim": "d", "hidden": "F", "experts": "E", "top_k": "k", "inner": "I",
           "state": "N", "dt_rank": "R", "theta": "θ", "eps": "ε"}
ALWAYS = ("theta", "eps")                                   # said even at their default
NORMS = {"rms": "RMSNorm", "rms_outer": "RMSNorm", "layer": "LayerNorm"}
PARTS = ("pre_mixer", "mixer", "post_mixer", "pre_ffn", "ffn", "post_ffn")
DRAWN = (*PARTS, "end")


@dataclass(frozen=True)
class Kind:
    """Layers that are alike."""
    name: str
    layer: Layer
    count: int
    parameters: Mapping[str, Tensor]                        # of one of them, on the meta device; names as in block.py
    around: Mapping[str, Tensor]                            # what is in no layer: embedding, last norm, head


def kinds_of(config: ModelConfig) -> list[Kind]:
    """In the order in which they first appear, with one layer of each on the meta device."""
    counts = Counter(config.layers)
    with torch.device("meta"):
        model = Decoder(dataclasses.replace(config, layers=tuple(counts)))
        whole = Decoder(config) if "per_layer" in model.shared else model       # as wide as there are layers
    around = {name: p for name, p in whole.named_parameters() if not name.startswith("layers.")}
    alike = zip(names(list(counts)), model.layers, counts.items(), strict=True)
    return [Kind(name, layer, count, dict(block.named_parameters()), around) for name, block, (layer, count) in alike]


def names(layers: Sequence[Layer]) -> list[str]:
    """A name for each of several kinds: what tells them apart, and a number where that is not enough."""
    mixers, ffns = [_title(layer.mixer) for layer in layers], [_title(layer.ffn) for layer in layers]
    windows = [getattr(layer.mixer, "window", 0) for layer in layers]       # 0: of no use to it
    if len(set(windows) - {0}) > 1:
        pairs = zip(mixers, windows, strict=True)
        mixers = [name if window == 0 else "sliding" if window else "full" for name, window in pairs]
    telling = [parts for parts in (mixers, ffns) if len(set(parts)) > 1 and all(parts)] or [mixers, ffns]
    found = [" + ".join(filter(None, parts)) for parts in zip(*telling, strict=True)]
    numbers = {name: itertools.count(1) for name in found if found.count(name) > 1}
    return [f"{name} {next(numbers[name])}" if name in numbers else name for name in found]


def pattern(layers: Sequence[str]) -> str:
    """Runs, and units of several runs that repeat: [a, a, b, a, a, b, a] → 2 times (2 × a, 1 × b), 1 × a.

    Of all ways that take each unit as often as it repeats, the one that writes the fewest runs; units of up to LONGEST
    layers."""
    n = len(layers)
    repeats = [[1] * (n + 1) for _ in range(LONGEST + 1)]               # [p][i]: times that p layers come, from i on
    best: list[tuple[int, int, str]] = [(0, 0, "")] * (n + 1)           # from i on: runs written, units, and what
    for i in reversed(range(n)):
        ways = []
        for p in range(1, min(LONGEST, n - i) + 1):
            if layers[i : i + p] == layers[i + p : i + 2 * p]:
                repeats[p][i] = times = 1 + repeats[p][i + p]
            elif p > 1:
                continue
            else:
                times = 1
            runs_of = itertools.groupby(layers[i : i + p])
            unit = [f"{times if p == 1 else len(list(same))} × {name}" for name, same in runs_of]
            runs, units, rest = best[i + p * times]
            said = unit[0] if p == 1 else f"{times} times ({', '.join(unit)})"
            ways.append((runs + len(unit), units + 1, ", ".join(filter(None, [said, rest]))))
        best[i] = min(ways, key=lambda way: way[:2])
    return best[0][2]


def draw(config: ModelConfig, kinds: Sequence[Kind]) -> list[str]:
    """The lines of the picture."""
    by_layer = {kind.layer: kind.name for kind in kinds}
    inner = WIDTH - 4
    rows = ["  tokens", *_around(config, kinds[0].around, ("embed", "positions", "embed_norm")), "  │"]
    said = pattern([by_layer[layer] for layer in config.layers])
    if len(kinds) > 1:
        rows += textwrap.wrap(f"{len(config.layers)} layers: {said}", WIDTH, subsequent_indent="    ")
    for kind in kinds:
        size = f"{sum(p.numel() for p in kind.parameters.values()):,} parameters each"
        rows.append("┌─ " + f"{kind.count} × {kind.name} ".ljust(inner - len(size) - 3, "─") + f" {size} ─┐")
        body = wiring(kind.layer)
        for part in DRAWN:
            value = getattr(kind.layer, part)
            if value is not None:
                body += _entry(part, brief(value), _of_part(part, kind.parameters), inner)
        rows += [f"│ {line.ljust(inner)} │" for line in body] + ["└" + "─" * (WIDTH - 2) + "┘"]
    rows += _shared(config, kinds[0].around)
    return [*rows, *_around(config, kinds[0].around, ("norm", "head")), "  │", "  logits"]


def _shared(config: ModelConfig, around: Mapping[str, Tensor]) -> list[str]:
    """What several layers use and the model has once, as entries below their boxes."""
    uses = Counter(layer.mixer.block for layer in config.layers if isinstance(layer.mixer, SharedBlockScan))
    entries = [(f"shared.{block.number}", f"{_title(block)}, used by {counted(count, 'layer')}")
               for block, count in uses.items()]
    inputs = next((layer.end.inputs for layer in config.layers if layer.end and layer.end.inputs), None)
    if inputs is not None:
        entries.append(("shared.per_layer", f"{_title(inputs)} as shared.per_layer, a vector a token for each layer"))
    return [f"  {line}" for part, said in entries
            for line in _entry(part.removesuffix(".per_layer"), said, _of_part(part, around), WIDTH - 2)]


def _of_part(part: str, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of a part, by their names inside it."""
    return {name.removeprefix(f"{part}."): p for name, p in parameters.items() if name.startswith(f"{part}.")}


def _around(config: ModelConfig, parameters: Mapping[str, Tensor], parts: Sequence[str]) -> list[str]:
    """What is before and after the layers, as entries of the picture."""
    cap = config.head_softcap
    head = ["Linear", "its matrix the embedding" if config.tied else "", "rows of length 1" if config.unit_head else "",
            f"times {config.head_scale:g}" if config.head_scale != 1 else "",
            f"then {cap:g}·tanh(logit / {cap:g})" if cap else ""]
    said = {
        "embed": "Embedding" + (f", times {config.embed_scale:g}" if config.embed_scale != 1 else ""),
        "positions": "Sines of the position, added" if isinstance(config.positions, Sines) else (
            "Embedding of the position, added" if config.positions else ""),
        "embed_norm": brief(config.embed_norm) if config.embed_norm else "",
        "norm": brief(config.final_norm),
        "head": ", ".join(filter(None, head)),
    }
    lines = []
    for part in parts:
        if said[part]:
            lines += ["│", *_entry(part, said[part], _of_part(part, parameters), WIDTH - 2)]
    return [f"  {line}" for line in lines]


def _entry(part: str, said: str, parameters: Mapping[str, Tensor], width: int) -> list[str]:
    """`part`, what it is, and its parameters with their shapes, below where there is no room beside."""
    named = {name.removesuffix(".weight"): "×".join(map(str, p.shape)) for name, p in parameters.items()}
    shapes = [shape if name == "weight" else f"{name}\xa0{shape}" for name, shape in named.items()]
    lines = ["   ".join(filter(None, [said, *shapes]))]
    if len(shapes) > 1 or len(lines[0]) > width - 12:
        lines = [*_wrapped(said, width - 12), *_wrapped("   ".join(shapes), width - 12)]
    return [f"{part if i == 0 else '':12}{line}".replace("\xa0", " ").rstrip() for i, line in enumerate(lines)]


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, break_on_hyphens=False)


# ---- one layer

def wiring(layer: Layer) -> list[str]:
    """The drawing at the head of block.py with the parts that this layer has."""
    pre, mixer, post, pre_ffn, ffn, post_ffn = (_title(getattr(layer, part)) for part in PARTS)
    if not layer.parallel:
        top, bottom = "x ", "  "
        for branch in filter(None, (_chain(pre, mixer, post), _chain(pre_ffn, ffn, post_ffn))):
            top, bottom = f"{top}─┬→ {branch} → + ", f"{bottom} └{'─' * (len(branch) + 5)}┘ "
        last = f"→ {_title(layer.end)} " if layer.end else ""
        return [f"{top}{last}→", bottom.rstrip()]
    if layer.pre_mixer is not None and layer.pre_ffn is None:           # both read what one norm gives
        lead, upper, lower = f"x ─┬→ {pre} ─┬→ ", _chain(mixer, post), _chain(ffn, post_ffn)
        below = "   │".ljust(len(lead) - 3) + "└→ "
    else:
        lead, upper, lower, below = "x ─┬→ ", _chain(pre, mixer, post), _chain(pre_ffn, ffn, post_ffn), "   ├→ "
    end = len(lead) + max(len(upper), len(lower)) + 2
    return [f"{lead}{upper} ".ljust(end, "─") + "┐",
            f"{below}{lower} ".ljust(end, "─") + "┤",
            "   └".ljust(end, "─") + "┴→ + →"]


def _chain(*parts: str) -> str:
    return " → ".join(filter(None, parts))


def _title(part: Any) -> str:
    """The name of a part in the wiring; nothing for none."""
    return "" if part is None else NORMS[part.kind] if isinstance(part, Norm) else type(part).__name__


def brief(value: Any) -> str:
    """A part in one line, see the head of the file: Attention(H=32, K=8, d=128, rope=Rope(θ=500000))."""
    if isinstance(value, tuple):
        return f"({', '.join(map(brief, value[:3]))}{f', … {len(value)} in all' if len(value) > 3 else ''})"
    if isinstance(value, float):
        return f"{value:g}".replace("e+0", "e")
    if not dataclasses.is_dataclass(value):
        return str(value)
    said = []
    for field in dataclasses.fields(value):
        mine = getattr(value, field.name)
        named = isinstance(value, Norm) and field.name == "kind" and mine != "rms_outer"        # by the title
        if named or (mine == field.default and field.name not in ALWAYS):
            continue
        if isinstance(mine, bool):
            said.append(field.name if mine else f"no {field.name}")
        else:
            said.append(f"{LETTERS.get(field.name, field.name)}={brief(mine)}")
    return f"{_title(value)}({', '.join(said)})"
