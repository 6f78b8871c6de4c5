"""Mamba, second generation: heads as in attention, one decay a head, so the scan is also a matrix product (ssd.py).

                 ┌── z ── silu ────────────────────────────────────────────┐
    in_proj ─────┼── x ─┐                            ┌─ x ──────┐          │
                 ├── B ─┼─ causal conv, silu ────────┼─ B ─ ssd ├── y ──── ⊙ ── norm ── out_proj
                 ├── C ─┘                            └─ C ──────┘
                 └── Δ ── softplus(Δ + bias), cut off ──────┘          Dao & Gu 2024 (arXiv 2405.21060), §7.1, Figure 6

What is new against the first: x, B, C and Δ all come from one projection at once, so none waits for another; B and C
pass the convolution too; H heads of P channels share a decay A = −exp(A_log), and the H/G heads of a group share B and
C, as queries share keys; the gated y is normalised before it goes out:

    u = y ⊙ silu(z)        norm(u) = u / sqrt(mean(u²) + ε) · g        the mean over each group's I/G channels by itself

The gate comes before the norm, and with several groups there are as many norms: so the groups can live on different
devices (§8.1). Over the whole width it would be another model. Early transformers did that; its logits for Codestral
were wrong, 5.23's are right.

Shapes: B batch, T tokens, D model width, H heads, P channels of a head, I = H·P, G groups, N state,
k width of the convolution.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanollm.config import Mamba2 as Mamba2Config
from nanollm.init import inverse_softplus, one, residual
from nanollm.layers.forward_context import ForwardContext
from nanollm.layers.linear import Linear
from nanollm.layers.mamba import Conv1d, aligned, window
from nanollm.layers.ssd import ssd
from nanollm.layers.state import ScanState


def log_uniform_decay(value: Tensor, stream: torch.Generator, depth: int) -> Tensor:
    """log U(1, 16) for a head, as published."""
    return value.uniform_(1, 16, generator=stream).log_()


class GatedNorm(nn.Module):
    """u / sqrt(mean(u²) + ε) · g for u = y ⊙ silu(z), group by group, in float32; the result is rounded once."""

    def __init__(self, config: Mamba2Config, eps: float) -> None:
        super().__init__()
        self.config, self.eps = config, eps
        self.gain = nn.Parameter(torch.empty(config.heads * config.head_dim))

    def forward(self, y: Tensor, z: Tensor) -> Tensor:                          # (B, T, I) each → (B, T, I)
        u = (y.float() * F.silu(z.float())).unflatten(-1, (self.config.groups, -1))
        u_hat = u * torch.rsqrt(u.square().mean(-1, keepdim=True) + self.eps)
        return (u_hat.flatten(-2) * self.gain.float()).to(y.dtype)


class Mamba2(nn.Module):
    """The mixer drawn at the head of the file."""
    INIT = {
        "A_log": log_uniform_decay,
        "D": one,
        "dt_bias": inverse_softplus(0.001, 0.1),
        "norm.gain": one,
        "out_proj.weight": residual,
    }
    WORDS = {
        "conv_bias": "no bias on the convolution",
        "bias": "biases on the projections in and out",
        "eps": {None: "no norm after the gate"},
        "scales": "z, x, B, C and Δ as projected times {}",
        "least_step": "Δ at least {}",
        "largest_step": "Δ at most {}",
    }

    def __init__(self, config: Mamba2Config, dim: int) -> None:
        super().__init__()
        self.config = config
        I, GN = config.heads * config.head_dim, config.groups * config.state
        self.widths = [I, I + 2 * GN, config.heads]                             # rows of in_proj: z; x, B and C; Δ
        self.in_proj = Linear(dim, sum(self.widths), config.bias)
        self.conv1d = Conv1d(I + 2 * GN, config.conv, config.conv_bias)
        self.dt_bias = nn.Parameter(torch.empty(config.heads))
        self.A_log = nn.Parameter(torch.empty(config.heads))
        self.D = nn.Parameter(torch.empty(config.heads))
        self.norm = None if config.eps is None else GatedNorm(config, config.eps)
        self.out_proj = Linear(I, dim, config.bias)

    def forward(self, x: Tensor, ctx: ForwardContext, state: ScanState | None = None) -> Tensor:
        """x (B, T, D) → (B, T, D)."""
        config = self.config
        if state is None:
            state = self.new_state(config, x.shape[0], 0, x.dtype, x.device)
        z, x, delta = self.projected(x).split(self.widths, -1)
        x, before = aligned(x.transpose(1, 2), state.conv, ctx.real)                  # (B, I + 2GN, T)
        positions = None if ctx.regular else ctx.positions
        x, state.conv = self.conv1d(x, before, positions).transpose(1, 2), window(x, before, ctx.real)
        x, B, C = x.split([z.shape[-1], *[config.groups * config.state] * 2], -1)
        x = x.unflatten(-1, (config.heads, config.head_dim))                            # (B, T, H, P)
        B, C = (each.unflatten(-1, (config.groups, config.state)) for each in (B, C))   # (B, T, G, N)
        delta = F.softplus(delta.float() + self.dt_bias.float()).clamp(config.least_step, config.largest_step)
        if ctx.real is not None:
            delta = delta * ctx.real[..., None]                                       # Δ = 0: the state stays
        y, state.state = ssd(x, delta, -torch.exp(self.A_log.float()), B, C, self.D, state.state, ctx.begins)
        y = y.flatten(-2)
        gated = (y.float() * F.silu(z.float())).to(y.dtype) if self.norm is None else self.norm(y, z)
        return self.out_proj(gated)

    def projected(self, x: Tensor) -> Tensor:
        """x (B, T, D) → z, x, B, C and Δ side by side (B, T, 2I + 2GN + H)."""
        if self.config.scales is None:
            return self.in_proj(x)
        config, scales = self.config, self.config.scales
        I, GN = config.heads * config.head_dim, config.groups * config.state
        parts = self.in_proj(x).split([I, I, GN, GN, config.heads], -1)
        return torch.cat([part * scale for part, scale in zip(parts, scales, strict=True)], -1)

    @staticmethod
    def new_state(config: Mamba2Config, batch: int, length: int, dtype: torch.dtype, device: torch.device) -> ScanState:
        H, P, N = config.heads, config.head_dim, config.state
        return ScanState(batch, H * P + 2 * config.groups * N, config.conv, (H, P, N), dtype, device)

    @staticmethod
    def multiply_adds(config: Mamba2Config, dim: int, context: int) -> int:
        H, P, G, N = config.heads, config.head_dim, config.groups, config.state
        # as in Mamba, but the decay is one number a head: Ā·h, B·Δx, +, C·h, Σ: 5 operations a state
        return dim * (3 * H * P + 2 * G * N + H) + (H * P + 2 * G * N) * config.conv + H * P * (2 + 5 * N // 2)
