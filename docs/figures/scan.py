"""A scan in chunks: which input reaches which output inside a chunk, and which through the state between chunks.

    y = M x      M_ts = C_tᵀ B_s Δ_s exp(Δ_{s+1} A + … + Δ_t A)          Dao & Gu 2024 (arXiv 2405.21060) §3.2, §6

M is read from nanollm/layers/ssd.py column by column: the output for a 1 at s and 0 elsewhere. Forgetting the state at
the beginning of every chunk (`begins`) leaves what is inside the chunks; the difference came through the state h.
"""

import torch
from torch import Tensor

from docs.figures.drawing import Axes, Picture, normal
from nanollm.layers.ssd import ssd_chunked, ssd_sequential

TOKENS, CHUNK, STATE = 32, 8, 4
DECAYS = {"a": -0.05, "c": -0.3}
B, C = (torch.tensor(normal(TOKENS, STATE, seed))[None, :, None] for seed in (1, 2))       # (1, T, G, N)


def scan(x: Tensor, decay: float, tokens: int = TOKENS, begins: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x (B, T, 1, 1) → y and the last h, of one head with one channel."""
    rows = x.shape[0]
    given = (torch.ones(rows, tokens, 1), torch.tensor([decay]), B[:, :tokens].expand(rows, -1, -1, -1),
             C[:, :tokens].expand(rows, -1, -1, -1), torch.zeros(1), torch.zeros(rows, 1, 1, STATE))
    return ssd_chunked(x[:, :tokens], *given, begins, chunk=CHUNK)


def draw() -> Picture:
    """Two panels."""
    ones = torch.eye(TOKENS)[:, :, None, None]
    begins = (torch.arange(TOKENS) % CHUNK == 0).expand(TOKENS, -1)
    whole, inside = (scan(ones, DECAYS["a"], begins=b)[0][..., 0, 0].T for b in (None, begins))     # (t, s)
    strength = (whole.abs() / whole.abs().max()).sqrt()
    picture = Picture(770, 366, "A scan as a matrix: blocks inside chunks, the rest through the state between them")
    picture.text(40, 40, "What reaches what", "head")
    picture.text(40, 58, f"√|M_ts|, {TOKENS} tokens in chunks of {CHUNK}", "small dim")
    rows = [[(("a" if inside[t, s] else "b"), 0.1 + 0.9 * strength[t, s].item()) if s <= t else None
             for s in range(TOKENS)] for t in range(TOKENS)]
    picture.cells(40, 74, 8, rows)
    picture.text(168, 348, "inputs s →", "mid small dim")
    picture.text(320, 92, "inside a chunk:", "small a")
    picture.text(320, 107, "a product", "small a")
    picture.text(320, 131, "through the state h", "small b")
    picture.text(320, 146, "that chunks hand on", "small b")
    axes = Axes(picture, (480, 74, 256, 234), (0, TOKENS), (0, 9))
    axes.ticks([(c, str(c)) for c in range(0, TOKENS + 1, CHUNK)], [(y, str(y)) for y in (0, 3, 6, 9)])
    axes.named("What chunks hand on", "token", "|h|: each step a line, chunks dots")
    x = torch.tensor(normal(1, TOKENS, seed=3))[:, :, None, None]
    for hue, decay in DECAYS.items():
        steps, h = [0.0], torch.zeros(1, 1, 1, STATE)
        for t in range(TOKENS):
            one = (z[:, t : t + 1] for z in (B, C))
            _, h = ssd_sequential(x[:, t : t + 1], torch.ones(1, 1, 1), torch.tensor([decay]), *one, torch.zeros(1), h)
            steps.append(h.norm().item())
        axes.curve(enumerate(steps), hue)
        axes.dots([(t, scan(x, decay, t)[1].norm().item()) for t in range(CHUNK, TOKENS + 1, CHUNK)], hue, 4)
    for y, hue in ((90, "a"), (106, "c")):
        picture.text(492, y, f"A = {DECAYS[hue]:g}".replace("-", "−"), f"small {hue}")
    return picture
