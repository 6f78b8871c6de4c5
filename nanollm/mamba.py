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

from nanollm.cache import Scan
from nanollm.config import Mamba as MambaConfig
from nanollm.frame import Frame
from nanollm.linear import Linear
from nanollm.scan import selective_scan, selective_scan_chunked

# The chunked scan does twice the work in far fewer steps. It pays (benchmarks/scan.md: up to six times) from this many
CHUNKED_FROM = 32       # tokens on, while a step touches at most this many
CHUNKED_UP_TO = 32768   # numbers, B · I · N: beyond, the work itself is what takes the time


class Conv1d(nn.Module):
    """Causal depthwise convolution: y_t = Σ_j w_j x_{t−j} + b, one filter a channel, stored back to front as (I, 1, k)."""

    def __init__(self, channels: int, width: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, width))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None

    def forward(self, x: Tensor, before: Tensor, positions: Tensor | None) -> Tensor:
        """x (B, I, T), before (B, I, k−1) the inputs that precede it, positions (B, T) where documents or padding matter."""
        width, length = self.weight.shape[-1], x.shape[-1]
        x = torch.cat([before, x], -1)
        if positions is None and length > 1:
            return F.conv1d(x, self.weight, self.bias, groups=len(self.weight))
        if positions is None:                                   # one token: the sum itself, which needs no convolution
            y = (x.float() * self.weight[:, 0].float()).sum(-1, keepdim=True)
            return (y if self.bias is None else y + self.bias[:, None].float()).to(x.dtype)
        y = torch.zeros_like(x[..., :length])
        for j in range(width):                                  # a token at position p has p predecessors of its own
            mine = (positions >= j)[:, None]
            y = y + self.weight[:, :, width - 1 - j] * (x[..., width - 1 - j : width - 1 - j + length] * mine)
        return y if self.bias is None else y + self.bias[:, None]


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
        config, T = self.config, x.shape[1]
        if state is None:
            state = Scan(config, x.shape[0], 0, x.dtype, x.device)
        x, z = self.in_proj(x).chunk(2, -1)                                             # (B, T, I) each
        x = x.transpose(1, 2)                                                           # (B, I, T)
        if frame.real is not None:
            x = x * frame.real[:, None]
        positions = None if frame.regular else frame.positions
        x, state.conv = F.silu(self.conv1d(x, state.conv, positions)).transpose(1, 2), self._window(x, state.conv, frame.real)
        delta, B, C = self.x_proj(x).split([config.dt_rank, config.state, config.state], -1)
        delta = F.softplus(F.linear(delta, self.dt_proj.weight).float() + self.dt_proj.bias.float())     # (B, T, I), float32
        if frame.real is not None:
            delta = delta * frame.real[..., None]                                       # Δ = 0: the state stays
        chunked = T >= CHUNKED_FROM and state.state.numel() <= CHUNKED_UP_TO
        scan = selective_scan_chunked if chunked else selective_scan
        y, state.state = scan(x.float(), delta, -torch.exp(self.A_log.float()), B.float(), C.float(), self.D.float(), state.state, frame.begins)
        return self.out_proj((y * F.silu(z.float())).to(x.dtype))

    def _window(self, x: Tensor, before: Tensor, real: Tensor | None) -> Tensor:
        """The last k − 1 real inputs of each row: (B, I, k−1)."""
        x, width = torch.cat([before, x], -1), before.shape[-1]
        if real is None:
            return x[..., x.shape[-1] - width :]
        end = (real * torch.arange(1, real.shape[1] + 1, device=x.device)).amax(1)      # one past the last real token, 0 if none
        index = end[:, None] + torch.arange(width, device=x.device)                     # in x, where `before` shifts by k − 1
        return x.gather(-1, index[:, None].expand(-1, x.shape[1], -1))
