"""Attention whose queries and keys see a little of the past before they look at it: localised filtering. Yuan 2.0.

    x ─┬──────────────────────────────────────── v ─┐
       └─┬─ first ── second ─ + ─ norm ──┬── q ─────┴─ attention ── o
         └────────────────────┘          └── k ─────┘

    first, second:  y_t = W₀ x_{t−1} + W₁ x_t + b        localised filtering: Wu et al. 2023 (arXiv 2311.15786)

Two neighbouring tokens depend on each other more than two that are far apart, and attention has to learn that. Here q
and k are made from a mixture of three tokens, t − 2 … t, from the start; v is made from token t alone. Before the first
token of a document the input of either filter is 0: of `second` too, whose input would otherwise be b.

Shapes: B batch, T tokens, D model width, C width between the filters. A filter is stored as (out, in, 2, 1), the
weights of a convolution over a picture one column wide; it mixes all channels, so here it is one product with two
tokens side by side.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanollm.config import FilteredAttention as FilteredAttentionConfig
from nanollm.init import normal, zero
from nanollm.layers.attention import Attention
from nanollm.layers.forward_context import ForwardContext
from nanollm.layers.norm import build_norm
from nanollm.layers.state import KVCache


def one_before(x: Tensor, before: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
    """x (B, T, C) behind `before` (B, 1, C) → for each token the one before it (B, T, C), and the last (B, 1, C).

    real (B, T): False is padding, which is passed over.
    """
    x = torch.cat([before, x], 1)
    if real is not None:                                            # in the place of padding, the last token before it
        places = real * torch.arange(1, x.shape[1], device=x.device)
        places = F.pad(places, (1, 0)).cummax(1).values
        x = x.gather(1, places[..., None].expand_as(x))
    return x[:, :-1], x[:, -1:]


class FilteredKVCache(KVCache):
    """As KVCache, and the last token that each of two filters read, [(B, 1, channels), …]; None at the beginning."""
    tokens: list[Tensor] | None = None


def two_taps(value: Tensor, stream: torch.Generator, depth: int) -> Tensor:
    """N(0, 1/2in): the variance of what goes through is kept."""
    return normal(value[0].numel() ** -0.5)(value, stream, depth)


class PairFilter(nn.Module):
    """Mixes each token with the one before it: the second equation at the head of the file."""
    INIT = {"weight": two_taps, "bias": zero}

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, 2, 1))
        self.bias = nn.Parameter(torch.empty(outputs))

    def forward(self, x: Tensor, before: Tensor, ctx: ForwardContext) -> tuple[Tensor, Tensor]:
        """x (B, T, in), and the token before it (B, 1, in) → y (B, T, out), and the last token, for the next call."""
        past, last = one_before(x, before, ctx.real)
        if not ctx.regular:
            past = past * (ctx.positions > 0)[..., None]            # nothing before the first token of a document
        both = self.weight.squeeze(-1).transpose(1, 2).flatten(1)                       # (out, 2·in): W₀ beside W₁
        return F.linear(torch.cat([past, x], -1), both, self.bias), last


class FilteredAttention(Attention):
    """The mixer drawn at the head of the file."""
    WORDS = {"norm": "{} after the filters"}

    def __init__(self, config: FilteredAttentionConfig, dim: int) -> None:
        super().__init__(config.attention, dim)
        self.first = PairFilter(dim, config.hidden)
        self.second = PairFilter(config.hidden, dim)
        self.norm = build_norm(config.norm, dim)

    def forward(  # type: ignore[override]  # a mixer is called with the state that its own new_state makes
        self, x: Tensor, ctx: ForwardContext, state: FilteredKVCache | None = None
    ) -> Tensor:
        """x (B, T, D) → (B, T, D)."""
        before = state.tokens if state is not None else None
        if before is None:                                                              # the beginning: zeros
            before = [x.new_zeros(len(x), 1, part.weight.shape[1]) for part in (self.first, self.second)]
        y, first = self.first(x, before[0], ctx)
        y, second = self.second(y, before[1], ctx)
        if state is not None:
            state.tokens = [first, second]
        return super().forward(torch.cat([self.norm(y + x), x], -1), ctx, state)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, 2D): the source of q and k beside the source of v → q (B, H, T, d), k and v (B, K, T, d)."""
        filtered, x = x.chunk(2, -1)
        parts = self.q(filtered), self.k(filtered), self.v(x)
        q, k, v = (z.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2) for z in parts)
        return q, k, v

    @staticmethod
    def new_state(  # type: ignore[override]  # of its own config
        config: FilteredAttentionConfig, batch: int, length: int, dtype: torch.dtype, device: torch.device
    ) -> FilteredKVCache:
        inner = config.attention
        return FilteredKVCache(batch, inner.kv_heads, length, (inner.head_dim, inner.head_dim), dtype, device)

    @staticmethod
    def multiply_adds(  # type: ignore[override]  # of its own config
        config: FilteredAttentionConfig, dim: int, context: int
    ) -> int:
        filters = 2 * (2 * dim * config.hidden)                                         # two of two taps
        return Attention.multiply_adds(config.attention, dim, context) + filters
