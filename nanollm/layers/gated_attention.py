"""Attention whose output passes a gate: each channel of each head is multiplied by σ of its own reading of the token.

    o = W_o (mixed ⊙ σ(W_g x))              mixed: what attention.py hands to W_o

                                                    Qiu et al. 2025 (arXiv 2505.06708), §2.2, elementwise, position G1

A softmax always sums to 1, so a head that has nothing to say has to look somewhere, and comes to look at the first
token (an attention sink). With the gate it can be silent, and between the two linear maps W_v and W_o there is a
non-linearity.

Laguna's gate is one number a head, and a softplus, which can also make a head louder: W_g (H, D),

    o = W_o [softplus(g_1) mixed_1; …; softplus(g_H) mixed_H],   g = W_g x      softplus(g) = ln(1 + e^g), in float32

Shapes: B batch, T tokens, D model width, H query heads, d head width.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from nanollm.config import GatedAttention as GatedAttentionConfig
from nanollm.layers.attention import Attention
from nanollm.layers.forward_context import ForwardContext
from nanollm.layers.linear import Linear
from nanollm.layers.state import KVCache


class GatedAttention(Attention):
    """The mixer at the head of the file."""
    WORDS = {"per": "one gate a {}", "activation": "the gate is a {}"}

    def __init__(self, config: GatedAttentionConfig, dim: int) -> None:
        super().__init__(config.attention, dim)
        inner = config.attention
        self.per, self.activation = config.per, config.activation
        width = inner.head_dim if config.per == "channel" else 1
        self.gate = Linear(dim, inner.heads * width, inner.qkv_bias)

    def forward(self, x: Tensor, ctx: ForwardContext, state: KVCache | None = None) -> Tensor:
        """x (B, T, D) → (B, T, D)."""
        q, k, v = self.project(x)
        mixed, gate = self.mixed(q, k, v, ctx, state), self.gate(x)                     # (B, T, H·d), (B, T, H·d or H)
        gate = torch.sigmoid(gate) if self.activation == "sigmoid" else F.softplus(gate.float()).to(x.dtype)
        if self.per == "head":
            return self.o((mixed.unflatten(-1, (gate.shape[-1], -1)) * gate[..., None]).flatten(-2))
        return self.o(mixed * gate)

    @staticmethod
    def new_state(  # type: ignore[override]  # of its own config
        config: GatedAttentionConfig, batch: int, length: int, dtype: torch.dtype, device: torch.device
    ) -> KVCache:
        return Attention.new_state(config.attention, batch, length, dtype, device)

    @staticmethod
    def multiply_adds(  # type: ignore[override]  # of its own config
        config: GatedAttentionConfig, dim: int, context: int
    ) -> int:
        inner, width = config.attention, config.attention.head_dim if config.per == "channel" else 1
        return Attention.multiply_adds(inner, dim, context) + dim * inner.heads * width
