"""Multi-head latent attention: keys and values of all heads are made from one short vector a token, which is cached.

DeepSeek-V2 (arXiv 2405.04434) §2.1, eq. 9-19, with its symbols; the two norms are from its §3.1.2:

    c^KV = norm(W^DKV h)                                (9)       one vector of `kv_rank` numbers, 512
    k^R  = rope(W^KR h)                                (15)       one rotated part for all heads, 64 numbers
    k_i  = [W_i^UK c^KV ; k^R]                     (10, 17)       v_i = W_i^UV c^KV   (11)
    c^Q  = norm(W^DQ h)                                (12)       or h itself where q_rank is None (V2-Lite)
    q_i  = [W_i^UQ c^Q ; rope(W_i^QR c^Q)]     (13, 14, 16)
    o_i  = Σ_s softmax_s(scale · q_i · k_i,s) v_i,s    (18)       u = W^O [o_1; …; o_H]   (19)

           ┌─ q_down ─ q_norm ─ q_up ─┬─ nope ──────────┐
           │                          └─ rope ─ rotate ─┴─ q ────────┐
    h ─────┤                                                         ├─ attend ─ o ─→ u
           │           ┌─ kv_norm ─ c^KV ─▣─ kv_up ─┬─ value ───── v ┤
           └─ kv_down ─┤                            └─ nope ──┐      │
                       └─ rotate ── k^R ──▣───────────────────┴─ k ──┘          ▣ what the cache keeps

What is stored together stays together: kv_down has the rows of W^DKV, then W^KR; q_up and kv_up have, head after head,
the rows of W^UQ and W^QR, and of W^UK and W^UV.

Cache. c^KV and k^R, 576 numbers a token and layer for DeepSeek-V3; keys and values in full would be 128·(192 + 128) =
40,960. The price is to make them again, from all of the cache, at every call. For a single new token that is most of
the work, and not needed: W^UK and W^UV move to the other side of the sums,

    q_i · k_i,s = (W_i^UKᵀ q_i^nope) · c_s + q_i^rope · k_s^R             Σ_s p_s W_i^UV c_s = W_i^UV Σ_s p_s c_s

so its H heads are H queries of one head whose key is [c ; k^R] and whose value is c (§2.1.2, "absorbed"). Equal up to
rounding.

Shapes: B batch, T queries, S keys, D model width, H heads, n nope, r rope_dim, v value, c kv_rank.
"""

import torch
from torch import Tensor, nn

from nanollm.config import LatentAttention as LatentAttentionConfig
from nanollm.init import residual
from nanollm.layers.attention import attend, attend_fused
from nanollm.layers.forward_context import ForwardContext
from nanollm.layers.linear import Linear
from nanollm.layers.mask import AttentionMask
from nanollm.layers.norm import build_norm
from nanollm.layers.rope import rotate
from nanollm.layers.state import KVCache


