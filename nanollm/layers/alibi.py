"""ALiBi: in place of a rotation, a head pays for each token between a query and the key that it reads.

    score(q at p, k at s) − m_h · (p − s)            Press, Smith & Lewis 2021 (arXiv 2108.12409), §3

    heads 8     m = 1/2  1/4  1/8 … 1/256            2^(−8h/H), h = 1 … H
    heads 6     the slopes of 4 heads, 1/4 1/16 1/64 1/256, and then every other one of 8 heads: 1/2 1/8

One family departs. In Falcon (`coarse`) a key costs what depends on its own position s alone, and slope, s and
product are bfloat16: past 256 neighbouring keys cost the same. The softmax forgives a constant a row, not the rounding.

Shapes: B batch, T queries, S keys, H heads. Slopes and biases are float32.
"""

import torch
from torch import Tensor

from nanollm.config import Alibi


def alibi_slopes(heads: int) -> Tensor:
    """m_h, float32 (H,)."""
    power = 2 ** (heads.bit_length() - 1)                                       # the largest that is not above `heads`
    slopes = [2 ** (-8 * h / power) for h in range(1, power + 1)]
    finer = [2 ** (-4 * h / power) for h in range(1, 2 * power + 1)]            # of twice as many heads
    return torch.tensor((slopes + finer[0::2])[:heads])


def alibi_bias(alibi: Alibi, heads: int, q_pos: Tensor, k_pos: Tensor, scale: float) -> Tensor:
    """What is added to the scores, (B, H, T, S), or (B, H, 1, S) where it is the same for all queries.

    scale: that of the scores.
    """
    slopes = alibi_slopes(heads).to(q_pos.device)[:, None, None]
    if alibi.coarse:
        return (slopes.bfloat16() * k_pos[:, None, None]).float() * scale       # the product is bfloat16 too
    distance = (q_pos[:, :, None] - k_pos[:, None, :]).clamp(min=0)
    return -slopes * distance[:, None]
