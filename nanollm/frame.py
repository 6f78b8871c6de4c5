"""What all layers of one forward pass share, worked out once: positions, rotation tables, masks, cache plans.

A layer asks for what its own config says (`frame.rotation(rope, d)`, `frame.mask(…)`); layers that ask for the same
get the same tensor. Where every row is simply the next T tokens, no mask is built at all: attention is then causal
over the new keys, or over everything for a single new token.

Shapes: B batch, T new tokens, S keys, r rotated channels.
"""

import torch
from torch import Tensor

from nanollm.cache import KV, Cache, Plan
from nanollm.config import Attention, Rope
from nanollm.mask import alibi_bias, allowed
from nanollm.rope import rotation_tables

CAUSAL = "causal"       # a mask that need not be built: query i of T sees the first i + 1 of T keys


class Frame:
    """positions (B, T) int64; regular: all rows are the same run of T tokens that starts at `filled`, none is padding."""

    def __init__(self, positions: Tensor, regular: bool, dtype: torch.dtype, cache: Cache | None = None) -> None:
        self.positions, self.regular, self.dtype, self.cache = positions, regular, dtype, cache
        self.real = None if regular else positions >= 0                         # (B, T), False: padding
        self.begins = None if regular else positions == 0                       # (B, T), True: first of a document
        self.documents = None if regular or cache is not None else self.begins.cumsum(1)
        self.memo: dict[tuple, object] = {}

    def rotation(self, rope: Rope, head_dim: int) -> tuple[Tensor, Tensor]:
        """cos and sin (B or 1, 1, T, r) in the working dtype, see rope.py."""
        return self._once(("rotation", rope, head_dim), lambda: tuple(
            table.to(self.dtype) for table in rotation_tables(rope, head_dim, self._rows(self.positions), self._rows(self.lengths()))))

    def lengths(self) -> Tensor:
        """(B, T): the length of the sequence that each token belongs to, itself and what is cached included."""
        if self.cache is not None:
            return self.cache.lengths[:, None]
        if self.documents is None:
            return self.positions[:, -1:] + 1
        longest = torch.zeros(len(self.positions), self.positions.shape[1] + 1, dtype=torch.long, device=self.positions.device)
        return longest.scatter_reduce(1, self.documents, self.positions + 1, "amax").gather(1, self.documents)

    def plan(self, state: KV) -> Plan:
        """Where this call writes in caches of this size, and what it reads."""
        return self._once(("plan", state.size), lambda: self.cache.plan(state, self.positions))

    def mask(self, config: Attention, plan: Plan | None) -> Tensor | str | None:
        """None: every query sees every key. CAUSAL. Else bool (B, 1, T, S), or with ALiBi a float bias (B, H, T, S)."""
        return self._once(("mask", config.window, config.alibi and config.heads, plan), lambda: self._mask(config, plan))

    def _mask(self, config: Attention, plan: Plan | None) -> Tensor | str | None:
        fresh = plan is None or plan.fresh
        k_pos = self.positions if fresh else plan.key_positions
        T, S = self.positions.shape[1], k_pos.shape[1]
        if self.regular and not config.alibi and (config.window is None or S <= config.window):
            if T == 1:
                return None
            if fresh:
                return CAUSAL
        visible = allowed(self._rows(self.positions), self._rows(k_pos), config.window, self.documents, self.documents)[:, None]
        if not config.alibi:
            return visible
        bias = alibi_bias(config.heads, self._rows(self.positions), self._rows(k_pos))
        return bias.masked_fill(~visible, -torch.inf).to(self.dtype)

    def _rows(self, table: Tensor) -> Tensor:
        return table[:1] if self.regular else table     # equal rows need one

    def _once(self, key: tuple, make):
        if key not in self.memo:
            self.memo[key] = make()
        return self.memo[key]
