"""Rotary position embedding: turn pairs of channels by an angle that grows with position.

    pair j of a head at position m turns by the angle  m·f_j,     f_j = θ^(−2j/r),  j = 0 … r/2 − 1
    (a, b) → (a cos − b sin, b cos + a sin)                       Su et al. 2021 (arXiv 2104.09864), eq. 34

Two rotated vectors meet in a dot product that depends on the difference of their positions only.

Which two channels make a pair is a convention, and mixing them up is the classic bug (shown for r = 8):

    half          pairs (0,4) (1,5) (2,6) (3,7)       Hugging Face Llama, Mistral, Qwen, NeoX
    interleaved   pairs (0,1) (2,3) (4,5) (6,7)       Meta's Llama files, GPT-J, Cohere, GLM

Both are  x·cos + swap(x)·sin  once the tables are laid out to match and sin carries the sign of its pair.

Shapes: B batch, H heads, T tokens, d head width, r rotated channels (the first r of d).
Longer contexts change f_j: scaling.py. Angles and tables are float32 whatever the weights are: in bfloat16 positions
beyond 256 would collide.
"""

import torch
from torch import Tensor

from nanollm.config import Rope
from nanollm.layers.scaling import attention_factor, scaled_frequencies
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
    turned = (turned * cos + swapped * sin).to(x.dtype)                         # the tables may be the wider
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
    if rope.scaling is None:
        return 1 / rope.theta ** exponents
    return scaled_frequencies(rope.scaling, rope.theta, r, exponents, lengths)
