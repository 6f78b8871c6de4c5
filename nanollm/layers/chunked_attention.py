"""Attention in chunks: a query sees the keys of its own chunk. Three layers of four in Llama 4; the fourth sees all.

    q at position p sees k at position s  iff  s ≤ p  and  ⌊s / C⌋ = ⌊p / C⌋                                C = 8192

    C = 3     k 0 1 2 3 4
          q 0   x . . . .                  Unlike a window, a chunk begins anew: token 3 sees nothing before itself.
            1   x x . . .                  The layers that see all carry what lies in other chunks. They do not rotate,
            2   x x x . .                  so they know no distance that they have not seen in training, and their
            3   . . . x .                  queries grow with the position (LogTokenSteps, scaling.py).
            4   . . . x x

Meta 2025, https://ai.meta.com/blog/llama-4-multimodal-intelligence (iRoPE).
The cache of a chunked layer is a ring of C slots, as that of a window.

Shapes: B batch, T queries, S keys, D model width, H query heads, K key/value heads, d head width.
"""

from torch import Tensor

from nanollm.layers.attention import Attention
from nanollm.layers.forward_context import ForwardContext
from nanollm.layers.mask import CAUSAL, AttentionMask, allowed
from nanollm.layers.state import SlotMapping


class ChunkMask(AttentionMask):
    """Of the keys in a window those of a query's own chunk. They are no run that begins where the window does."""
    first = last = None  # type: ignore[assignment]  # properties of the others

    def __init__(self, ctx: ForwardContext, slots: SlotMapping | None, chunk: int) -> None:
        super().__init__(ctx, slots, chunk)
        self.chunk = chunk

    @property
    def dense(self) -> Tensor | str:
        """As AttentionMask.dense."""
        return self.ctx.once(("chunks", *self.key), self._mask)

    def _mask(self) -> Tensor | str:
        ctx, places = self.ctx, self.ctx.positions
        if ctx.regular and self.cached is None and places.shape[1] <= self.chunk:
            return CAUSAL
        q, k = ctx.rows(places), ctx.rows(places if self.cached is None else self.cached.key_positions)
        together = q[:, :, None] // self.chunk == k[:, None, :] // self.chunk
        return (allowed(q, k, None, ctx.documents, ctx.documents) & together)[:, None]


class ChunkedAttention(Attention):
    """The mixer at the head of the file."""
    WORDS = Attention.WORDS | {"window": "a query sees the keys of its own chunk of {}"}

    def mask(self, ctx: ForwardContext, slots: SlotMapping | None) -> ChunkMask:
        """Those of its own chunk."""
        assert self.config.window is not None, "the length of a chunk"
        return ChunkMask(ctx, slots, self.config.window)
