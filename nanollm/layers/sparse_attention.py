"""Sparse latent attention: a small, cheap attention ranks all keys, and the real one reads only the first k of them.

DeepSeek-V3.2 (arXiv 2512.02556) §2.1, with its symbols; c^Q_t is that of latent_attention.py:

    q_t,j = rope(W^IQ c^Q_t)    k_s = rope(norm(W^IK h_s))    w_t = W^w h_t         J heads of queries, one of keys
    I_t,s = Σ_j w_t,j · ReLU(q_t,j · k_s) / √(J i)                                  (1)     the index
    S_t   = the k largest of I_t,s, s ≤ t
    u_t   = latent attention of h_t over the keys s ∈ S_t                           (2)

    k = 3       I_t   .2  1.4  −.3   .9   0   .5        the query reads keys 1, 3 and 5
                           ▲         ▲        ▲

Of up to k keys a query reads all, and nothing is ranked: this is plain latent attention then. Of each head of q and k
the first r channels turn. norm is a LayerNorm, ε 1e-6.

Sharing. A layer without an indexer reads the keys that the nearest layer before it with one chose, for the same queries
(GLM-5.2: three layers of four; arXiv 2603.12201).

The published kernels rank in 8 bits, after a Hadamard rotation that leaves the products as they are; here the index is
float32. It has no gradient: V3.2 trains it by a loss of its own (§2.1.1), which this does not have. The keys that are
not read are masked, which saves no work. Of equal scores torch.topk takes which it likes; few heads have many of 0.

Cache. k_s beside the latent, i numbers a token and layer: 128 beside 576 in V3.2.

Shapes: B batch, T queries, S keys, D model width, J heads of the index, i its width, r channels that turn.
"""

import dataclasses

import torch
from torch import Tensor, nn

from nanollm.config import Norm
from nanollm.config import SparseLatentAttention as SparseLatentAttentionConfig
from nanollm.layers.forward_context import ForwardContext
from nanollm.layers.latent_attention import LatentAttention
from nanollm.layers.linear import Linear
from nanollm.layers.mask import AttentionMask
from nanollm.layers.norm import build_norm
from nanollm.layers.rope import rotate
from nanollm.layers.state import KVCache

CHOSEN = ("chosen keys",)  # what layers of one forward pass hand on, in ForwardContext.memo


class ChosenKeys(AttentionMask):
    """A mask that is no run of keys."""
    first = last = slopes = None  # type: ignore[assignment]  # properties of a mask that is worked out when it is asked

    def __init__(self, chosen: Tensor) -> None:
        self.chosen = chosen

    @property
    def dense(self) -> Tensor:
        """bool (B, 1, T, S)."""
        return self.chosen


class Index(nn.Module):
    """The index I of the head of the file, and the keys that it chooses."""

    def __init__(self, config: SparseLatentAttentionConfig, dim: int) -> None:
        super().__init__()
        indexer = config.indexer
        assert indexer is not None and config.q_rank is not None, "what the config demands"
        self.heads, self.width, self.turned, self.top = indexer.heads, indexer.head_dim, config.rope_dim, indexer.top
        self.rope = dataclasses.replace(config.rope, layout=indexer.layout)
        self.q = Linear(config.q_rank, self.heads * self.width, bias=False)
        self.k = Linear(dim, self.width, bias=False)
        self.norm = build_norm(Norm("layer", 1e-6, bias=True), self.width)
        self.weights = Linear(dim, self.heads, bias=False)

    def rotated(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        """x (B, heads, T, i), whose first r channels turn."""
        return rotate(x, *ctx.rotation(self.rope, self.turned), self.rope.layout)

    @torch.no_grad()
    def keys(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        """x (B, T, D) → k (B, 1, T, i)."""
        return self.rotated(self.norm(self.k(x))[:, None], ctx)

    @torch.no_grad()
    def choose(
        self, x: Tensor, source: Tensor, keys: Tensor, mask: AttentionMask, ctx: ForwardContext
    ) -> Tensor | None:
        """x (B, T, D), c^Q (B, T, q_rank), k (B, 1, S, i) → bool (B, 1, T, S); None where all keys are chosen."""
        T, S, seen = x.shape[1], keys.shape[2], mask.dense
        if S <= self.top:
            return None
        if not isinstance(seen, Tensor):                        # causal, or one token that sees everything
            seen = torch.ones(1, 1, T, S, dtype=torch.bool, device=x.device).tril(S - T)
        q = self.rotated(self.q(source).unflatten(-1, (self.heads, -1)).transpose(1, 2), ctx).float()   # (B, J, T, i)
        weights = self.weights(x).float() * (self.heads * self.width) ** -0.5                           # (B, T, J)
        turned = keys[:, 0].float().transpose(1, 2)                                                     # (B, i, S)
        index = torch.zeros(len(x), T, S, device=x.device)
        for j in range(self.heads):                             # one after the other: (B, J, T, S) would be J times it
            index += weights[..., j, None] * (q[:, j] @ turned).relu()
        best = index.masked_fill(~seen[:, 0], -torch.inf).topk(self.top, -1).indices
        return torch.zeros_like(index, dtype=torch.bool).scatter(-1, best, True)[:, None] & seen


class SparseLatentAttention(LatentAttention):
    """The mixer at the head of the file."""
    WORDS = {**LatentAttention.WORDS, "indexer": "ranked by {}"}
    HANDS_ON = True                     # layers speak to each other in the context: none can be traced alone

    def __init__(self, config: SparseLatentAttentionConfig, dim: int) -> None:
        super().__init__(config, dim)
        self.index = None if config.indexer is None else Index(config, dim)

    def beside(self, x: Tensor, ctx: ForwardContext) -> Tensor:
        """x (B, T, D) → the keys of the index (B, 1, T, i)."""
        return super().beside(x, ctx) if self.index is None else self.index.keys(x, ctx)

    def seen(
        self, mask: AttentionMask, x: Tensor, source: Tensor, beside: Tensor, ctx: ForwardContext
    ) -> AttentionMask:
        """The keys that the index ranks first, here or in a layer before; all, where it ranked none."""
        if self.index is not None:
            ctx.memo[CHOSEN] = self.index.choose(x, source, beside, mask, ctx)
        chosen = ctx.memo.get(CHOSEN)
        return ChosenKeys(chosen) if isinstance(chosen, Tensor) else mask

    @staticmethod
    def new_state(  # type: ignore[override]  # of its own config
        config: SparseLatentAttentionConfig, batch: int, length: int, dtype: torch.dtype, device: torch.device
    ) -> KVCache:
        width = config.indexer.head_dim if config.indexer else 0
        return KVCache(batch, 1, length, (config.kv_rank + config.rope_dim, width), dtype, device)

    @staticmethod
    def multiply_adds(  # type: ignore[override]  # of its own config
        config: SparseLatentAttentionConfig, dim: int, context: int
    ) -> int:
        attention, index = LatentAttention.multiply_adds(config, dim, context), config.indexer
        if index is None or config.q_rank is None:
            return attention
        J, i = index.heads, index.head_dim
        ranked = J * (config.q_rank * i + dim + i * context) if context > index.top else 0
        return attention + dim * i + ranked
