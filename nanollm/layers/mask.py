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

from typing import Final

import torch
from torch import Tensor

from nanollm.config import Alibi
from nanollm.layers.alibi import alibi_bias, alibi_slopes
from nanollm.layers.forward_context import ForwardContext
from nanollm.layers.state import SlotMapping

CAUSAL: Final = "causal"  # a mask that need not be built: query i of T sees the first i + 1 of T keys


def allowed(q_pos: Tensor, k_pos: Tensor, window: int | None,
            q_doc: Tensor | None = None, k_doc: Tensor | None = None) -> Tensor:
    """q_pos (B, T), k_pos (B, S), optionally the number of the document of each → bool (B, T, S)."""
    q, k = q_pos[:, :, None], k_pos[:, None, :]
    visible = (k <= q) & ((q < 0) == (k < 0))
    if window is not None:
        visible &= k > q - window
    if q_doc is not None and k_doc is not None:
        visible &= q_doc[:, :, None] == k_doc[:, None, :]
    return visible


class AttentionMask:
    """Which keys the queries of a call see: as a mask for the definition, as a run of keys a query for the kernels.

    Keys lie in order, those of this call in the order of the tokens, those of a cache by position. So a query sees one
    run of keys, first … last, both included: here with W = 3, and two documents in one row.

        k      0 1 2 3 4        first last        k  0 1 2 3        position  first last
        q 0    x . . . .          0    0        q 0  x . . .           0        0    0
          1    x x . . .          0    1          1  x x . .           1        0    1
          2    x x x . .          0    2          2  . . x .           0        2    2
          3    . x x x .          1    3          3  . . x x           1        2    3
    """

    def __init__(self, ctx: ForwardContext, slots: SlotMapping | None, window: int | None = None,
                 alibi: Alibi | None = None, heads: int = 1, scale: float = 1.0) -> None:
        """`heads` and `scale` are those of the scores, for `alibi`."""
        self.ctx, self.window, self.alibi, self.heads, self.scale = ctx, window, alibi, heads, scale
        self.key = (window, alibi and (alibi, heads, scale), slots)
        self.cached = None if slots is None or slots.fresh else slots             # None: all keys are of this call

    @property
    def dense(self) -> Tensor | str | None:
        """None: every query sees every key. CAUSAL. Else bool (B or 1, 1, T, S); with ALiBi float (B or 1, H, T, S)."""
        return self.ctx.once(("mask", *self.key), self._mask)

    @property
    def first(self) -> Tensor | None:
        """The first key that each query sees, int32 (B or 1, T). None: what it sees is no run (a ring with a chunk
        joined to it), or its bias is no slope times a distance (coarse ALiBi)."""
        return self.ctx.once(("runs", *self.key), self._runs)[0]

    @property
    def last(self) -> Tensor | None:
        """The last key that each query sees, int32 (B or 1, T); less than `first` for padding, which sees nothing."""
        return self.ctx.once(("runs", *self.key), self._runs)[1]

    @property
    def slopes(self) -> Tensor | None:
        """The penalty of each key for each place before the last, float32 (H,); None without ALiBi."""
        if self.alibi is None:
            return None
        device = self.ctx.positions.device
        return self.ctx.once(("slopes", *self.key), lambda: alibi_slopes(self.heads).to(device))

    def _mask(self) -> Tensor | str | None:
        ctx = self.ctx
        k_pos = ctx.positions if self.cached is None else self.cached.key_positions
        T, S = ctx.positions.shape[1], k_pos.shape[1]
        if ctx.regular and not self.alibi and (self.window is None or S <= self.window):
            if T == 1 and (self.cached is None or self.cached.full):
                return None
            if self.cached is None:
                return CAUSAL
        visible = allowed(ctx.rows(ctx.positions), ctx.rows(k_pos), self.window, ctx.documents, ctx.documents)[:, None]
        if not self.alibi:
            return visible
        bias = alibi_bias(self.alibi, self.heads, ctx.rows(ctx.positions), ctx.rows(k_pos), self.scale)
        return bias.masked_fill(~visible, -torch.inf).to(ctx.dtype)

    def _runs(self) -> tuple[Tensor, Tensor] | tuple[None, None]:
        positions, window, slots = self.ctx.rows(self.ctx.positions), self.window, self.cached
        if self.alibi and self.alibi.coarse:
            return None, None
        if slots is None:
            last = torch.arange(positions.shape[1], device=positions.device).expand_as(positions)
            first = last - positions                                            # where its document begins
        elif not slots.ring:
            last, first = positions, torch.zeros_like(positions)                # position p lies in slot p
        elif slots.join or self.alibi:
            return None, None
        else:                                                   # one token: its window has all that the ring holds
            return torch.zeros_like(positions, dtype=torch.int32), positions.clamp(max=slots.size - 1).int()
        if window is not None:
            first = torch.maximum(first, last - window + 1)
        return first.clamp(min=0).int(), last.int()
