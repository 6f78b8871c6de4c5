"""Attention whose output passes a gate: each channel of each head is multiplied by σ of its own reading of the token.

    o = W_o (mixed ⊙ σ(W_g x))              mixed: what attention.py hands to W_o

                                                    Qiu et al. 2025 (arXiv 2505.06708), §2.2, elementwise, position G1

A softmax always sums to 1, so a head that has nothing to say has to look somewhere, and comes to look at the first
token (an attention sink). With the gate it can be silent, and between the two linear maps W_v and W_o there is a
non-linearity.

Shapes: B batch, T tokens, D model width, H query heads, d head width.
"""

import torch
from torch import Tensor

from nanollm.config import GatedAttention as GatedAttentionConfig
from nanollm.layers.attention import Attention
from nanollm.layers.forward_context import ForwardContext
from nanollm.layers.linear import Linear
from nanollm.layers.state import KVCache


class GatedAttention(Attention):
    """The mixer at the head of the file."""
    WORDS: dict[str, str] = {}

    def __init__(self, config: GatedAttentionConfig, dim: int) -> None:
        super().__init__(config.attention, dim)
        inner = config.attention
        self.gate = Linear(dim, inner.heads * inner.head_dim, inner.qkv_bias)

    def forward(self, x: Tensor, ctx: ForwardContext, state: KVCache | None = None) -> Tensor:
        """x (B, T, D) → (B, T, D)."""
        q, k, v = self.project(x)
        return self.o(self.mixed(q, k, v, ctx, state) * torch.sigmoid(self.gate(x)))

    @staticmethod
    def new_state(  # type: ignore[override]  # of its own config
        config: GatedAttentionConfig, batch: int, length: int, dtype: torch.dtype, device: torch.device
    ) -> KVCache:
        return Attention.new_state(config.attention, batch, length, dtype, device)

    @staticmethod
    def multiply_adds(  # type: ignore[override]  # of its own config
        config: GatedAttentionConfig, dim: int, context: int
    ) -> int:
        inner = config.attention
        return Attention.multiply_adds(inner, dim, context) + dim * inner.heads * inner.head_dim
