"""Rotary position embedding: turn pairs of channels by an angle that grows with position.

    pair j of a head at position m turns by the angle  m·f_j,     f_j = θ^(−2j/d),  j = 0 … d/2 − 1
    (a, b) → (a cos − b sin, b cos + a sin)                       Su et al. 2021 (arXiv 2104.09864), eq. 34

Two rotated vectors meet in a dot product that depends on the difference of their positions only.

Which two channels make a pair is a convention, and mixing them up is the classic bug (shown for d = 8):

    half          pairs (0,4) (1,5) (2,6) (3,7)       Hugging Face Llama, Mistral, Qwen, NeoX
    interleaved   pairs (0,1) (2,3) (4,5) (6,7)       Meta's Llama files, GPT-J, Cohere, GLM

Both are  x·cos + swap(x)·sin  once the tables are laid out to match and sin carries the sign of its pair.

Shapes: B batch, H heads, T tokens, d head width, r rotated channels (the first r of d).
Longer contexts change f_j; one function a formula below, each with its source. Angles and tables are float32
whatever the weights are: in bfloat16 positions beyond 256 would collide.
"""

import math

import torch
from torch import Tensor

from nanollm.config import DynamicNTK, Linear, Llama3, LongRope, Rope, Yarn
from nanollm.ops import accelerated


@accelerated
def rotate(x: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
    """x (B, H, T, d); cos, sin (B or 1, 1, T, r) from `rotation_tables` → (B, H, T, d), channels past r unchanged."""
    r = cos.shape[-1]
    turned, kept = (x, None) if r == x.shape[-1] else x.split([r, x.shape[-1] - r], -1)
    if layout == "half":
        swapped = turned.roll(r // 2, -1)                                       # 0 1 2 3 4 5 6 7 → 4 5 6 7 0 1 2 3
    else:
        swapped = turned.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)            # 0 1 2 3 4 5 6 7 → 1 0 3 2 5 4 7 6
    turned = turned * cos + swapped * sin
    return turned if kept is None else torch.cat([turned, kept], -1)


def rotation_tables(rope: Rope, head_dim: int, positions: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 (B, 1, T, r), sin with the sign of its channel.

    positions (B, T); lengths (B, T): how long the sequence of each token is, which two of the formulas ask for.
    """
    angles = positions[..., None].float() * frequencies(rope, head_dim, lengths)            # (B, T, r/2)
    cos, sin = angles.cos() * attention_factor(rope), angles.sin() * attention_factor(rope)
    if rope.layout == "half":
        cos, sin = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
    else:
        cos, sin = torch.stack([cos, cos], -1).flatten(-2), torch.stack([-sin, sin], -1).flatten(-2)
    return cos[:, None], sin[:, None]


def frequencies(rope: Rope, head_dim: int, lengths: Tensor) -> Tensor:
    """f_j: (r/2,), or (B, T, r/2) where they follow the length of each token's sequence."""
    r = int(head_dim * rope.fraction)
    exponents = torch.arange(0, r, 2, device=lengths.device).float() / r                    # 2j/r
    match rope.scaling:
        case None:
            return 1 / rope.theta ** exponents
        case Linear(factor):                                                    # Chen et al. 2023, arXiv 2306.15595
            return 1 / rope.theta ** exponents / factor
        case DynamicNTK():
            return dynamic_ntk(rope.scaling, rope.theta, r, exponents, lengths)
        case Llama3():
            return llama3(rope.scaling, 1 / rope.theta ** exponents)
        case Yarn():
            return yarn(rope.scaling, rope.theta, r, exponents)
        case LongRope():
            return longrope(rope.scaling, rope.theta, exponents, lengths)


def dynamic_ntk(s: DynamicNTK, theta: float, r: int, exponents: Tensor, lengths: Tensor) -> Tensor:
    """A larger base, so that the slowest pair is stretched by the factor and the fastest not at all (emozilla 2023).

        θ' = θ · (s·n/L − (s − 1))^(r/(r−2)),   n = the sequence's length, at least the original context L
    """
    n = lengths.clamp(min=s.original)[..., None]
    base = theta * (s.factor * n / s.original - (s.factor - 1)) ** (r / (r - 2))
    return 1 / base ** exponents


def llama3(s: Llama3, f: Tensor) -> Tensor:
    """Meta's rule for Llama 3.1: by how often a pair turns within the original context.

        turns > high: f     turns < low: f / s     between: (1 − γ) f/s + γ f,   γ = (turns − low) / (high − low)
    """
    turns = s.original * f / (2 * math.pi)
    gamma = ((turns - s.low) / (s.high - s.low)).clamp(0, 1)
    return (1 - gamma) * f / s.factor + gamma * f


def yarn(s: Yarn, theta: float, r: int, exponents: Tensor) -> Tensor:
    """Peng et al. 2023 (arXiv 2309.00071) §3.2: as `llama3`, with the ramp over the pair's index.

    Pair j(c) = r ln(L / 2πc) / (2 ln θ) makes c turns within the original context L (eq. 17, solved for j).
    """
    def pair_with(turns: float) -> float:
        return r * math.log(s.original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair_with(s.fast), pair_with(s.slow)
    if s.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, r - 1)
    pairs = torch.arange(r // 2, device=exponents.device).float()
    kept = 1 - ((pairs - first) / max(last - first, 0.001)).clamp(0, 1)         # 1: as it was, 0: divided by the factor
    powers = theta ** exponents
    return 1 / (s.factor * powers) * (1 - kept) + 1 / powers * kept


def longrope(s: LongRope, theta: float, exponents: Tensor, lengths: Tensor) -> Tensor:
    """Ding et al. 2024 (arXiv 2402.13753): a searched divisor a pair, the long list for the whole of a long sequence."""
    short, long = (torch.tensor(divisors, device=lengths.device) for divisors in (s.short, s.long))
    divisors = torch.where(lengths[..., None] > s.original, long, short)        # (B, T, r/2)
    return 1 / (divisors * theta ** exponents)


def attention_factor(rope: Rope) -> float:
    """What cos and sin are multiplied by: YaRN's and LongRoPE's temperature on the scores, else 1."""
    match rope.scaling:
        case Yarn(factor=factor, attention_factor=None):
            return 0.1 * math.log(factor) + 1 if factor > 1 else 1.0            # arXiv 2309.00071, eq. 22
        case Yarn() | LongRope():
            return rope.scaling.attention_factor
    return 1.0


def regime(rope: Rope | None, lengths: Tensor) -> Tensor | None:
    """What of the lengths the frequencies depend on; None: nothing. Another regime means other angles for *all* tokens."""
    match rope and rope.scaling:
        case DynamicNTK(original=original):
            return lengths.clamp(min=original)
        case LongRope(original=original):
            return (lengths > original).long()
    return None
