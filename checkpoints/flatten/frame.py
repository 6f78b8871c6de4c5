"""What a flattened model has around its layers: a cache, and what the layers of one forward pass share.

The library serves ragged batches, padding and packed documents through explicit positions. A flattened file has plain
rows, each one sequence from its beginning, so these classes stand in for those of nanollm/cache.py, layers/state.py,
layers/forward_context.py and the masks. Their methods have the same names, so the layers fit both. They are specialised
like any other source: without a window there is no ring, without RoPE no rotation.

Shapes: B batch, T new tokens, S keys, K key/value heads, d head width.
"""

from typing import Any

import torch
from torch import Tensor, nn

from nanollm.config import Alibi, Rope
from nanollm.config.scaling import Growth
from nanollm.layers.alibi import alibi_bias
from nanollm.layers.mask import CAUSAL, allowed
from nanollm.layers.rope import rotation_tables
from nanollm.layers.scaling import grown


class KVCache:
    """Keys and values of one attention layer, (B, K, S, d) each: position p lies in slot p."""

    def __init__(self, batch: int, heads: int, size: int, widths: tuple[int, int], dtype: torch.dtype,
                 device: torch.device) -> None:
        self.k, self.v = (torch.zeros(batch, heads, size, d, dtype=dtype, device=device) for d in widths)

    def extend(self, k: Tensor, v: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Store k, v (B, K, T, d) from position `start` on; return all keys and values so far (B, K, S, d)."""
        end = start + k.shape[2]
        self.k[:, :, start:end], self.v[:, :, start:end] = k, v
        return self.k[:, :, :end], self.v[:, :, :end]


class RingCache:
    """Keys and values of one attention layer: of S slots, position p lies in slot p mod S, so S keys are remembered."""

    def __init__(self, batch: int, heads: int, size: int, widths: tuple[int, int], dtype: torch.dtype,
                 device: torch.device) -> None:
        self.k, self.v = (torch.zeros(batch, heads, size, d, dtype=dtype, device=device) for d in widths)

    def extend(self, k: Tensor, v: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Store k, v (B, K, T, d) from position `start` on; return those that the new queries may need (B, K, S, d)."""
        T, size = k.shape[2], self.k.shape[2]
        used = min(start, size)
        joined = torch.cat([self.k[:, :, :used], k], 2), torch.cat([self.v[:, :, :used], v], 2)
        slots = torch.arange(start, start + T, device=k.device)[-size:] % size
        self.k[:, :, slots], self.v[:, :, slots] = k[:, :, -size:], v[:, :, -size:]
        if T > 1 or start == 0:             # more than one token: the first of them may need what the last overwrites
            return joined
        used = min(start + 1, size)
        return self.k[:, :, :used], self.v[:, :, :used]


class Cache:
    """What a model remembers of a batch of sequences: one state a layer, and how many tokens it has seen."""
    ragged = False

    def __init__(self, model: nn.Module, batch: int, length: int) -> None:
        """length: the longest sequence that will be fed."""
        self.length, dtype, device = 0, model.embed.weight.dtype, model.embed.weight.device
        self.states = [None if layer.mixer is None else layer.mixer.new_state(batch, length, dtype, device) for layer in
                       model.layers]

    def advance(self, tokens: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
        """The new tokens (B, T), and their positions (1, T)."""
        positions = torch.arange(self.length, self.length + tokens.shape[1], device=tokens.device)[None]
        self.length += tokens.shape[1]
        return tokens, positions


class ForwardContext:
    """What the layers of one forward pass share: positions (1, T), that of the first new token, the rotation."""
    regular, real, begins, documents = True, None, None, None

    def __init__(self, positions: Tensor, regular: bool, dtype: torch.dtype, cache: Cache | None = None,
                 shared: nn.ModuleDict | None = None, embedding: Tensor | None = None, tokens: Tensor | None = None,
                 rope: Rope | None = None, head_dim: int = 0) -> None:
        self.positions, self.dtype = positions, dtype                           # (1, T)
        self.start = 0 if cache is None else cache.length - positions.shape[1]
        if shared:
            self.shared, self.embedding = shared, embedding                     # blocks by name; (B, T, D)
        if rope is not None:
            self.rotation = rounded_tables(rope, head_dim, positions, dtype)    # cos and sin (1, 1, T, r)
        if shared and "per_layer" in shared:
            self.per_layer = shared["per_layer"](tokens, embedding)             # a vector a layer, (B, T, L, P)
        self.kept: dict[int | None, Any] = {}                                   # window → what later layers read
        self.memo: dict[Any, Any] = {}

    def rotations(self, rope: Rope, head_dim: int) -> tuple[Tensor, Tensor]:
        """cos and sin (1, 1, T, r) of one of the kinds of rotation, made at the first asking."""
        if (rope, head_dim) not in self.memo:
            self.memo[rope, head_dim] = rounded_tables(rope, head_dim, self.positions, self.dtype)
        return self.memo[rope, head_dim]

    def query_growth(self, growth: Growth) -> Tensor:
        """What queries are multiplied by, (1, 1, T, 1)."""
        factor = grown(growth, self.positions)[:, None, :, None]
        return factor.to(self.dtype) if growth.rounded else factor

    def slots(self, state: KVCache) -> int:
        """Where the new keys go."""
        return self.start


def rounded_tables(rope: Rope, head_dim: int, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin, rounded as the published code does."""
    cos, sin = rotation_tables(rope, head_dim, positions, positions[:, -1:] + 1)
    if rope.rounds == "each":
        return cos.to(dtype), sin.to(dtype)
    if rope.rounds == "tables":
        return cos.to(dtype).float(), sin.to(dtype).float()
    return cos, sin


def key_positions(ctx: ForwardContext, window: int | None) -> Tensor:
    """The position of each key (1, S), in the order in which `extend` returns the keys.

    With a window that is the order of the slots for one new token, and slots before new keys for several.
    """
    start, end = ctx.start, ctx.start + ctx.positions.shape[1]
    if window is None:
        return torch.arange(end, device=ctx.positions.device)[None]
    one = end - start == 1 and start > 0
    held = torch.arange(max(0, end - window if one else start - window), end if one else start)
    held = held[(held % window).argsort()].to(ctx.positions.device)[None]
    return held if one else torch.cat([held, ctx.positions], 1)


def attention_mask(ctx: ForwardContext, slots: int | None, window: int | None = None, alibi: Alibi | None = None,
                   heads: int = 1, scale: float = 1.0) -> Tensor | str | None:
    """Which keys each query sees. None: all. CAUSAL: those up to its own. Else bool (1, 1, T, S), or a bias."""
    T = ctx.positions.shape[1]
    if alibi is None:
        if T == 1:
            return None                                         # the cache holds nothing else
        if ctx.start == 0 and (window is None or T <= window):
            return CAUSAL
    if window is None and alibi is None:
        seen = torch.ones(1, 1, T, ctx.start + T, dtype=torch.bool, device=ctx.positions.device)
        return seen.tril(ctx.start)                             # T new tokens behind others
    keys = key_positions(ctx, window)
    visible = allowed(ctx.positions, keys, window)[:, None]
    if alibi is None:
        return visible
    bias = alibi_bias(alibi, heads, ctx.positions, keys, scale)
    return bias.masked_fill(~visible, -torch.inf).to(ctx.dtype)


def chunk_mask(ctx: ForwardContext, slots: int | None, chunk: int) -> Tensor | str | None:
    """The same of attention in chunks: a query sees the keys of its own chunk."""
    if ctx.start == 0 and ctx.positions.shape[1] <= chunk:
        return CAUSAL
    q, k = ctx.positions, key_positions(ctx, chunk)
    together = q[:, :, None] // chunk == k[:, None, :] // chunk
    return (allowed(q, k, None) & together)[:, None]
