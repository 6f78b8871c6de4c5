"""A family as SVG: a row for each kind of layer, the parts that a Llama has otherwise in colour, those that it lacks as
dashed boxes. Below a box stand the fields of its config that differ.

       ┌────┐   ┌──────┐        ┌────┐   ┌─────┐
     ┌→│norm│ → │mixer │─┐    ┌→│norm│ → │ ffn │─┐
  ───┴─┴────┴───┴──────┴─⊕────┴─┴────┴───┴─────┴─⊕──→          the stream is the line below
"""

import dataclasses
from html import escape
from typing import Any

from checkpoints.show.drawing import PARTS, _title
from docs.gallery.families import Difference, Family, Kind
from nanollm.config import MLP, Attention, Layer, Norm, Rope

GAP, BOX, UP = 16, 26, 46                       # between boxes; their height; from the stream to the middle of a box
SAID = {"rope": "mixer", "qk_norm": "mixer"}    # the box that stands for a place
LLAMA = Layer(Attention(2, 1, 4, Rope()), MLP(8), pre_mixer=Norm(), pre_ffn=Norm())
SIZES = {"kind", "heads", "kv_heads", "head_dim", "hidden", "eps", "theta", "gain"}


class Row:
    """The SVG of one kind of layer, from left to right."""

    def __init__(self, top: int, height: int) -> None:
        self.parts: list[str] = []
        self.x, self.stream = 20.0, top + height

    def line(self, path: str, kind: str = "wire") -> None:
        """In SVG's own letters."""
        self.parts.append(f'<path class="{kind}" d="{path}"/>')

    def box(self, x: float, y: float, words: str, kind: str, below: str = "") -> float:
        """Centred on y; returns where it ends."""
        width = wide(words, below)
        middle = x + width / 2
        self.parts += [
            f'<rect class="box {kind}" x="{x:g}" y="{y - BOX / 2:g}" width="{width:g}" height="{BOX}" rx="5"/>',
            f'<text class="mid {kind}" x="{middle:g}" y="{y + 4.5:g}">{escape(words)}</text>']
        if below:
            self.parts.append(f'<text class="mid tag" x="{middle:g}" y="{y + BOX / 2 + 11:g}">{escape(below)}</text>')
        return x + width

    def branch(self, start: float, y: float, boxes: list[tuple[str, str, str]], wire: str = "wire") -> float:
        """Boxes in a row at height y, with arrows between; returns where the line after them ends."""
        x = start
        for words, kind, below in boxes:
            self.line(f"M{x:g} {y:g}h{GAP}", f"{wire} tip")
            x = self.box(x + GAP, y, words, kind, below)
        self.line(f"M{x:g} {y:g}h{GAP}", wire)
        return x + GAP

    def sequential(self, boxes: list[tuple[str, str, str]], kind: str) -> None:
        """A branch that leaves the stream, and is added to it; kind: of the sum."""
        y, start = self.stream - UP, self.x + 14
        missing = [gone for _, gone, _ in boxes] == ["gone"]             # the whole branch
        wire = "wire gone" if missing else "wire"
        self.line(f"M{start:g} {self.stream:g}V{y:g}", wire)
        end = self.branch(start, y, boxes, wire)
        self.line(f"M{end:g} {y:g}V{self.stream - 8 * (not missing):g}", wire + " tip" * (not missing))
        if missing:
            self.line(f"M{self.x:g} {self.stream:g}H{end:g}")
            self.x = end
        else:
            self.plus(end, kind)

    def plus(self, end: float, kind: str) -> None:
        """The stream up to where a branch comes back, and the sum."""
        self.line(f"M{self.x:g} {self.stream:g}H{end - 8:g}")
        self.parts.append(f'<circle class="box {kind}" cx="{end:g}" cy="{self.stream:g}" r="8"/>'
                          f'<path class="wire" d="M{end - 4:g} {self.stream:g}h8M{end:g} {self.stream - 4:g}v8"/>')
        self.x = end + 8


