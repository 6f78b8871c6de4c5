"""Mamba, first generation: a gated block around a short convolution and a selective scan.

                 ┌── x ── causal conv, silu ──┬── scan(x; Δ, B, C) ── ⊙ ── out_proj
    in_proj ─────┤                            └── x_proj → Δ, B, C     │
                 └── z ── silu ────────────────────────────────────────┘

    Δ = softplus(dt_proj(low-rank Δ))        A = −exp(A_log)                 Gu & Dao 2023 (arXiv 2312.00752), §3.4, Figure 3

Shapes: B batch, T tokens, D model width, I inner channels, N state, R rank of Δ, k width of the convolution.
Documents and padding (see mask.py): the convolution does not look across the start of a document, the state is
forgotten there, and padding changes neither.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanollm.cache import Scan, new_state
from nanollm.config import Mamba as MambaConfig
from nanollm.frame import Frame
from nanollm.linear import Linear
from nanollm.ops import accelerated
from nanollm.scan import mamba_scan


@accelerated
def causal_conv(x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor, positions: Tensor | None) -> Tensor:
    """x (B, I, T), weight (I, 1, k), before (B, I, k−1) the inputs that precede x, positions (B, T) where documents or padding
    matter → silu(y) (B, I, T), y_t = Σ_j w_j x_{t−j} + b."""
    width, length = weight.shape[-1], x.shape[-1]
    x = torch.cat([before, x], -1)
    if positions is None and length > 1:
        return F.silu(F.conv1d(x, weight, bias, groups=len(weight)))
    if positions is None:                                       # one token: the sum itself, which needs no convolution
        y = (x.float() * weight[:, 0].float()).sum(-1, keepdim=True)
        return F.silu((y if bias is None else y + bias[:, None].float()).to(x.dtype))
    y = torch.zeros_like(x[..., :length])
    for j in range(width):                                      # a token at position p has p predecessors of its own
        mine = (positions >= j)[:, None]
        y = y + weight[:, :, width - 1 - j] * (x[..., width - 1 - j : width - 1 - j + length] * mine)
    return F.silu(y if bias is None else y + bias[:, None])


class Conv1d(nn.Module):
    """Causal depthwise convolution and SiLU, one filter a channel, stored back to front as (I, 1, k)."""

    def __init__(self, channels: int, width: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, width))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None

    def forward(self, x: Tensor, before: Tensor, positions: Tensor | None) -> Tensor:
        return causal_conv(x, self.weight, self.bias, before, positions)


class Mamba(nn.Module):
    """The mixer drawn at the head of the file."""

    def __init__(self, config: MambaConfig, dim: int) -> None:
        super().__init__()
        self.config = config
        I, N, R = config.inner, config.state, config.dt_rank
        self.in_proj = Linear(dim, 2 * I, config.bias)
        self.conv1d = Conv1d(I, config.conv, config.conv_bias)
        self.x_proj = Linear(I, R + 2 * N, bias=False)
        self.dt_proj = Linear(R, I, bias=True)
        self.A_log = nn.Parameter(torch.empty(I, N))
        self.D = nn.Parameter(torch.empty(I))
        self.out_proj = Linear(I, dim, config.bias)

    def forward(self, x: Tensor, frame: Frame, state: Scan | None = None) -> Tensor:    # (B, T, D) → (B, T, D)
        config = self.config
        if state is None:
            state = new_state(config, x.shape[0], 0, x.dtype, x.device)
        x, z = self.in_proj(x).chunk(2, -1)                                             # (B, T, I) each
        x = x.transpose(1, 2)                                                           # (B, I, T)
        if frame.real is not None:
            x = x * frame.real[:, None]
        positions = None if frame.regular else frame.positions
        x, state.conv = self.conv1d(x, state.conv, positions).transpose(1, 2), self._window(x, state.conv, frame.real)
        delta, B, C = self.x_proj(x).split([config.dt_rank, config.state, config.state], -1)
        delta, A = F.linear(delta, self.dt_proj.weight), -torch.exp(self.A_log.float())
        y, state.state = mamba_scan(x, delta, self.dt_proj.bias, A, B, C, self.D, z, state.state, frame.begins, frame.real)
        return self.out_proj(y)

    def _window(self, x: Tensor, before: Tensor, real: Tensor | None) -> Tensor:
        """The last k − 1 real inputs of each row: (B, I, k−1)."""
        x, width = torch.cat([before, x], -1), before.shape[-1]
        if real is None:
            return x[..., x.shape[-1] - width :]
        end = (real * torch.arange(1, real.shape[1] + 1, device=x.device)).amax(1)      # one past the last real token, 0 if none
        index = end[:, None] + torch.arange(width, device=x.device)                     # in x, where `before` shifts by k − 1
        return x.gather(-1, index[:, None].expand(-1, x.shape[1], -1))
