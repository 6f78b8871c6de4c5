"""A transformer block that stands once in the model and is used by many of its layers, each before a scan of its own.

    x ─┬───────────────────────────────────────────────────── + ── norm ── scan ──        all that is added to x
       └─ [x, e] ── norm ── attention ── norm ── MLP ── W ─────┘
                            └─ B A ─┘            └ B A ┘

e is the embedding, what the first layer read: however deep the layer is, attention sees the token itself beside what
has become of it. [x, e] is 2 D wide, and attention reads it whole and gives D. Nothing is added to x inside the block.

A block costs the parameters of one layer and is used in a dozen. What a layer has of its own is W (D, D), and in Zamba2
low-rank matrices B A, as in LoRA, that are added to the block's gate and up, and to its q, k and v.

    Glorioso et al. 2024 (arXiv 2405.16712) §2, eq. 6, Figure 2         Zamba: one block
    Glorioso et al. 2024 (arXiv 2411.15242) §2, Figure 2                Zamba2: two in turn, and B A

Where it stands. `Decoder.shared` has the blocks, so each parameter has one name, shared.0.attention.q.weight; a layer
finds its block in the context of the forward pass (forward_context.py). Keys and values are each layer's own.

Shapes: B batch, T tokens, D model width, H query heads, K key/value heads, d head width, F width of the MLP, r rank.
"""

from typing import Any

import torch
from torch import Tensor, nn

from nanollm import config as c
from nanollm.config import ModelConfig
from nanollm.config import SharedBlock as SharedBlockConfig
from nanollm.config import SharedBlockScan as SharedBlockScanConfig
from nanollm.config.shared import shared_blocks
from nanollm.init import zero
from nanollm.layers.attention import Attention
from nanollm.layers.forward_context import ForwardContext
from nanollm.layers.linear import Linear
from nanollm.layers.mamba2 import Mamba2
from nanollm.layers.mlp import MLP, gated
from nanollm.layers.multi_head_mamba import MultiHeadMamba
from nanollm.layers.norm import build_norm
from nanollm.layers.per_layer import build_per_layer
from nanollm.layers.state import KVCache, ParallelState


def scan_of(config: c.Mamba2 | c.MultiHeadMamba) -> Any:
    """The class of a scan."""
    return Mamba2 if isinstance(config, c.Mamba2) else MultiHeadMamba


class Adapter(nn.Module):
    """B A x, which begins as 0."""
    INIT = {"up.weight": zero}

    def __init__(self, inputs: int, rank: int, outputs: int) -> None:
        super().__init__()
        self.down = Linear(inputs, rank, bias=False)                            # A
        self.up = Linear(rank, outputs, bias=False)                             # B

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))


def added(y: Tensor, own: nn.Module | None, x: Tensor) -> Tensor:
    """y, what the block makes of x, and what a layer adds to it."""
    return y if own is None else y + own(x)


class WideAttention(Attention):
    """Attention that reads 2 D numbers a token, and gives D."""

    def __init__(self, config: SharedBlockConfig, dim: int) -> None:
        inner = config.attention
        super().__init__(inner, 2 * dim)
        self.o = Linear(inner.heads * inner.head_dim, dim, inner.out_bias)

    def forward(  # type: ignore[override]  # with what the layer adds
        self, x: Tensor, ctx: ForwardContext, state: KVCache | None, to_q: nn.Module | None, to_k: nn.Module | None,
        to_v: nn.Module | None,
    ) -> Tensor:
        """x (B, T, 2 D) → (B, T, D). to_q, to_k, to_v: what the layer adds."""
        q, k, v = added(self.q(x), to_q, x), added(self.k(x), to_k, x), added(self.v(x), to_v, x)
        q, k, v = (z.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2) for z in (q, k, v))
        return self.o(self.mixed(q, k, v, ctx, state))


