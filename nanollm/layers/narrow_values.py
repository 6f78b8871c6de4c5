"""Attention whose values have a width of their own: narrower than queries and keys, and multiplied by a number.

    q_i = rope(W_i^q x)   k_j = rope(W_j^k x)   (d numbers)        v_j = s · W_j^v x   (v numbers)
    o = W^o [Σ softmax(q_1 k) v; …; Σ softmax(q_H k) v]

MiMo-V2-Flash has d = 192 and v = 128: what is compared gets more room than what is carried on, and the cache holds
320 numbers a head and token in place of 384. s is 0.707, about √(D / (H v)). Xiaomi 2026, arXiv 2601.02780.

Shapes: B batch, T tokens, D model width, H query heads, K key/value heads, d width of a query or key, v of a value.
"""

import torch
from torch import Tensor

from nanollm.config import NarrowValueAttention as NarrowValueAttentionConfig
from nanollm.layers.attention import Attention
from nanollm.layers.linear import Linear
from nanollm.layers.state import KVCache


class NarrowValueAttention(Attention):
    """The mixer at the head of the file."""
    WORDS = {"value": "a head's value is {} wide", "value_scale": "values times {}"}

    def __init__(self, config: NarrowValueAttentionConfig, dim: int) -> None:
        super().__init__(config.attention, dim)
        inner = config.attention
        self.value_scale = config.value_scale
        self.v = Linear(dim, inner.kv_heads * config.value, inner.qkv_bias)
        self.o = Linear(inner.heads * config.value, dim, inner.out_bias)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, D) → q (B, H, T, d), k (B, K, T, d), v (B, K, T, v)."""
        heads, kv_heads = self.config.heads, self.config.kv_heads
        q, k = self.q(x).unflatten(-1, (heads, -1)), self.k(x).unflatten(-1, (kv_heads, -1))
        v = self.v(x).unflatten(-1, (kv_heads, -1)) * self.value_scale
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    @staticmethod
    def new_state(  # type: ignore[override]  # of its own config
        config: NarrowValueAttentionConfig, batch: int, length: int, dtype: torch.dtype, device: torch.device
    ) -> KVCache:
        inner = config.attention
        slots, widths = min(length, inner.window or length), (inner.head_dim, config.value)
        return KVCache(batch, inner.kv_heads, slots, widths, dtype, device, ring=slots < length)

    @staticmethod
    def multiply_adds(  # type: ignore[override]  # of its own config
        config: NarrowValueAttentionConfig, dim: int, context: int
    ) -> int:
        inner, both = config.attention, config.attention.head_dim + config.value
        seen = min(context, inner.window or context)
        return dim * both * (inner.heads + inner.kv_heads) + inner.heads * both * seen
