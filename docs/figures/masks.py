"""Which keys a query sees: causal, in a window, in documents, and the positions that a ring of slots holds.

    q at position p sees k at position s   iff   s ≤ p,   s > p − W,   same document          nanollm/layers/mask.py

The first three are `allowed` for every pair. The last steps a cache of W slots (nanollm/layers/state.py) through the
same tokens: after each token, the position in every slot, and the one that was written.
"""

import torch

from docs.figures.drawing import Picture
from nanollm.layers.mask import allowed
from nanollm.layers.state import SlotMapping

TOKENS, WINDOW, CELL, TOP = 12, 4, 15, 74
DOCUMENTS = [0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3]            # positions: 0 begins a document


def draw() -> Picture:
    """Four panels."""
    picture = Picture(770, 290, "Four attention masks: causal, window, documents, and a ring cache")
    positions = torch.arange(TOKENS)[None]
    own = torch.tensor([DOCUMENTS])
    number = (own == 0).cumsum(1)
    panel(picture, 40, "Causal", "s ≤ p", allowed(positions, positions, None), [0] * TOKENS)
    panel(picture, 250, f"Window of {WINDOW}", "and s > p − W", allowed(positions, positions, WINDOW), [0] * TOKENS)
    panel(picture, 460, "Documents in a row", "and the same document", allowed(own, own, None, number, number),
          number[0].tolist())
    ring(picture, 672)
    return picture


def panel(picture: Picture, x: int, title: str, rule: str, seen: torch.Tensor, number: list[int]) -> None:
    """One mask, (1, T, S) bool; a query's own key is darker. number: of the document of each query, for its colour."""
    head(picture, x, title, rule)
    rows = [[("abc"[number[q] % 3], 1.0 if q == k else 0.55) if cell else None for k, cell in enumerate(row)]
            for q, row in enumerate(seen[0].tolist())]
    picture.cells(x, TOP, CELL, rows)
    picture.text(x + TOKENS * CELL / 2, TOP + TOKENS * CELL + 18, "keys →", "mid small dim")
    picture.text(x - 6, TOP + CELL - 4, "q 0", "end small dim")
    picture.text(x - 6, TOP + TOKENS * CELL - 4, str(TOKENS - 1), "end small dim")


def ring(picture: Picture, x: int) -> None:
    """Slots across, tokens down."""
    head(picture, x, f"Ring of {WINDOW}", "position in slot")
    held = torch.full((1, WINDOW + 1), -1)                  # and the bin
    for t in range(TOKENS):
        slots = SlotMapping(held, torch.tensor([[t]]), ring=True, alike=True, filled=t, longest=t + 1)
        kept = held[0, :WINDOW].tolist()
        row = [None if p < 0 else ("b" if j == slots.index.item() else "a", 0.55) for j, p in enumerate(kept)]
        picture.cells(x, TOP + t * CELL, CELL, [row])
        for j, position in enumerate(kept):
            if position >= 0:
                picture.text(x + j * CELL + 7, TOP + t * CELL + 10, str(position), "mid tiny")
    picture.text(x + WINDOW * CELL / 2, TOP + TOKENS * CELL + 18, "slots →", "mid small dim")
    picture.text(x - 6, TOP + CELL - 4, "q 0", "end small dim")


def head(picture: Picture, x: int, title: str, rule: str) -> None:
    """What stands above a panel."""
    picture.text(x, 36, title, "head")
    picture.text(x, 56, rule, "small dim")
