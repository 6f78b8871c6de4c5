"""RWKV-4: an average of all values so far, weighted less with distance, and a feed-forward that looks one token back.

    x ─┬─ norm ── time mixing ──── + ─┬─ norm ── channel mixing ──── + ─→      Peng et al. 2023 (arXiv 2305.13048),
       └───────────────────────────┘  └──────────────────────────────┘         §3.1, Figure 2

    z_t = μ ⊙ x_t + (1 − μ) ⊙ x_{t−1}        token shift, with a μ for each z_r, z_k, z_v; x is 0 before a document

    time        r, k, v = W_r z_r, W_k z_k, W_v z_v
                wkv_t = ( Σ_{i<t} e^{−(t−1−i)w + k_i} v_i + e^{u + k_t} v_t ) / (the same sums without v)
                w = e^decay, u = first
                o_t = W_o (σ(r_t) ⊙ wkv_t)
    channel     o_t = σ(W_r z_r) ⊙ W_v max(W_k z_k, 0)²

The channel mixing has a past, so it is no feed-forward of a Block: both halves are here; a layer of RWKV has no ffn.

A sum of exponentials is kept as (a, b, m): numerator a·e^m and denominator b·e^m, m the largest exponent so far
(appendix D). Two such sums are added by `merged`, which never takes the exponential of a number above 0. All of it is
float32.

Shapes: B batch, T tokens, D width, F width of the channel mixing.
    k, v, wkv (B, T, D)   w, u (D,)   a, b, m (B, D); a state (B, 3, D)

Two forms with one meaning, as in scan.py: the recurrence, and chunks that run side by side from empty sums, are merged
one after the other, and run again from the sums before them.
"""

import math

import torch
from torch import Tensor, nn

from nanollm.config import RWKV as RWKVConfig
from nanollm.config.checks import need
from nanollm.init import Draw, constant, residual
from nanollm.layers.forward_context import ForwardContext
from nanollm.layers.linear import Linear
from nanollm.layers.mamba import aligned, window
from nanollm.layers.norm import build_norm
from nanollm.layers.state import ScanState

CHUNKED_FROM = 32       # tokens on, steps side by side take less time than steps one after the other
NOTHING = -1e38         # the exponent of an empty sum: it weighs 0 next to any other; unlike −∞, less itself it is 0
Sums = tuple[Tensor, Tensor, Tensor]


def merged(one: Sums, other: Sums) -> Sums:
    """The sum of two sums."""
    m = torch.maximum(one[2], other[2])
    p, q = torch.exp(one[2] - m), torch.exp(other[2] - m)
    return p * one[0] + q * other[0], p * one[1] + q * other[1], m


