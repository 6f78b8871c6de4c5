"""Mamba, first generation: a gated block around a short convolution and a selective scan.

                 ┌── x ── causal conv, silu ──┬── scan(x; Δ, B, C) ── ⊙ ── out_proj
    in_proj ─────┤                            └── x_proj → Δ, B, C     │
                 └── z ── silu ────────────────────────────────────────┘

    Δ = softplus(dt_proj(low-rank Δ))        A = −exp(A_log)           Gu & Dao 2023 (arXiv 2312.00752), §3.4, Figure 3

Where the config has an inner norm, the low-rank Δ, B and C are each normalised: large models are not stable without
(Lieber et al. 2024, arXiv 2403.19887, §6.4). In Falcon-Mamba these norms have no gain.

Shapes: B batch, T tokens, D model width, I inner channels, N state, R rank of Δ, k width of the convolution.
Documents and padding (see mask.py): the convolution does not look across the start of a document, the state is
forgotten there, and padding changes neither.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanollm.config import Mamba as MambaConfig
from nanollm.init import inverse_softplus, one, residual, uniform, zero
from nanollm.layers.forward_context import ForwardContext
from nanollm.layers.linear import Linear
from nanollm.layers.norm import build_norm, normed
from nanollm.layers.scan import mamba_scan
from nanollm.layers.state import ScanState
from nanollm.ops import accelerated


@accelerated
def causal_conv(x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor, positions: Tensor | None) -> Tensor:
    """silu(y) (B, I, T) for the y of `convolve`."""
    return F.silu(convolve(x, weight, bias, before, positions))


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor, positions: Tensor | None) -> Tensor:
    """y (B, I, T), y_t = Σ_j w_j x_{t−j} + b, for x (B, I, T) and weight (I, 1, k).

    before (B, I, k−1): the inputs that precede x; positions (B, T), where there are documents or padding.
    """
    width, length = weight.shape[-1], x.shape[-1]
    x = torch.cat([before, x], -1)
    if positions is None and length > 1:
        return F.conv1d(x, weight, bias, groups=len(weight))
    if positions is None:                                       # one token: the sum itself, which needs no convolution
        y = (x.float() * weight[:, 0].float()).sum(-1, keepdim=True)
        return (y if bias is None else y + bias[:, None].float()).to(x.dtype)
    y = torch.zeros_like(x[..., :length])
    for j in range(width):                                      # a token at position p has p predecessors of its own
        mine = (positions >= j)[:, None]
        y = y + weight[:, :, width - 1 - j] * (x[..., width - 1 - j : width - 1 - j + length] * mine)
    return y if bias is None else y + bias[:, None]


def aligned(x: Tensor, before: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
    """x (B, I, T) and what precedes it (B, I, k−1), with padding moved out of the way.

    Padding becomes 0, and where a row begins with padding, `before` moves over it, up to the first real token.

        before  a b c    x  · · d e        →        before  a b a    x  b c d e
    """
    if real is None:
        return x, before
    width, joined = before.shape[-1], torch.cat([before, x * real[:, None]], -1)
    column = torch.arange(joined.shape[-1], device=x.device)
    place = column - real.int().argmax(1, keepdim=True)             # in `before`; a row that is all padding stays
    index = torch.where((place >= 0) & (place < width), place, column)[:, None]
    joined = joined.gather(-1, index.expand(joined.shape))
    return joined[..., width:], joined[..., :width]


def window(x: Tensor, before: Tensor, real: Tensor | None) -> Tensor:
    """The last k − 1 real inputs of each row, (B, I, k−1), for the convolution of the next call.

    x and before as `aligned` gives them.
    """
    x, width = torch.cat([before, x], -1), before.shape[-1]
    if real is None:
        return x[..., x.shape[-1] - width :]
    end = (real * torch.arange(1, real.shape[1] + 1, device=x.device)).amax(1)          # past the last real token, or 0
    index = end[:, None] + torch.arange(width, device=x.device)                         # in x, behind k − 1 of `before`
    return x.gather(-1, index[:, None].expand(-1, x.shape[1], -1))


def conv_filter(value: Tensor, stream: torch.Generator, depth: int) -> Tensor:
    """U(−1/√k, 1/√k) for a filter of k taps."""
    return uniform(value.shape[-1] ** -0.5)(value, stream, depth)


def s4d_real(value: Tensor, stream: torch.Generator, depth: int) -> Tensor:
    """log(1 … N) for every channel: Gu & Dao 2023, §3.6 (S4D-Real)."""
    return value.copy_(torch.arange(1, value.shape[1] + 1, device=value.device).log().expand_as(value))


def low_rank_step(value: Tensor, stream: torch.Generator, depth: int) -> Tensor:
    """U(−1/√R, 1/√R) for the (I, R) matrix that Δ comes through."""
    return uniform(value.shape[1] ** -0.5)(value, stream, depth)


class Conv1d(nn.Module):
    """Causal depthwise convolution and SiLU, one filter a channel, stored back to front as (I, 1, k)."""
    INIT = {"weight": conv_filter, "bias": zero}

    def __init__(self, channels: int, width: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, width))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None

    def forward(self, x: Tensor, before: Tensor, positions: Tensor | None) -> Tensor:
        return causal_conv(x, self.weight, self.bias, before, positions)


class Mamba(nn.Module):
    """The mixer drawn at the head of the file."""
    INIT = {
        "A_log": s4d_real,
        "D": one,
        "dt_proj.weight": low_rank_step,
        "dt_proj.bias": inverse_softplus(0.001, 0.1),
        "out_proj.weight": residual,
    }
    WORDS = {
        "conv_bias": "no bias on the convolution",
        "bias": "biases on the projections in and out",
        "inner_norm": "Δ, B and C normalised by {}",
    }

    def __init__(self, config: MambaConfig, dim: int) -> None:
        super().__init__()
        self.config = config
        I, N, R = config.inner, config.state, config.dt_rank
        self.in_proj = Linear(dim, 2 * I, config.bias)
        self.conv1d = Conv1d(I, config.conv, config.conv_bias)
        self.x_proj = Linear(I, R + 2 * N, bias=False)
        self.dt_proj = Linear(R, I, bias=True)
        self.dt_norm, self.b_norm, self.c_norm = (build_norm(config.inner_norm, width) for width in (R, N, N))
        self.A_log = nn.Parameter(torch.empty(I, N))
        self.D = nn.Parameter(torch.empty(I))
        self.out_proj = Linear(I, dim, config.bias)

    def forward(self, x: Tensor, ctx: ForwardContext, state: ScanState | None = None) -> Tensor:
        """x (B, T, D) → (B, T, D)."""
        config = self.config
        if state is None:
            state = self.new_state(config, x.shape[0], 0, x.dtype, x.device)
        x, z = self.in_proj(x).chunk(2, -1)                                             # (B, T, I) each
        x, before = aligned(x.transpose(1, 2), state.conv, ctx.real)                  # (B, I, T)
        positions = None if ctx.regular else ctx.positions
        x, state.conv = self.conv1d(x, before, positions).transpose(1, 2), window(x, before, ctx.real)
        y, state.state = self.scanned(x, z, state.state, ctx)
        return self.out_proj(y)

    def scanned(self, x: Tensor, z: Tensor, h: Tensor, ctx: ForwardContext) -> tuple[Tensor, Tensor]:
        """What the convolution gives and its gate, (B, T, I) each, and the state (B, I, N) → y (B, T, I), the state."""
        config = self.config
        delta, B, C = self.x_proj(x).split([config.dt_rank, config.state, config.state], -1)
        if config.inner_norm is not None:
            delta = normed(self.dt_norm, delta.contiguous())
            B, C = normed(self.b_norm, B.contiguous()), normed(self.c_norm, C.contiguous())
        delta, A = F.linear(delta, self.dt_proj.weight), -torch.exp(self.A_log.float())
        return mamba_scan(x, delta, self.dt_proj.bias, A, B, C, self.D, z, h, ctx.begins, ctx.real)

    @staticmethod
    def new_state(config: MambaConfig, batch: int, length: int, dtype: torch.dtype, device: torch.device) -> ScanState:
        return ScanState(batch, config.inner, config.conv, (config.inner, config.state), dtype, device)

    @staticmethod
    def multiply_adds(config: MambaConfig, dim: int, context: int) -> int:
        I, N, R = config.inner, config.state, config.dt_rank
        # a channel: the convolution; D x; and for each of N states Δ·A, exp, Δ·B, ·x, Ā·h, +, C·h, Σ: 8 operations,
        # as many as 4 multiply-adds
        return 3 * dim * I + I * (R + 2 * N) + R * I + I * (config.conv + 1 + 4 * N)
