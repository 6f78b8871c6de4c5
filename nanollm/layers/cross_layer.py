"""Attention to the keys and values of a layer before: a layer that has queries alone.

    layer         12          13          14          15          16          17
    window         W           W           –           W           W           –
    reads      its own     its own     its own        13's        13's        14's

A layer whose config says `kept` leaves its keys and values, turned and normalised, in the context of the forward pass;
the layers above with the same window read what the last such layer has left. They have no W_k and W_v and remember
nothing: of Gemma 4 E2B's 35 layers 15 have a cache. Brandon et al. 2024 (arXiv 2405.12981); here as in Sun et al. 2024
(arXiv 2405.05254), where all layers of the upper half read the same.

Shapes: B batch, T tokens, S keys, D model width, H query heads, K key/value heads, d head width.
"""

import torch
from torch import Tensor

from nanollm.config import CrossLayerAttention as CrossLayerAttentionConfig
from nanollm.layers.attention import Attention, attend
from nanollm.layers.forward_context import ForwardContext
from nanollm.layers.norm import normed
from nanollm.layers.rope import rotate
from nanollm.layers.state import KVCache, NoState


class CrossLayerAttention(Attention):
    """The mixer at the head of the file."""
    HANDS_ON = True                     # it reads what is no part of the layer: it cannot be traced alone

    def __init__(self, config: CrossLayerAttentionConfig, dim: int) -> None:
        super().__init__(config, dim)
        self.k = self.v = self.k_norm = None  # type: ignore[assignment]

    def forward(self, x: Tensor, ctx: ForwardContext, state: KVCache | None = None) -> Tensor:
        """x (B, T, D) → (B, T, D)."""
        config = self.config
        q = normed(self.q_norm, self.q(x).unflatten(-1, (-1, config.head_dim))).transpose(1, 2)     # (B, H, T, d)
        if config.rope is not None:
            q = rotate(q, *ctx.rotation(config.rope, config.head_dim), config.rope.layout)
        k, v, slots = ctx.kept[config.window]                                                       # (B, K, S, d)
        mixed = attend(q, k, v, self.mask(ctx, slots), self.scale, config.softcap)
        return self.o(mixed.transpose(1, 2).flatten(-2))

    @staticmethod
    def new_state(  # type: ignore[override]  # nothing
        config: CrossLayerAttentionConfig, batch: int, length: int, dtype: torch.dtype, device: torch.device
    ) -> NoState:
        return NoState()

    @staticmethod
    def multiply_adds(  # type: ignore[override]  # of its own config
        config: CrossLayerAttentionConfig, dim: int, context: int
    ) -> int:
        return Attention.multiply_adds(config, dim, context) - 2 * dim * config.kv_heads * config.head_dim
