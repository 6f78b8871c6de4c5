"""What all layers of one forward pass share, computed once: positions, rotation tables, masks, slots of the cache.

A layer asks for what its own config says (`ctx.rotation(rope, d)`, `AttentionMask(ctx, …).dense`); layers that ask for
the same get the same tensor. Where every row is simply the next T tokens, no mask is built at all: attention is then
causal over the new keys, or over everything for a single new token.

Shapes: B batch, T new tokens, S keys, r rotated channels.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nanollm.config import Rope
from nanollm.config.scaling import Growth
from nanollm.layers.rope import rotation_tables
from nanollm.layers.scaling import grown
from nanollm.layers.state import KVCache, RowLengths, SlotMapping


class ForwardContext:
    """positions (B, T) int64; regular: all rows have the same T consecutive positions, none is padding.

    shared, embedding: modules that several layers use, by name, and what the first layer reads (shared_block.py).
    tokens: (B, T), for those that each layer has a vector of (per_layer.py)."""

    def __init__(self, positions: Tensor, regular: bool, dtype: torch.dtype, cache: RowLengths | None = None,
                 shared: nn.ModuleDict | None = None, embedding: Tensor | None = None,
                 tokens: Tensor | None = None) -> None:
        self.positions, self.regular, self.dtype, self.cache = positions, regular, dtype, cache
        self.shared, self.embedding = shared, embedding if shared else None     # kept only where somebody reads it
        self.real = None if regular else positions >= 0                         # (B, T), False: padding
        self.begins = None if regular else positions == 0                       # (B, T), True: first of a document
        self.documents = None if regular or cache is not None else (positions == 0).cumsum(1)
        self.memo: dict[tuple, object] = {}
        self.kept: dict[int | None, tuple[Tensor, Tensor, SlotMapping | None]] = {}     # cross_layer.py
        # at once, not where it is first read: a layer that runs again for its gradient would not make it again
        per_layer = shared["per_layer"] if shared and "per_layer" in shared else None
        self.per_layer = None if per_layer is None or tokens is None else per_layer(tokens, embedding)

    def rotation(self, rope: Rope, head_dim: int) -> tuple[Tensor, Tensor]:
        """cos and sin (B or 1, 1, T, r), rounded and in the dtype that the rope asks for, see rope.py."""
        rounded = torch.float32 if rope.rounds == "result" else self.dtype
        kept = self.dtype if rope.rounds == "each" else torch.float32
        return self.once(("rotation", rope, head_dim), lambda: tuple(
            table.to(rounded).to(kept)
            for table in rotation_tables(rope, head_dim, self.rows(self.positions), self.rows(self.lengths()))))

    def query_growth(self, growth: Growth) -> Tensor:
        """What queries are multiplied by, (B or 1, 1, T, 1), see scaling.py."""
        def make() -> Tensor:
            factor = grown(growth, self.rows(self.positions))[:, None, :, None]
            return factor.to(self.dtype) if growth.rounded else factor

        return self.once(("growth", growth), make)

    def lengths(self) -> Tensor:
        """(B, T): the length of the sequence that each token belongs to, itself and what is cached included."""
        if self.cache is not None:
            return self.cache.lengths[:, None]
        if self.documents is None:
            return self.positions[:, -1:] + 1
        rows, new = self.positions.shape
        longest = torch.zeros(rows, new + 1, dtype=torch.long, device=self.positions.device)
        return longest.scatter_reduce(1, self.documents, self.positions + 1, "amax").gather(1, self.documents)

    def slots(self, state: KVCache) -> SlotMapping:
        """Where this call writes in states of this size, and what it reads."""
        cache = self.cache
        assert cache is not None, "states belong to a cache"
        return self.once(("slots", state.size), lambda: cache.slots(state, self.positions))

    def rows(self, table: Tensor) -> Tensor:
        """One row of a table (B, …) where all are equal."""
        return table[:1] if self.regular else table

    def once(self, key: tuple, make: Callable[[], Any]) -> Any:
        """What `make` returns, made at the first asking."""
        if key not in self.memo:
            self.memo[key] = make()
        return self.memo[key]
