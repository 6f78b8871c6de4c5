"""Gated DeltaNet: a state corrected by the delta rule (delta.py), between a short convolution and an output gate.

           ┌── qkv ── causal conv, silu ──┬── q ── /|q| ── /√N ──┐
           │                              ├── k ── /|k| ─────────┤
    x ─────┤                              └── v ─────────────────┼── delta rule ── o ── norm ── ⊙ ── out_proj
           ├── alpha ── −exp(A_log) softplus(· + dt_bias) ───────┤  log α                       │
           ├── beta ─── σ ───────────────────────────────────────┘  β                           │
           └── z ────── silu ───────────────────────────────────────────────────────────────────┘
                                                  Yang, Kautz & Hatamizadeh 2024 (arXiv 2412.06464), §3.4, Figure 1

Keys have length 1: then I − β k kᵀ has no eigenvalue outside [0, 1] for β in (0, 1), and no token can make the state
grow but by what it writes. With β in (0, 2) they lie in [−1, 1], as much of a bound, and a state can follow what turns
to and fro (Grazzi et al. 2024, arXiv 2411.12537). α is exp(Δ A) as in Mamba-2, one number a head. H/G heads of values
share a query and a key.

The norm is of each head by itself, with one gain for all heads, and comes before the gate (in Mamba-2 behind it):

    norm(o) = o / sqrt(mean(o²) + ε) · g        y = norm(o) ⊙ silu(z)

Shapes: B batch, T tokens, D model width, H heads, G key heads, P width of a value, N width of a key, k width of the
convolution. qkv has G·N rows of q, as many of k, then H·P of v.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanollm.config import GatedDeltaNet as GatedDeltaNetConfig
from nanollm.config import Norm
from nanollm.init import inverse_softplus, residual
from nanollm.layers.delta import delta_rule
from nanollm.layers.forward_context import ForwardContext
from nanollm.layers.linear import Linear
from nanollm.layers.mamba import Conv1d, aligned, window
from nanollm.layers.mamba2 import log_uniform_decay
from nanollm.layers.norm import RMSNorm
from nanollm.layers.state import ScanState

SHORTEST = 1e-6         # added to |q|² and |k|² before the root, as published


def unit(x: Tensor) -> Tensor:
    """x / |x| in float32."""
    x = x.float()
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + SHORTEST)


class GatedDeltaNet(nn.Module):
    """The mixer drawn at the head of the file."""
    INIT = {"A_log": log_uniform_decay, "dt_bias": inverse_softplus(0.001, 0.1), "out_proj.weight": residual}
    WORDS = {"reflects": "β up to 2, so that what is under a key can change its sign"}

    def __init__(self, config: GatedDeltaNetConfig, dim: int) -> None:
        super().__init__()
        self.config = config
        GN, HP = config.key_heads * config.key_dim, config.heads * config.head_dim
        self.widths = [GN, GN, HP]                                              # rows of qkv
        self.qkv = Linear(dim, sum(self.widths), bias=False)
        self.z = Linear(dim, HP, bias=False)
        self.alpha = Linear(dim, config.heads, bias=False)
        self.beta = Linear(dim, config.heads, bias=False)
        self.conv1d = Conv1d(sum(self.widths), config.conv, bias=False)
        self.dt_bias = nn.Parameter(torch.empty(config.heads))
        self.A_log = nn.Parameter(torch.empty(config.heads))
        self.norm = RMSNorm(Norm(eps=config.eps), config.head_dim)
        self.out_proj = Linear(HP, dim, bias=False)

    def forward(self, x: Tensor, ctx: ForwardContext, state: ScanState | None = None) -> Tensor:
        """x (B, T, D) → (B, T, D)."""
        config = self.config
        if state is None:
            state = self.new_state(config, x.shape[0], 0, x.dtype, x.device)
        z, alpha, beta = self.z(x), self.alpha(x), torch.sigmoid(self.beta(x)) * (2 if config.reflects else 1)
        x, before = aligned(self.qkv(x).transpose(1, 2), state.conv, ctx.real)          # (B, 2GN + HP, T)
        positions = None if ctx.regular else ctx.positions
        x, state.conv = self.conv1d(x, before, positions).transpose(1, 2), window(x, before, ctx.real)
        q, k, v = x.split(self.widths, -1)
        q, k = (each.unflatten(-1, (config.key_heads, config.key_dim)) for each in (q, k))     # (B, T, G, N)
        v, z = (each.unflatten(-1, (config.heads, config.head_dim)) for each in (v, z))        # (B, T, H, P)
        log_alpha = -torch.exp(self.A_log.float()) * F.softplus(alpha.float() + self.dt_bias.float())
        if ctx.real is not None:                                                      # padding leaves the state
            log_alpha, beta = log_alpha * ctx.real[..., None], beta * ctx.real[..., None]
        q, k = unit(q) * config.key_dim**-0.5, unit(k)
        o, state.state = delta_rule(q, k, v, log_alpha, beta, state.state, ctx.begins)
        y = (self.norm(o) * F.silu(z.float())).to(x.dtype)
        return self.out_proj(y.flatten(-2))

    @staticmethod
    def new_state(config: GatedDeltaNetConfig, batch: int, length: int, dtype: torch.dtype,
                  device: torch.device) -> ScanState:
        H, G, P, N = config.heads, config.key_heads, config.head_dim, config.key_dim
        return ScanState(batch, 2 * G * N + H * P, config.conv, (H, P, N), dtype, device)

    @staticmethod
    def multiply_adds(config: GatedDeltaNetConfig, dim: int, context: int) -> int:
        H, G, P, N = config.heads, config.key_heads, config.head_dim, config.key_dim
        # of the recurrence, for each number of the state: α·S, S·k, + u·k, S·q: 7 operations
        return dim * (2 * G * N + 3 * H * P + 2 * H) + (2 * G * N + H * P) * config.conv + H * P * (7 * N + 1) // 2