class SharedBlock(nn.Module):
    """The block drawn at the head of the file, up to W."""

    def __init__(self, config: SharedBlockConfig, dim: int) -> None:
        super().__init__()
        self.norm = build_norm(config.norm, 2 * dim)
        self.attention = WideAttention(config, dim)
        self.mlp_norm = build_norm(config.norm, dim)
        self.mlp = MLP(config.mlp, dim)

    def forward(self, x: Tensor, embedded: Tensor, ctx: ForwardContext, state: KVCache | None,
                to_q: nn.Module | None, to_k: nn.Module | None, to_v: nn.Module | None,
                to_mlp: nn.Module | None) -> Tensor:
        """x and e (B, T, D) → (B, T, D). to_q, to_k, to_v, to_mlp: what the layer adds."""
        h = self.attention(self.norm(torch.cat([x, embedded], -1)), ctx, state, to_q, to_k, to_v)
        h = self.mlp_norm(h)
        gate, up = self.mlp.gate(h), self.mlp.up(h)  # type: ignore[misc]  # the config demands a gate
        if to_mlp is not None:
            to_gate, to_up = to_mlp(h).chunk(2, -1)
            gate, up = gate + to_gate, up + to_up
        return self.mlp.down(gated(gate, up, self.mlp.config.activation))


class SharedBlockScan(nn.Module):
    """What a layer has of its own: W, the norm and the scan. And an Adapter, where it adds to what the block has."""
    WORDS = {
        "block": "it reads the stream and what a block says, which several layers share: {}",
        "mlp_rank": "of rank {}, what this layer adds to the block's gate and up",
        "qkv_rank": "of rank {}, what this layer adds to the block's q, k and v",
    }
    HANDS_ON = True                     # it reads what is no part of the layer: it cannot be traced alone

    def __init__(self, config: SharedBlockScanConfig, dim: int) -> None:
        super().__init__()
        self.config = config
        self.number = str(config.block.number)                                  # of its block in Decoder.shared
        inner, rank = config.block.attention, config.qkv_rank
        widths = [heads * inner.head_dim for heads in (inner.heads, inner.kv_heads, inner.kv_heads)]
        self.to_q, self.to_k, self.to_v = (Adapter(2 * dim, rank, width) if rank else None for width in widths)
        self.to_mlp = Adapter(dim, config.mlp_rank, 2 * config.block.mlp.hidden) if config.mlp_rank else None
        self.linear = Linear(dim, dim, bias=False)                              # W
        self.pre_scan = build_norm(config.pre_scan, dim)
        self.scan = scan_of(config.scan)(config.scan, dim)

    def forward(self, x: Tensor, ctx: ForwardContext, state: ParallelState | None = None) -> Tensor:
        """x (B, T, D), the stream itself → (B, T, D)."""
        assert ctx.shared is not None, "a layer with a shared block stands in a Decoder"
        said = ctx.shared[self.number](x, ctx.embedding, ctx, state, self.to_q, self.to_k, self.to_v, self.to_mlp)
        return self.scan(self.pre_scan(x + self.linear(said)), ctx, state)

    @staticmethod
    def new_state(config: SharedBlockScanConfig, batch: int, length: int, dtype: torch.dtype,
                  device: torch.device) -> ParallelState:
        keys = Attention.new_state(config.block.attention, batch, length, dtype, device)
        return ParallelState(keys, scan_of(config.scan).new_state(config.scan, batch, length, dtype, device))

    @staticmethod
    def multiply_adds(config: SharedBlockScanConfig, dim: int, context: int) -> int:
        inner, F = config.block.attention, config.block.mlp.hidden
        H, K, d = inner.heads, inner.kv_heads, inner.head_dim
        attention = Attention.multiply_adds(inner, 2 * dim, context) - dim * H * d      # o gives D, not 2 D
        adapters = (config.qkv_rank or 0) * (3 * 2 * dim + (H + 2 * K) * d) + (config.mlp_rank or 0) * (dim + 2 * F)
        own = dim * dim + adapters + scan_of(config.scan).multiply_adds(config.scan, dim, context)
        return attention + MLP.multiply_adds(config.block.mlp, dim) + own


def build_shared(config: ModelConfig, layers: nn.ModuleList) -> nn.ModuleDict:
    """The blocks that layers share, by their numbers, and as "per_layer" what makes a vector for each layer."""
    blocks = shared_blocks([layer.mixer for layer in config.layers])
    found: dict[str, nn.Module] = {str(i): SharedBlock(block, config.dim) for i, block in sorted(blocks.items())}
    per_layer = build_per_layer(config, layers)
    return nn.ModuleDict(found if per_layer is None else {**found, "per_layer": per_layer})
