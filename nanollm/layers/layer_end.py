"""What a layer does with the stream at its end, after mixer and feed-forward have added to it.

    x ← s · x                                                   s: one learned number a layer

The layers above then read the whole stream louder or quieter, what the layers before have written included, which no
gain of a branch can say. Gemma 4, 2026, where s is kept from training.

Shapes: B batch, T tokens, D model width.
"""

import torch
from torch import Tensor, nn

from nanollm.config import LayerEnd as LayerEndConfig
from nanollm.init import one
from nanollm.layers.forward_context import ForwardContext


class LayerEnd(nn.Module):
    """The equation at the head of the file."""
    INIT = {"scale": one}

    def __init__(self, config: LayerEndConfig, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(1))                               # s

    def forward(self, x: Tensor, ctx: ForwardContext) -> Tensor:                # (B, T, D) → (B, T, D)
        return x * self.scale