def svg(family: Family) -> str:
    """Embedding and head around the first row; a row for each kind of layer."""
    rows, top, width = [], 16, 0.0
    changed = {place for place, _ in family.model}
    model = {words for place, words in family.model if place == "model"}
    for i, kind in enumerate(family.kinds):
        height = 46 + UP * kind.layer.parallel + 20 * (len(family.kinds) > 1)
        row = Row(top, height)
        if len(family.kinds) > 1:
            row.parts.append(f'<text class="kind" x="20" y="{top}">{escape(kind.name)}</text>')
        if i == 0:
            tables = [words for words in model if words.startswith(("the embedding", "a learned table"))]
            row.x = row.box(20, row.stream, "Embedding", "new" * bool(tables))
            if "embed_norm" in changed:
                row.line(f"M{row.x:g} {row.stream:g}h{GAP}", "wire tip")
                row.x = row.box(row.x + GAP, row.stream, "norm", "new")
        layer(row, kind)
        row.line(f"M{row.x:g} {row.stream:g}h{GAP + 6}", "wire tip")
        row.x += GAP + 6
        if i == 0:
            row.x = row.box(row.x, row.stream, "norm", "new" * ("final_norm" in changed))
            row.line(f"M{row.x:g} {row.stream:g}h{GAP}", "wire tip")
            head = [words for words in model if "head" in words or "logit" in words]
            row.x = row.box(row.x + GAP, row.stream, "Head", "new" * bool(head))
        rows += row.parts
        width, top = max(width, row.x + 20), row.stream + 42
    return (f'<svg viewBox="0 0 {width:g} {top - 18}" width="{width:g}" role="img" '
            f'aria-label="{escape(family.model_type)}">{"".join(rows)}</svg>')


def layer(row: Row, kind: Kind) -> None:
    """The branches of one layer."""
    one = kind.layer
    mixer = boxes(kind, PARTS[:3])
    ffn = boxes(kind, PARTS[3:])
    if not one.parallel:
        for branch in filter(None, (mixer, ffn)):
            row.sequential(branch, "new" * any(place == "layer" for place, _ in kind.differences))
        return
    start, low, high = row.x + 14, row.stream - UP, row.stream - 2 * UP
    row.line(f"M{start:g} {row.stream:g}V{low:g}")
    if one.pre_mixer is not None and one.pre_ffn is None:   # both read what one norm gives
        row.line(f"M{start:g} {low:g}h{GAP}", "wire tip")
        fork = row.box(start + GAP, low, *mixer[0]) + 8
        row.line(f"M{fork - 8:g} {low:g}h8")
        mixer, ffn = mixer[1:], [box for box in ffn if "gone" not in box[1]]
    else:
        fork = start
    row.line(f"M{fork:g} {low:g}V{high:g}")
    end = max(row.branch(fork, low, mixer), row.branch(fork, high, ffn)) + 6
    for y, boxed in ((low, mixer), (high, ffn)):
        row.line(f"M{length(fork, boxed):g} {y:g}H{end:g}")
    row.line(f"M{end:g} {high:g}V{row.stream - 8:g}", "wire tip")
    row.plus(end, "new")


def wide(words: str, below: str) -> float:
    """The width of a box with room for what stands below it."""
    return max(7.2 * len(words) + 18, 5.4 * len(below) + 4)


def length(start: float, boxed: list[tuple[str, str, str]]) -> float:
    """Where `Row.branch` ends."""
    return start + sum(GAP + wide(words, below) for words, _, below in boxed) + GAP


def boxes(kind: Kind, parts: tuple[str, ...]) -> list[tuple[str, str, str]]:
    """(words, new or gone or nothing, fields) for each part that is there or that a Llama has; [] for no branch."""
    found = []
    changed = {SAID.get(place, place) for place, _ in kind.differences}
    branch = kind.layer.mixer if "mixer" in parts else kind.layer.ffn
    if branch is None:
        return [("no " + ("attention" if "mixer" in parts else "MLP"), "gone", "")]
    for part in parts:
        mine, llama = getattr(kind.layer, part), getattr(LLAMA, part)
        if mine is None:
            if llama is not None:
                found.append(("no norm", "gone", ""))
            continue
        found.append((_title(mine), "new" * (part in changed), ", ".join(tags(mine)[:3])))
    return found


def tags(part: Any) -> list[str]:
    """The fields of a part that differ from their defaults; of its rotation and of an attention in it too."""
    said: list[str] = []
    for field in dataclasses.fields(part):
        mine = getattr(part, field.name)
        if field.default is dataclasses.MISSING:            # a size, or the attention that it is built around
            said += tags(mine) if isinstance(mine, Attention) else []
        elif field.name == "rope":
            said += ["no rope"] if mine is None else [f"rope.{f}" for f in tags_of(mine)]
        elif field.name not in SIZES and mine != field.default:
            said.append(field.name)
    return said


def tags_of(rope: Any) -> list[str]:
    """The fields of a rotation that differ from their defaults."""
    return [field.name for field in dataclasses.fields(rope)
            if field.name not in SIZES and getattr(rope, field.name) != field.default]


def by_kind(family: Family) -> list[tuple[str, Difference]]:
    """(which layers, difference), each once; "" where all layers have it, or none does."""
    found: dict[Difference, list[str]] = {}
    for kind in family.kinds:
        for said in kind.differences:
            found.setdefault(said, []).append(kind.name)
    layers = [(("" if len(names) == len(family.kinds) else ", ".join(dict.fromkeys(names))), said)
              for said, names in found.items()]
    return layers + [("", said) for said in family.model]
