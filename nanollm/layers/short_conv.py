"""A gated short convolution: each channel mixes a few tokens, between two gates. LFM2.

               ┌── B ── ⊙ ── conv ── ⊙ ── out_proj
    in_proj ───┼── C ───│────────────┘           u_t = B_t ⊙ x̃_t
               └── x̃ ───┘                        y_t = out_proj( C_t ⊙ Σ_{j<k} w_j u_{t−j} [+ b] )

Liquid AI 2025 (arXiv 2511.23404). What it remembers of the past are k − 1 inputs of the convolution and no state, so
it is cheap where memory is dear; attention in some of the layers sees the rest. There is no activation: the gates are
what is not linear.

Shapes: B batch, T tokens, D model width, I channels, k width of the convolution.
"""

import torch
from torch import Tensor, nn

from nanollm.config import ShortConv as ShortConvConfig
from nanollm.init import residual
from nanollm.layers.forward_context import ForwardContext
from nanollm.layers.linear import Linear
from nanollm.layers.mamba import Conv1d, aligned, convolve, window
from nanollm.layers.state import ConvState


class ShortConv(nn.Module):
    """The mixer drawn at the head of the file."""
    INIT = {"out_proj.weight": residual}
    WORDS = {"bias": "biases on the convolution and the projections"}

    def __init__(self, config: ShortConvConfig, dim: int) -> None:
        super().__init__()
        self.config = config
        self.in_proj = Linear(dim, 3 * config.width, config.bias)
        self.conv1d = Conv1d(config.width, config.conv, config.bias)
        self.out_proj = Linear(config.width, dim, config.bias)

    def forward(self, x: Tensor, ctx: ForwardContext, state: ConvState | None = None) -> Tensor:
        """x (B, T, D) → (B, T, D)."""
        if state is None:
            state = self.new_state(self.config, x.shape[0], 0, x.dtype, x.device)
        B, C, x = self.in_proj(x).chunk(3, -1)                                          # (B, T, I) each
        u, before = aligned((B * x).transpose(1, 2), state.conv, ctx.real)              # (B, I, T)
        positions = None if ctx.regular else ctx.positions
        y = convolve(u, self.conv1d.weight, self.conv1d.bias, before, positions).transpose(1, 2)
        state.conv = window(u, before, ctx.real)
        return self.out_proj(C * y)

    @staticmethod
    def new_state(config: ShortConvConfig, batch: int, length: int, dtype: torch.dtype,
                  device: torch.device) -> ConvState:
        return ConvState(batch, config.width, config.conv, dtype, device)

    @staticmethod
    def multiply_adds(config: ShortConvConfig, dim: int, context: int) -> int:
        return 4 * dim * config.width + config.width * (config.conv + 1)        # two gates are as one multiply-add
