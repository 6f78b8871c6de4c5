"""Mamba, first generation, with heads. Zamba.

                 ┌── x ── causal conv, silu ──┬── scan(x; Δ, B, C) ── ⊙ ── out_proj           as mamba.py
    in_proj ─────┤                            └── x_proj → Δ, B, C     │
                 └── z ── silu ────────────────────────────────────────┘
                              └──────────── head by head ────────────┘

In mamba.py all I channels share B and C. Here each of H equal parts of them has its own: x_proj is one small matrix a
head, which reads the channels of that head alone, and so is dt_proj. All other weights are those of mamba.py, and as
many.                                                                 Glorioso et al. 2024 (arXiv 2405.16712), §2

Shapes: B batch, T tokens, D model width, I inner channels, H heads, N state, R rank of Δ.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanollm.config import MultiHeadMamba as MultiHeadMambaConfig
from nanollm.init import matrix
from nanollm.layers.forward_context import ForwardContext
from nanollm.layers.mamba import Mamba
from nanollm.layers.scan import mamba_scan


class HeadLinear(nn.Module):
    """A matrix a head, W (H, out, I/H)."""
    INIT = {"weight": matrix}

    def __init__(self, heads: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:                                     # (B, T, I) → (B, T, H, out)
        return torch.einsum("bthi,hoi->btho", x.unflatten(-1, (len(self.weight), -1)), self.weight)


class MultiHeadMamba(Mamba):
    """The mixer drawn at the head of the file."""
    WORDS = {**Mamba.WORDS, "heads": "{} parts of the channels have Δ, B and C of their own"}

    def __init__(self, config: MultiHeadMambaConfig, dim: int) -> None:
        super().__init__(config, dim)
        width = config.dt_rank + 2 * config.state
        inputs = config.inner // config.heads
        self.x_proj = HeadLinear(config.heads, inputs, width)  # type: ignore[assignment]  # for a Linear

    def scanned(self, x: Tensor, z: Tensor, h: Tensor, ctx: ForwardContext) -> tuple[Tensor, Tensor]:
        """As in Mamba, one head after the other."""
        H, config, A = len(self.x_proj.weight), self.config, -torch.exp(self.A_log.float())
        parts = zip(x.chunk(H, -1), z.chunk(H, -1), h.chunk(H, 1), self.x_proj(x).unbind(2), A.chunk(H),
                    self.dt_proj.weight.chunk(H), self.dt_proj.bias.chunk(H), self.D.chunk(H), strict=True)
        done = []
        for x, z, h, low_rank, A, dt_weight, dt_bias, D in parts:
            delta, B, C = low_rank.split([config.dt_rank, config.state, config.state], -1)
            delta = F.linear(delta, dt_weight)
            done.append(mamba_scan(x, delta, dt_bias, A, B, C, D, z, h, ctx.begins, ctx.real))
        return torch.cat([y for y, _ in done], -1), torch.cat([h for _, h in done], 1)
