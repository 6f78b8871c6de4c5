"""Which keys a query may see. Every attention in the house asks here.

    q at position p sees k at position s   iff   s ≤ p,   s > p − W,   same document,   both real

    W = 3 (W counts the query itself)          two documents in one row: positions 0 1 2 0 1
          k 0 1 2 3 4                                k 0 1 2 0 1
      q 0   x . . . .                            q 0   x . . . .
        1   x x . . .                              1   x x . . .
        2   x x x . .                              2   x x x . .
        3   . x x x .                              0   . . . x .
        4   . . x x x                              1   . . . x x

A position of −1 marks padding: it sees only other padding, so no row is empty (softmax of nothing is NaN)
and nothing real ever reads it. A position of 0 begins a document.

Shapes: B batch, T queries, S keys.
"""

import torch
from torch import Tensor


def allowed(q_pos: Tensor, k_pos: Tensor, window: int | None, q_doc: Tensor | None = None, k_doc: Tensor | None = None) -> Tensor:
    """q_pos (B, T), k_pos (B, S), optionally the number of the document of each → bool (B, T, S)."""
    q, k = q_pos[:, :, None], k_pos[:, None, :]
    visible = (k <= q) & ((q < 0) == (k < 0))
    if window is not None:
        visible &= k > q - window
    if q_doc is not None:
        visible &= q_doc[:, :, None] == k_doc[:, None, :]
    return visible
