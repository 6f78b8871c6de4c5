"""What a layer does with the stream at its end, after mixer and feed-forward have added to it.

    x ← x + norm(W_out (act(W_gate x) ⊙ p))                     p: the layer's own vector of the token, per_layer.py
    x ← s · x                                                   s: one learned number

The first line is there where the config has inputs (Gemma 4 E2B and E4B). With the second the layers above read the
whole stream louder or quieter, what the layers before have written included, which no gain of a branch can say.
Gemma 4, 2026. There s is a buffer, which no gradient reaches; here it is a parameter and trains like any other.

Shapes: B batch, T tokens, D model width, P width of a layer's own vector.
"""

import torch
from torch import Tensor, nn

from nanollm.config import LayerEnd as LayerEndConfig
from nanollm.init import one, residual
from nanollm.layers.forward_context import ForwardContext
from nanollm.layers.linear import Linear
from nanollm.layers.mlp import gated
from nanollm.layers.norm import build_norm, normed


class LayerEnd(nn.Module):
    """The equations at the head of the file."""
    INIT = {"scale": one, "out.weight": residual}
    HAS_PLACE = True                    # `number` follows from where the layer stands, not from its config

    def __init__(self, config: LayerEndConfig, dim: int) -> None:
        super().__init__()
        self.activation = config.inputs.activation if config.inputs else ""
        self.HANDS_ON = config.inputs is not None               # then it reads what is no part of the layer
        self.gate = Linear(dim, config.inputs.width, bias=False) if config.inputs else None
        self.out = Linear(config.inputs.width, dim, bias=False) if config.inputs else None
        self.norm = build_norm(config.norm, dim)
        self.number = 0                                         # which of the vectors is its own
        self.scale = nn.Parameter(torch.empty(1))               # s

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:                # (B, T, D) → (B, T, D)
        if self.gate is not None and self.out is not None:
            assert ctx.per_layer is not None, "a layer with inputs of its own stands in a Decoder"
            own = ctx.per_layer[:, :, self.number]                              # (B, T, P)
            x = x + normed(self.norm, self.out(gated(self.gate(x.to(ctx.dtype)), own, self.activation)))
        return x * self.scale

    @staticmethod
    def multiply_adds(config: LayerEndConfig, dim: int) -> int:
        """With what it takes to make the vector."""
        return 3 * dim * config.inputs.width if config.inputs else 0
