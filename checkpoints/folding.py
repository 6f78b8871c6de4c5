"""Many names in one line: those that differ in numbers only, the numbers folded.

    model.layers.0.self_attn.q_proj.weight  …  model.layers.31.self_attn.q_proj.weight
        model.layers.{0..31}.self_attn.q_proj.weight
    model.layers.3.mlp.experts.0.up_proj.weight  …  60 layers, 256 experts
        model.layers.{3..60}.mlp.experts.{0..255}.up_proj.weight
    layers.1.mixer.window, layers.3.mixer.window, layers.5.mixer.window
        layers.{1,3,5}.mixer.window

A number is a part of a name, between dots. Tensors, parameters, and fields of a config are all folded here.
"""

import re
from collections.abc import Iterator, Sequence

NUMBER = re.compile(r"(?<![^.])[0-9]{1,9}(?![^.])")      # a part of a name; a file may hold any, so not of any length
SHOWN = 6                                        # runs of numbers that a name spells out


def pattern(name: str) -> str:
    """What names that are folded together have in common: layers.3.norm → layers.{}.norm"""
    return NUMBER.sub("{}", name)


def folded(names: Sequence[str]) -> str:
    """Names of one pattern as one. A part that is the same number in all of them stays as it is."""
    columns = zip(*(name.split(".") for name in names), strict=True)
    return ".".join(_folded(column) if NUMBER.fullmatch(column[0]) else column[0] for column in columns)


def _folded(column: Sequence[str]) -> str:
    numbers = sorted(set(map(int, column)))
    if len(numbers) == 1:
        return column[0]
    runs = list(_runs(numbers))
    spelt = [str(first) if first == last else f"{first}..{last}" for first, last in runs]
    return "{" + ",".join(spelt if len(runs) <= SHOWN else [*spelt[: SHOWN - 1], "…", spelt[-1]]) + "}"


def _runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Rising numbers as runs without a gap: 0 1 2 5 → (0, 2), (5, 5)"""
    first = last = numbers[0]
    for number in numbers[1:]:
        if number != last + 1:
            yield first, last
            first = number
        last = number
    yield first, last
