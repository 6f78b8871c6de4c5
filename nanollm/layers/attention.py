"""Attention: each token asks (q), every token it may see offers (k), and what is offered is mixed (v).

    Attention(Q, K, V) = softmax(scale · Q Kᵀ + mask) V                 Vaswani et al. 2017 (arXiv 1706.03762), eq. 1

H query heads share K key/value heads (Ainslie et al. 2023, arXiv 2305.13245). Head h reads key/value head h // (H/K):

    H = 8, K = 2      q  0 1 2 3   4 5 6 7          K = H is multi-head attention, K = 1 is multi-query.
                         └─┴┬┴─┘   └─┴┬┴─┘          Neighbours share: repeat_interleave, not repeat.
                      kv    0         1

Shapes: B batch, T queries, S keys, D model width, H query heads, K key/value heads, G = H/K, d head width.
Which keys a query sees: mask.py. Rotation: rope.py. Remembered keys: state.py.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanollm.config import Attention as AttentionConfig
from nanollm.init import residual, zero
from nanollm.layers.forward_context import ForwardContext
from nanollm.layers.linear import Linear
from nanollm.layers.mask import CAUSAL, AttentionMask
from nanollm.layers.norm import build_head_norm, normed
from nanollm.layers.rope import rotate
from nanollm.layers.state import KVCache, SlotMapping
from nanollm.ops import accelerated


@accelerated
def attend(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, scale: float, softcap: float | None = None) -> Tensor:
    """q (B, H, T, d), k and v (B, K, S, d), and what of the keys each query sees → (B, H, T, d)."""
    if softcap is None:
        return attend_fused(q, k, v, mask.dense, scale)
    return attend_plainly(q, k, v, mask.dense, scale, softcap)


def attend_plainly(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | str | None, scale: float,
                   softcap: float | None = None, sinks: Tensor | None = None) -> Tensor:
    """The equation, step by step; the softmax in float32. mask: as `AttentionMask.dense` says.

    sinks (H,): one more score a head, of a key that no token has and whose value is 0, so that a head can attend to
    nothing (Xiao et al. 2023, arXiv 2309.17453, §3.3; learned in gpt-oss)."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(-2, -1) * scale                                    # (B, H, T, S)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)                         # Gemma-2, arXiv 2408.00118 §2
    if mask is CAUSAL:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if isinstance(mask, Tensor):
        least = torch.finfo(scores.dtype).min            # not −∞: a query that sees nothing (padding) would become NaN
        scores = scores.masked_fill(~mask, least) if mask.dtype == torch.bool else (scores + mask).clamp(min=least)
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(*scores.shape[:3], 1)], -1)
    return scores.softmax(-1, dtype=torch.float32)[..., : v.shape[-2]].to(q.dtype) @ v


def attend_fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | str | None, scale: float) -> Tensor:
    """Attention through PyTorch's fused operation, which never holds the (T, S) scores. No soft cap."""
    B, H, T, d = q.shape
    given = mask if isinstance(mask, Tensor) else None
    if T == 1 and H != k.shape[1]:
        # One token: the G query heads that share a key head stand side by side as its "queries", so keys are read once.
        folded = q.view(B, k.shape[1], -1, d)                                   # (B, K, G, d)
        if given is not None and given.shape[1] == H:
            given = given.view(len(given), k.shape[1], -1, given.shape[-1])
        return F.scaled_dot_product_attention(folded, k, v, attn_mask=given, scale=scale).view(B, H, T, -1)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=given, is_causal=mask is CAUSAL, scale=scale, enable_gqa=H != k.shape[1])


