"""What few bits cost: the error of a weight in int8, in int4 with groups of 128, 64 and 32, and in NF4.

    error = √( Σ (w' − w)² / Σ w² )          nanollm/inference/quantize.py, nanollm/layers/nf4.py

w is drawn: from N(0, 1), and from Student's t with 5 degrees of freedom, a matrix with a few large weights. Bits a
weight are counted from the stored tensors, scales included. Above, 64 weights and the levels of two kinds for them.
"""

import math
import random

import torch
from torch import Tensor

from docs.figures.drawing import Axes, Picture
from nanollm.inference.quantize import dequantize, quantize_weight
from nanollm.layers import nf4

ROWS, COLUMNS = 32, 1024
GROUPS = (128, 64, 32)


def drawn(tails: bool) -> Tensor:
    """A weight, (ROWS, COLUMNS)."""
    draw = random.Random(1)
    numbers = [draw.gauss(0, 1) / (math.sqrt(draw.gammavariate(2.5, 0.4)) if tails else 1)
               for _ in range(ROWS * COLUMNS)]
    return torch.tensor(numbers).view(ROWS, COLUMNS)


def stored(weight: Tensor) -> dict[str, tuple[tuple[Tensor, ...], Tensor]]:
    """Each kind: the tensors that are kept, and the weight that they are read as."""
    whole = {"int8": quantize_weight(weight, 8)}
    whole |= {f"int4, groups of {group}": quantize_weight(weight, 4, group) for group in GROUPS}
    found = {kind: (tuple(part for part in parts if part is not None), dequantize(*parts))
             for kind, parts in whole.items()}
    kept = nf4.quantize(weight)
    return found | {"NF4": (tuple(kept), nf4.dequantize(torch.float32, tuple(weight.shape), *kept))}


def draw() -> Picture:
    """Levels above, errors below."""
    picture = Picture(620, 396, "Quantisation: the levels of int4 and NF4, and the error of each kind")
    levels(picture, drawn(tails=True)[:1, :64])
    axes = Axes(picture, (186, 222, 400, 120), (0.004, 0.2), (0, 5), across=math.log10)
    axes.ticks([(x, f"{x:.1%}") for x in (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)], [])
    axes.named("", "error relative to the weight, root mean square")
    picture.text(36, 208, "Error", "head")
    for hue, tails in (("a", False), ("b", True)):
        weight = drawn(tails)
        for row, (kind, (kept, read)) in enumerate(stored(weight).items()):
            axes.dots([(((read - weight).norm() / weight.norm()).item(), 4.5 - row)], hue, 4.5)
            if tails:
                bits = 8 * sum(part.nbytes for part in kept) / weight.numel()
                picture.text(178, 238 + 24 * row, f"{kind}: {bits:.2f} bits", "end small")
    picture.text(420, 208, "N(0, 1)", "small a")
    picture.text(476, 208, "t, 5 degrees", "small b")
    return picture


def levels(picture: Picture, weight: Tensor) -> None:
    """Three rulers: the weights, the 16 levels of int4 and those of NF4."""
    _, scale, zero = quantize_weight(weight, 4, 64)
    kept = nf4.quantize(weight)
    largest = nf4.dequantize(torch.float32, (1, 64), *kept).abs().max().item()
    assert zero is not None
    rulers = {"64 weights": ("f", weight[0].tolist()),
              "int4": ("a", ((torch.arange(16) - zero[0, 0]) * scale[0, 0]).tolist()),
              "NF4": ("b", [level * largest for level in nf4.LEVELS])}
    axes = Axes(picture, (186, 40, 400, 130), (-5, 5), (0, 1))
    picture.text(36, 36, "Levels for a group of 64", "head")
    for i, (name, (hue, values)) in enumerate(rulers.items()):
        y = 56 + 36 * i
        picture.text(178, y + 18, name, "end small")
        for value in values:
            x = axes.at(value, 0)[0]
            picture.line([(x, y), (x, y + 24)], hue)
