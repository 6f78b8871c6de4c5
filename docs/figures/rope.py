"""RoPE's angles under each scaling, at eight times the original context.

    f_j = θ^(−2j/d)          pair j turns once in 2π / f_j tokens               nanollm/layers/rope.py, scaling.py

On the left how often each pair turns within the original context L; on the right by what each formula divides f_j.
LongRoPE is not here: its divisors are searched for a model, no formula gives them.
"""

import math

import torch

from docs.figures.drawing import Axes, Picture, legend
from nanollm.config import DynamicNTK, Linear, Llama3, Rope, Scaling, SteppedNTK, Yarn
from nanollm.layers.rope import frequencies

WIDTH, L, FACTOR = 64, 4096, 8
SCALINGS: dict[str, tuple[str, Scaling]] = {
    "Linear": ("b", Linear(FACTOR)), "Llama3": ("c", Llama3(FACTOR, L)), "YaRN": ("d", Yarn(FACTOR, L)),
    "dynamic NTK, factor 1": ("e", DynamicNTK(1.0, L)), "stepped NTK": ("f", SteppedNTK(L)),
}


def angles(scaling: Scaling | None) -> list[float]:
    """f_j of all pairs, for a sequence of FACTOR · L tokens."""
    return frequencies(Rope(scaling=scaling), WIDTH, torch.tensor([[FACTOR * L]])).flatten().tolist()


def draw() -> Picture:
    """Two panels."""
    picture = Picture(770, 330, "Angles of RoPE under each scaling, and by what they are divided")
    plain = angles(None)
    pairs = range(len(plain))
    turns = Axes(picture, (56, 68, 280, 204), (0, 31), (0.004, 1500), up=math.log10)
    stretch = Axes(picture, (400, 68, 190, 204), (0, 31), (0.89, 17.1), up=math.log2)
    across = [(j, str(j)) for j in (0, 8, 16, 24, 31)]
    turns.ticks(across, [(10.0**e, f"{10.0**e:g}") for e in range(-2, 4)])
    turns.named("Turns within the original context", "pair j", f"L f_j / 2π,  L = {L}, θ = 10,000, d = {WIDTH}")
    stretch.ticks(across, [(2.0**e, f"{2**e}") for e in range(5)])
    stretch.named("Divided by", "pair j", f"at {FACTOR} L tokens")
    turns.curve([(j, L * plain[j] / (2 * math.pi)) for j in pairs], "a")
    stretch.curve([(j, 1) for j in (0, 31)], "a")
    for hue, scaling in SCALINGS.values():
        scaled = angles(scaling)
        turns.curve([(j, L * scaled[j] / (2 * math.pi)) for j in pairs], hue)
        stretch.curve([(j, plain[j] / scaled[j]) for j in pairs], hue)
    legend(picture, 608, 90, [("a", "as trained"), *((hue, name) for name, (hue, _) in SCALINGS.items())], 22)
    return picture