class Attention(nn.Module):
    """The projections around `attend`, with norm and rotation of q and k where the config has them."""
    INIT = {"o.weight": residual, "sinks": zero}
    WORDS = {
        "window": "a query sees {} keys, itself included",
        "qkv_bias": "biases on q, k and v",
        "out_bias": "a bias on o",
        "scale": "scores times {}, not 1/√d",
        "softcap": "scores become {0}·tanh(score / {0})",
        "alibi": "a penalty linear in distance (ALiBi)",
        "clip": "q, k and v cut off at ±{}",
        "sinks": "a learned score a head that takes its share of the softmax and adds nothing",
        "growth": "queries grow far into a sequence: {}",
    }

    def __init__(self, config: AttentionConfig, dim: int) -> None:
        super().__init__()
        self.config = config
        H, K, d = config.heads, config.kv_heads, config.head_dim
        self.q = Linear(dim, H * d, config.qkv_bias)
        self.k = Linear(dim, K * d, config.qkv_bias)
        self.v = Linear(dim, K * d, config.qkv_bias)
        self.o = Linear(H * d, dim, config.out_bias)
        self.q_norm = build_head_norm(config.qk_norm, H, d)
        self.k_norm = build_head_norm(config.qk_norm, K, d)
        self.sinks = nn.Parameter(torch.empty(H)) if config.sinks else None
        self.scale = d**-0.5 if config.scale is None else config.scale

    def forward(self, x: Tensor, ctx: ForwardContext, state: KVCache | None = None) -> Tensor:
        """x (B, T, D) → (B, T, D)."""
        q, k, v = self.project(x)
        return self.o(self.mixed(q, k, v, ctx, state))

    def mixed(self, q: Tensor, k: Tensor, v: Tensor, ctx: ForwardContext, state: KVCache | None) -> Tensor:
        """q (B, H, T, d), k and v (B, K, T, d) → what the heads have read, side by side (B, T, H·d)."""
        q, k, v = self.placed(q, k, v, ctx)
        slots = None
        if state is not None:
            slots = ctx.slots(state)
            k, v = state.extend(k, v, slots)
        mask = self.mask(ctx, slots)
        if self.sinks is None:
            mixed = attend(q, k, v, mask, self.scale, self.config.softcap)
        else:
            mixed = attend_plainly(q, k, v, mask.dense, self.scale, sinks=self.sinks)
        return mixed.transpose(1, 2).flatten(-2)

    def mask(self, ctx: ForwardContext, slots: SlotMapping | None) -> AttentionMask:
        """Which keys each query sees."""
        return AttentionMask(ctx, slots, self.config.window, self.config.alibi, self.config.heads, self.scale)

    def placed(self, q: Tensor, k: Tensor, v: Tensor, ctx: ForwardContext) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, H, T, d), k and v (B, K, T, d), as `project` gives them → the same, rotated to their positions."""
        config = self.config
        if config.rope is not None:
            cos, sin = ctx.rotation(config.rope, config.head_dim)
            q, k = rotate(q, cos, sin, config.rope.layout), rotate(k, cos, sin, config.rope.layout)
        if config.qk_norm is not None and config.qk_norm.scope == "rotated":
            q, k = normed(self.q_norm, q), normed(self.k_norm, k)
        if config.growth is not None:
            q = (q * ctx.query_growth(config.growth)).to(q.dtype)
        return q, k, v

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, D) → q (B, H, T, d), k and v (B, K, T, d), normalised."""
        config = self.config
        q, k, v = self.q(x), self.k(x), self.v(x)                                       # (B, T, H·d or K·d)
        scope = "head" if config.qk_norm is None else config.qk_norm.scope
        if scope == "all":                                                              # over all heads at once
            q, k = normed(self.q_norm, q), normed(self.k_norm, k)
        if config.clip is not None:
            q, k, v = (z.clamp(-config.clip, config.clip) for z in (q, k, v))
        q, k, v = (z.unflatten(-1, (-1, config.head_dim)) for z in (q, k, v))           # (B, T, H or K, d)
        if scope in ("head", "each"):
            q, k = normed(self.q_norm, q), normed(self.k_norm, k)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    @staticmethod
    def new_state(config: AttentionConfig, batch: int, length: int, dtype: torch.dtype,
                  device: torch.device) -> KVCache:
        slots, widths = min(length, config.window or length), (config.head_dim, config.head_dim)
        return KVCache(batch, config.kv_heads, slots, widths, dtype, device, ring=slots < length)

    @staticmethod
    def multiply_adds(config: AttentionConfig, dim: int, context: int) -> int:
        H, K, d, seen = config.heads, config.kv_heads, config.head_dim, min(context, config.window or context)
        return 2 * dim * d * (H + K) + 2 * H * d * seen