def wkv_sequential(k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor,
                   begins: Tensor | None = None, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The recurrence, token by token.

    begins (B, T) bool: forget the state before this token; real (B, T) bool: False leaves it as it is.
    """
    a, b, m = state.unbind(1)
    m = m.masked_fill(b == 0, NOTHING)                                          # an empty cache is all zeros
    outputs = []
    for t in range(k.shape[1]):
        if begins is not None:
            m = m.masked_fill(begins[:, t, None], NOTHING)
        token = v[:, t], torch.ones_like(b), k[:, t]
        numerator, denominator, _ = merged((a, b, m), (*token[:2], u + k[:, t]))
        outputs.append(numerator / denominator)
        after = merged((a, b, m - w), token)
        if real is None:
            a, b, m = after
        else:
            a, b, m = (torch.where(real[:, t, None], new, old) for new, old in zip(after, (a, b, m), strict=True))
    return torch.stack(outputs, 1), torch.stack([a, b, m], 1)


def wkv_chunked(k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor,
                begins: Tensor | None = None, real: Tensor | None = None, chunk: int = 16) -> tuple[Tensor, Tensor]:
    """The same, chunk by chunk: c chunks of Q tokens."""
    batch, length, D = k.shape
    pad = -length % chunk
    begins = torch.zeros_like(k[..., 0], dtype=torch.bool) if begins is None else begins
    real = torch.ones_like(k[..., 0], dtype=torch.bool) if real is None else real

    def cut(z: Tensor) -> Tensor:                                               # (B, T, …) → (B·c, Q, …)
        return torch.cat([z, z.new_zeros(batch, pad, *z.shape[2:])], 1).reshape(-1, chunk, *z.shape[2:])

    ks, vs, starts, reals = cut(k), cut(v), cut(begins), cut(real)
    _, own = wkv_sequential(ks, vs, w, u, k.new_zeros(len(ks), 3, D), starts, reals)        # each chunk's own tokens
    own, tokens, fresh = (z.unflatten(0, (batch, -1)) for z in (own, reals.sum(1), starts.any(1)))      # (B, c, …)
    before = []
    for c in range(own.shape[1]):
        before.append(state)
        a, b, m = state.unbind(1)
        m = m.masked_fill(b == 0, NOTHING) - tokens[:, c, None] * w
        m = m.masked_fill(fresh[:, c, None], NOTHING)
        state = torch.stack(merged((a, b, m), own[:, c].unbind(1)), 1)
    y, _ = wkv_sequential(ks, vs, w, u, torch.stack(before, 1).flatten(0, 1), starts, reals)
    return y.unflatten(0, (batch, -1)).flatten(1, 2)[:, :length], state


def shifted(x: Tensor, before: Tensor, ctx: ForwardContext) -> tuple[Tensor, Tensor]:
    """x_{t−1} for x (B, T, D), 0 where a document begins; and the last x (B, D, 1). before (B, D, 1) precedes x."""
    x, before = aligned(x.transpose(1, 2), before, ctx.real)
    past = torch.cat([before, x[..., :-1]], -1).transpose(1, 2)
    return past if ctx.regular else past * (ctx.positions > 0)[..., None], window(x, before, ctx.real)


def mixed(x: Tensor, past: Tensor, mix: Tensor) -> Tensor:
    """z_t."""
    return x * mix + past * (1 - mix)


def over_channels(low: float, high: float) -> Draw:
    """From `low` to `high` over the channels: RWKV-4 as published, less its changes with depth."""
    return lambda value, stream, depth: value.copy_(torch.linspace(low, high, value.shape[-1], device=value.device))


MIXES = {f"mix_{each}": over_channels(0, 1) for each in "rkv"}


class TimeMixing(nn.Module):
    """The average over time."""
    INIT = {**MIXES, "decay": over_channels(-5, 3), "first": constant(math.log(0.3)), "o.weight": residual}

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mix_r, self.mix_k, self.mix_v = (nn.Parameter(torch.empty(1, 1, dim)) for _ in range(3))
        self.receptance, self.key, self.value, self.o = (Linear(dim, dim, bias=False) for _ in range(4))
        self.decay = nn.Parameter(torch.empty(dim))
        self.first = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor, past: Tensor, ctx: ForwardContext, state: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, D), and the state after it."""
        r = self.receptance(mixed(x, past, self.mix_r))
        k = self.key(mixed(x, past, self.mix_k))
        v = self.value(mixed(x, past, self.mix_v))
        wkv = wkv_chunked if x.shape[1] >= CHUNKED_FROM else wkv_sequential
        w, u = torch.exp(self.decay.float()), self.first.float()
        y, state = wkv(k.float(), v.float(), w, u, state, ctx.begins, ctx.real)
        return self.o(torch.sigmoid(r) * y.to(x.dtype)), state


class ChannelMixing(nn.Module):
    """The feed-forward; up and down are the paper's W_k and W_v."""
    INIT = {**MIXES, "down.weight": residual}

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.mix_r, self.mix_k = (nn.Parameter(torch.empty(1, 1, dim)) for _ in range(2))
        self.receptance = Linear(dim, dim, bias=False)
        self.up = Linear(dim, hidden, bias=False)
        self.down = Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor, past: Tensor) -> Tensor:                       # (B, T, D) each → (B, T, D)
        hidden = torch.relu(self.up(mixed(x, past, self.mix_k))).square()
        return torch.sigmoid(self.receptance(mixed(x, past, self.mix_r))) * self.down(hidden)


class RWKV(nn.Module):
    """Both halves. The block adds x, so what comes back is time mixing and channel mixing together."""

    def __init__(self, config: RWKVConfig, dim: int) -> None:
        super().__init__()
        need(config.width == dim, config, "width", f"that of the residual stream ({dim})")
        self.config = config
        self.time_norm, self.channel_norm = (build_norm(config.norm, dim) for _ in range(2))
        self.time, self.channel = TimeMixing(dim), ChannelMixing(dim, config.hidden)

    def forward(self, x: Tensor, ctx: ForwardContext, state: ScanState | None = None) -> Tensor:
        """x (B, T, D) → (B, T, D)."""
        if state is None:
            state = self.new_state(self.config, x.shape[0], 0, x.dtype, x.device)
        last = state.conv.chunk(2, 1)                                           # what either half read last, (B, D, 1)
        h = self.time_norm(x)
        past, last_h = shifted(h, last[0], ctx)
        time, state.state = self.time(h, past, ctx, state.state)
        g = self.channel_norm(x + time)
        past, last_g = shifted(g, last[1], ctx)
        state.conv = torch.cat([last_h, last_g], 1)
        return time + self.channel(g, past)

    @staticmethod
    def new_state(config: RWKVConfig, batch: int, length: int, dtype: torch.dtype, device: torch.device) -> ScanState:
        D = config.width
        return ScanState(batch, 2 * D, 2, (3, D), dtype, device)  # the last input of two token shifts

    @staticmethod
    def multiply_adds(config: RWKVConfig, dim: int, context: int) -> int:
        # five token shifts, m·x + (1 − m)·y; two sums of two numbers, twice p·a + q·b; their four exponentials, the
        # quotient, times σ(r)
        return dim * (5 * dim + 2 * config.hidden) + dim * (5 * 2 + 2 * 4 + 3)
