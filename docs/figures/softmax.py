"""The online softmax: attention over keys that come block by block, with a running maximum and a running sum.

    m' = max(m, max s)     l' = l e^(m − m') + Σ e^(s − m')     o' = o e^(m − m') + Σ e^(s − m') v          o / l

Milakov & Gimelshein 2018 (arXiv 1805.02867); Dao et al. 2022 (arXiv 2205.14135), Algorithm 1. kernels/attention.py runs
these lines. Here they stand once more, with m and l kept to be drawn; after every block o / l is compared with
`attend_plainly` over the keys so far.
"""

import torch

from docs.figures.drawing import Axes, Picture, normal
from nanollm.layers.attention import attend_plainly

KEYS, BLOCK, WIDTH = 32, 8, 16


def draw() -> Picture:
    """Three panels, one below the other."""
    q, k, v = (torch.tensor(normal(n, WIDTH, seed)) for n, seed in ((1, 36), (KEYS, 136), (KEYS, 7)))
    scores = (q @ k.T)[0] * WIDTH**-0.5
    m, l, o, seen = -torch.inf, torch.zeros(()), torch.zeros(WIDTH), []
    whole = attend_plainly(q[None, None], k[None, None], v[None, None], None, WIDTH**-0.5)[0, 0, 0]
    for start in range(0, KEYS, BLOCK):
        s, last = scores[start : start + BLOCK], start + BLOCK
        new = torch.maximum(torch.as_tensor(m), s.max())
        kept, p = torch.exp(m - new), torch.exp(s - new)
        l, o, m = l * kept + p.sum(), o * kept + p @ v[start : last], new
        far = attend_plainly(q[None, None], k[None, None, :last], v[None, None, :last], None, WIDTH**-0.5)[0, 0, 0]
        torch.testing.assert_close(o / l, far)
        seen.append((last, m.item(), l.item(), kept.item(), (o / l - whole).norm().item()))
    picture = Picture(620, 520, "The online softmax: scores, running maximum, running sum and output, block by block")
    ends = [(x, str(x)) for x in range(0, KEYS + 1, BLOCK)]
    top = Axes(picture, (56, 68, 400, 124), (0, KEYS), (-2.6, 4.4))
    top.ticks(ends, [(y, str(y).replace("-", "−")) for y in (-2, 0, 2, 4)])
    top.named("Running maximum", "", "scores of one query, and m")
    picture.boxes([(*top.at(j + 0.08, max(s, 0)), 10.5, abs(top.at(0, s)[1] - top.at(0, 0)[1]) + 0.2)
                   for j, s in enumerate(scores.tolist())], "a", 0.55)
    mid = Axes(picture, (56, 256, 400, 90), (0, KEYS), (0, 4))
    mid.ticks(ends, [(y, str(y)) for y in (0, 2, 4)])
    mid.named("Running sum", "", "l, in units of e^m; × is what a new maximum leaves of the old l")
    low = Axes(picture, (56, 410, 400, 60), (0, KEYS), (0, 3))
    low.ticks(ends, [(y, f"{y:g}") for y in (0, 1, 2, 3)])
    low.named("Distance of o / l from the end", "keys seen")
    for last, m, l, kept, far in seen:
        top.curve([(last - BLOCK, m), (last, m)], "b")
        mid.curve([(last - BLOCK, l), (last, l)], "b")
        low.curve([(last - BLOCK, far), (last, far)], "c")
        if last > BLOCK:
            x, y = mid.at(last - BLOCK, l)
            picture.text(x + 4, y - 5, f"× {kept:.2f}", "small")
    picture.text(472, 84, "score of a key", "small a")
    picture.text(472, 102, "m: a line a block", "small b")
    return picture
