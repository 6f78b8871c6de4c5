"""ALiBi: what each head pays for distance, and how slopes are dealt out to any number of heads.

    score(q at p, k at s) − m_h · (p − s)          m_h = 2^(−8h/H)          nanollm/layers/alibi.py

On the left the bias of the last query, straight from `alibi_bias`; on the right the slopes of 8 heads, of 6 and of 12,
which are no powers of two: they take those of 4 and 8 heads, and then every other one of twice as many.
"""

import math

import torch

from docs.figures.drawing import Axes, Picture
from nanollm.config import Alibi
from nanollm.layers.alibi import alibi_bias, alibi_slopes

HEADS, FAR = 8, 64


def draw() -> Picture:
    """Two panels."""
    picture = Picture(770, 322, "ALiBi: biases over distance, and the slopes of 8, 6 and 12 heads")
    positions = torch.arange(FAR + 1)[None]
    bias = alibi_bias(Alibi(), HEADS, positions, positions, 1.0)[0, :, -1].tolist()        # (H, S): of the last query
    paid = Axes(picture, (56, 68, 330, 192), (0, FAR), (-8, 0))
    paid.ticks([(x, str(x)) for x in (0, 16, 32, 48, 64)], [(y, str(y).replace("-", "−")) for y in (0, -2, -4, -6, -8)])
    paid.named("What a key costs", "distance p − s", f"added to its score, {HEADS} heads")
    for h, row in enumerate(bias):
        points = [(FAR - s, row[s]) for s in range(FAR, -1, -1) if row[s] >= -8]
        paid.curve([points[0], points[-1]], "abcdef"[h % 6])
        end = paid.at(*points[-1])
        above = points[-1][1] == -8
        picture.text(end[0] + (3 if above else 6), end[1] - (6 if above else -3), f"1/{2 ** (h + 1)}", "tiny dim")
    slopes = Axes(picture, (480, 68, 260, 192), (0, 13), (2**-9, 1), up=math.log2)
    slopes.ticks([(h, str(h)) for h in (1, 4, 8, 12)], [(2.0**-e, f"1/{2**e}" if e else "1") for e in range(0, 9, 2)])
    slopes.named("Slopes", "head", "m")
    for (heads, hue), y in zip(((8, "a"), (6, "b"), (12, "c")), (226, 240, 254), strict=True):
        points = [(h + 1, m) for h, m in enumerate(alibi_slopes(heads).tolist())]
        slopes.curve(points, hue)
        slopes.dots(points, hue)
        picture.text(736, y, f"{heads} heads", f"end small {hue}")
    return picture