class LatentAttention(nn.Module):
    """The equations and the diagram are at the head of the file."""
    INIT = {"o.weight": residual}
    WORDS = {"scale": "scores times {}", "norm": "its short vectors normalised by {}",
             "growth": "queries grow far into a sequence: {}"}

    def __init__(self, config: LatentAttentionConfig, dim: int) -> None:
        super().__init__()
        self.config = config
        H, n, r, rank = config.heads, config.nope, config.rope_dim, config.q_rank
        self.q = Linear(dim, H * (n + r), bias=False) if rank is None else None
        self.q_down = None if rank is None else Linear(dim, rank, bias=False)
        self.q_norm = None if rank is None else build_norm(config.norm, rank)
        self.q_up = None if rank is None else Linear(rank, H * (n + r), bias=False)
        self.kv_down = Linear(dim, config.kv_rank + r, bias=False)
        self.kv_norm = build_norm(config.norm, config.kv_rank)
        self.kv_up = Linear(config.kv_rank, H * (n + config.value), bias=False)
        self.o = Linear(H * config.value, dim, bias=False)
        self.scale = (n + r) ** -0.5 if config.scale is None else config.scale

    def forward(self, x: Tensor, ctx: ForwardContext, state: KVCache | None = None) -> Tensor:
        """x (B, T, D) → (B, T, D)."""
        config, source = self.config, self.query_source(x)
        q = self.query(source).unflatten(-1, (config.heads, -1)).transpose(1, 2)        # (B, H, T, n + r)
        latent, k_rope = self.kv_down(x).split([config.kv_rank, config.rope_dim], -1)
        latent, k_rope = self.kv_norm(latent)[:, None], k_rope[:, None]                 # one head: (B, 1, T, c or r)
        cos, sin = ctx.rotation(config.rope, config.rope_dim)
        q_nope, q_rope = q.split([config.nope, config.rope_dim], -1)
        q_rope, k_rope = (rotate(part, cos, sin, config.rope.layout) for part in (q_rope, k_rope))
        if config.growth is not None:
            q_nope, q_rope = ((part * ctx.query_growth(config.growth)).to(x.dtype) for part in (q_nope, q_rope))
        slots, known, beside = None, torch.cat([latent, k_rope], -1), self.beside(x, ctx)       # (B, 1, T, c + r)
        if state is not None:
            slots = ctx.slots(state)
            known, beside = state.extend(known, beside, slots)                           # (B, 1, S, c + r)
        latent, k_rope = known.split([config.kv_rank, config.rope_dim], -1)
        mask = self.seen(AttentionMask(ctx, slots), x, source, beside, ctx)
        if x.shape[1] == 1 and isinstance(self.kv_up, Linear):          # a quantised kv_up has no weight to take apart
            mixed = self.absorbed(q_nope, q_rope, known, mask)
        else:
            both = self.kv_up(latent[:, 0]).unflatten(-1, (config.heads, -1)).transpose(1, 2)
            k_nope, v = both.split([config.nope, config.value], -1)                     # (B, H, S, n), (B, H, S, v)
            k = torch.cat([k_nope, k_rope.expand(*k_nope.shape[:-1], -1)], -1)          # (B, H, S, n + r)
            mixed = attend(torch.cat([q_nope, q_rope], -1), k, v, mask, self.scale)
        return self.o(mixed.transpose(1, 2).flatten(-2))

    def query_source(self, x: Tensor) -> Tensor:
        """x (B, T, D) → what queries are made from: c^Q (B, T, q_rank), or x itself."""
        if self.q_down is None:
            return x
        assert self.q_norm is not None, "with q_down"
        return self.q_norm(self.q_down(x))

    def query(self, source: Tensor) -> Tensor:
        """Their source → the queries of all heads, before the rotation (B, T, H·(n + r))."""
        up = self.q_up if self.q is None else self.q
        assert up is not None, "one of the two"
        return up(source)

    def beside(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        """x (B, T, D) → what is remembered beside the latent: nothing here, (B, 1, T, 0)."""
        return x[:, None, :, :0]

    def seen(
        self, mask: AttentionMask, x: Tensor, source: Tensor, beside: Tensor, ctx: ForwardContext
    ) -> AttentionMask:
        """Which keys the queries see, of those that the mask lets them. Here: all."""
        return mask

    def absorbed(self, q_nope: Tensor, q_rope: Tensor, known: Tensor, mask: AttentionMask) -> Tensor:
        """One token: q (B, H, 1, ·) and the cache (B, 1, S, c + r) → (B, H, 1, v), and no key or value is made."""
        config = self.config
        both = self.kv_up.weight.unflatten(0, (config.heads, -1))                       # (H, n + v, c)
        up_k, up_v = both.split([config.nope, config.value], 1)
        q = torch.cat([q_nope @ up_k, q_rope], -1).transpose(1, 2)                      # (B, 1, H, c + r)
        mixed = attend_fused(q, known, known[..., : config.kv_rank], mask.dense, self.scale)
        return mixed.transpose(1, 2) @ up_v.transpose(1, 2)                             # (B, H, 1, c) (H, c, v)

    @staticmethod
    def new_state(config: LatentAttentionConfig, batch: int, length: int, dtype: torch.dtype,
                  device: torch.device) -> KVCache:
        # one head: the latent and the rotated key, side by side as one key
        return KVCache(batch, 1, length, (config.kv_rank + config.rope_dim, 0), dtype, device)

    @staticmethod
    def multiply_adds(config: LatentAttentionConfig, dim: int, context: int) -> int:
        H, n, r, v, c = config.heads, config.nope, config.rope_dim, config.value, config.kv_rank
        query = H * (n + r) * dim if config.q_rank is None else config.q_rank * (dim + H * (n + r))
        # keys and values are made in full, as in training
        return query + dim * (c + r) + c * H * (n + v) + H * v * dim + H * (n + r + v) * context
