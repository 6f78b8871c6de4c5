"""Hyena: a convolution as long as the sequence between two gates, run as a recurrence with complex state. StripedHyena.

                            ┌─ x₂ ─────────────────────────── ⊙ ── out_proj
    in_proj ── short filter ┼─ x₁ ─── ⊙ ─ u ─ long filter ────┘
                            └─ v ─────┘

    y = x₂ ⊙ (h ∗ u + D u),    u = x₁ ⊙ v                  Poli et al. 2023 (arXiv 2302.10866), Definition 3.1:
                                                           two gates, one long filter
    h_t = Re Σ_n R_n p_nᵗ                                  Massaroli et al. 2023 (arXiv 2310.18780), §3: the modal form

    S_t = p ⊙ S_{t−1} + u_t,   (h ∗ u)_t = Re Σ_n R_n S_t,n        the same as a recurrence

A pole p is a complex number: |p| says how fast it forgets, its angle how fast it swings. So a filter of any length is N
poles and N residues R, and what a channel remembers of the past is N complex numbers. The published filter is
multiplied out by an FFT, which would be another form of the same sum; here the recurrence serves prompt, training and
packed documents alike.

    a channel with N = 1, p = 0.5, R = 1, D = 0        u  1  0  0  2        S and y  1  0.5  0.25  2.125

The rows of in_proj lie head by head, as in fused attention: x₂ x₁ v of the first head, x₂ x₁ v of the second, …
The short filter (k taps, a filter a channel, bias, no activation) runs over all three.

Shapes: B batch, T tokens, D model width, I channels, H heads, N poles a channel, k taps.
    u, y (B, T, I)    p, R (I, N), stored as (I, N, 1, 2): 1 is the place of time in pᵗ, 2 are real and imaginary part
    S (B, I, N) complex; kept as float32 pairs (B, I, N, 2), whatever the weights are
The recurrence is the linear scan of recurrent.py with complex numbers: its definition, and its form in chunks that run
side by side. Either holds all states of a call, (B, T, I, N); a long prompt costs less memory if it is fed in pieces.
"""

import math

import torch
from torch import Tensor, nn

from nanollm.config import Hyena as HyenaConfig
from nanollm.init import normal, one, residual
from nanollm.layers.forward_context import ForwardContext
from nanollm.layers.linear import Linear
from nanollm.layers.mamba import Conv1d, aligned, convolve, window
from nanollm.layers.recurrent import CHUNKED_FROM, linear_scan, linear_scan_chunked
from nanollm.layers.state import ScanState


def long_filter(u: Tensor, p: Tensor, R: Tensor, S: Tensor,
                begins: Tensor | None = None, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """h ∗ u (B, T, I) float32, and the last state. u float32, S the state before the first token.

    begins (B, T) bool: forget it before this token; real (B, T) bool: False is padding, which leaves S as it is.
    """
    B, T, _ = u.shape
    decay = p.expand(B, T, *p.shape)                                                    # (B, T, I, N)
    if begins is not None:
        decay = decay.masked_fill(begins[..., None, None], 0)
    if real is not None:
        decay, u = decay.masked_fill(~real[..., None, None], 1), u * real[..., None]
    added = u[..., None].expand(decay.shape).to(p.dtype)
    scan = linear_scan_chunked if T >= CHUNKED_FROM else linear_scan
    states, last = scan(decay.flatten(-2), added.flatten(-2), S.flatten(-2))
    return (states.unflatten(-1, p.shape) * R).sum(-1).real, last.unflatten(-1, p.shape)


def in_the_disc(value: Tensor, stream: torch.Generator, depth: int) -> Tensor:
    """Poles, uniform over |p| < 0.95: none explodes, some remember. (I, N, 1, 2), real and imaginary part."""
    angle, area = value.uniform_(generator=stream).movedim(-1, 0)
    poles = torch.polar(0.95 * area.float().sqrt(), 2 * math.pi * angle.float())
    return torch.view_as_real(poles).to(value.dtype)


def random_residues(value: Tensor, stream: torch.Generator, depth: int) -> Tensor:
    """N(0, 1/N) for a filter of N poles."""
    return normal(value.shape[1] ** -0.5)(value, stream, depth)


class Hyena(nn.Module):
    """The mixer drawn at the head of the file."""
    INIT = {"poles": in_the_disc, "residues": random_residues, "D": one, "out_proj.weight": residual}
    FLOAT32 = frozenset({"poles", "residues"})      # as in the published code: powers of a rounded pole drift away

    def __init__(self, config: HyenaConfig, dim: int) -> None:
        super().__init__()
        self.config = config
        I, N = config.inner, config.state
        self.in_proj = Linear(dim, 3 * I, bias=True)
        self.conv1d = Conv1d(3 * I, config.conv, bias=True)
        self.poles = nn.Parameter(torch.empty(I, N, 1, 2))
        self.residues = nn.Parameter(torch.empty(I, N, 1, 2))
        self.D = nn.Parameter(torch.empty(I))
        self.out_proj = Linear(I, dim, bias=True)

    def forward(self, x: Tensor, ctx: ForwardContext, state: ScanState | None = None) -> Tensor:
        """x (B, T, D) → (B, T, D)."""
        if state is None:
            state = self.new_state(self.config, x.shape[0], 0, x.dtype, x.device)
        z, before = aligned(self.in_proj(x).transpose(1, 2), state.conv, ctx.real)    # (B, 3I, T)
        positions = None if ctx.regular else ctx.positions
        taps, bias = self.conv1d.weight, self.conv1d.bias
        assert bias is not None, "this mixer's convolution has a bias"
        z, state.conv = convolve(z, taps, None, before, positions), window(z, before, ctx.real)
        z = z + bias[:, None]                                                           # once rounded, as published
        heads = z.unflatten(1, (self.config.heads, 3, -1))                              # (B, H, 3, I/H, T)
        x2, x1, v = (part.flatten(1, 2).transpose(1, 2) for part in heads.unbind(2))    # (B, T, I)
        u = x1 * v
        p, R = (torch.view_as_complex(pairs.float()).squeeze(-1) for pairs in (self.poles, self.residues))
        y, S = long_filter(u.float(), p, R, torch.view_as_complex(state.state), ctx.begins, ctx.real)
        state.state = torch.view_as_real(S)
        return self.out_proj(x2 * (y.to(u.dtype) + self.D * u))

    @staticmethod
    def new_state(config: HyenaConfig, batch: int, length: int, dtype: torch.dtype, device: torch.device) -> ScanState:
        # complex numbers as pairs
        return ScanState(batch, 3 * config.inner, config.conv, (config.inner, config.state, 2), dtype, device)

    @staticmethod
    def multiply_adds(config: HyenaConfig, dim: int, context: int) -> int:
        I, N = config.inner, config.state
        # three short filters; x₁·v, D·u, ·x₂; and for each of N complex states p·S, + u, Re(R·S): 4 + 2 multiply-adds
        return 4 * dim * I + I * (3 * config.conv + 3 + 6 * N)
