"""What all layers of one forward pass share, worked out once: positions, rotation tables, masks, cache plans.

A layer asks for what its own config says (`frame.rotation(rope, d)`, `Sight(frame, …).mask`); layers that ask for the same
get the same tensor. Where every row is simply the next T tokens, no mask is built at all: attention is then causal
over the new keys, or over everything for a single new token.

Shapes: B batch, T new tokens, S keys, r rotated channels.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nanollm.alibi import alibi_bias, alibi_slopes
from nanollm.cache import KV, Cache, Plan
from nanollm.config import Alibi, Rope
from nanollm.mask import allowed
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
        """cos and sin (B or 1, 1, T, r), rounded and in the dtype that the rope asks for, see rope.py."""
        rounded = torch.float32 if rope.rounds == "result" else self.dtype
        kept = self.dtype if rope.rounds == "each" else torch.float32
        return self.once(("rotation", rope, head_dim), lambda: tuple(
            table.to(rounded).to(kept) for table in rotation_tables(rope, head_dim, self.rows(self.positions), self.rows(self.lengths()))))

    def log_growth(self, original: int) -> Tensor:
        """max(1, log_L n) for the n-th token of its document, (B or 1, 1, T, 1): how much longer than L a query's sequence is."""
        return self.once(("log_growth", original), lambda: (
            torch.log((self.rows(self.positions) + 1).clamp(min=original).float()) / math.log(original)).to(self.dtype)[:, None, :, None])

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
        return self.once(("plan", state.size), lambda: self.cache.plan(state, self.positions))

    def rows(self, table: Tensor) -> Tensor:
        """One row of a table (B, …) where all are equal."""
        return table[:1] if self.regular else table

    def once(self, key: tuple, make: Callable[[], Any]) -> Any:
        """What `make` returns, made at the first asking."""
        if key not in self.memo:
            self.memo[key] = make()
        return self.memo[key]


class Sight:
    """What the queries of a call see of the keys, in two forms: a mask for the definition, a run of keys a query for the kernels.

    Keys lie in order, those of this call in the order of the tokens, those of a cache by position. So what a query sees is one run,
    first … last, both included: here with W = 3, and two documents in one row.

        k      0 1 2 3 4        first last        k  0 1 2 3        position  first last
        q 0    x . . . .          0    0        q 0  x . . .           0        0    0
          1    x x . . .          0    1          1  x x . .           1        0    1
          2    x x x . .          0    2          2  . . x .           0        2    2
          3    . x x x .          1    3          3  . . x x           1        2    3
    """

    def __init__(self, frame: Frame, plan: Plan | None, window: int | None = None, alibi: Alibi | None = None, heads: int = 1, scale: float = 1.0) -> None:
        """`heads` and `scale` are those of the scores, for `alibi`."""
        self.frame, self.plan, self.window, self.alibi, self.heads, self.scale = frame, plan, window, alibi, heads, scale
        self.key = (window, alibi and (alibi, heads, scale), plan)
        self.fresh = plan is None or plan.fresh                                 # the keys are those of this call

    @property
    def mask(self) -> Tensor | str | None:
        """None: every query sees every key. CAUSAL. Else bool (B or 1, 1, T, S), or with ALiBi a float bias (B or 1, H, T, S)."""
        return self.frame.once(("mask", *self.key), self._mask)

    @property
    def first(self) -> Tensor | None:
        """The first key that each query sees, int32 (B or 1, T). None: what it sees is no run (a ring with a chunk joined to it),
        or does not cost what a run costs (coarse ALiBi)."""
        return self.frame.once(("runs", *self.key), self._runs)[0]

    @property
    def last(self) -> Tensor | None:
        """The last key that each query sees, int32 (B or 1, T); less than `first` for padding, which sees nothing."""
        return self.frame.once(("runs", *self.key), self._runs)[1]

    @property
    def slopes(self) -> Tensor | None:
        """What a key costs for each place that it stands before the last, float32 (H,); None without ALiBi."""
        make = lambda: alibi_slopes(self.heads).to(self.frame.positions.device)      # noqa: E731
        return self.frame.once(("slopes", *self.key), make) if self.alibi else None

    def _mask(self) -> Tensor | str | None:
        frame = self.frame
        k_pos = frame.positions if self.fresh else self.plan.key_positions
        T, S = frame.positions.shape[1], k_pos.shape[1]
        if frame.regular and not self.alibi and (self.window is None or S <= self.window):
            if T == 1:
                return None
            if self.fresh:
                return CAUSAL
        visible = allowed(frame.rows(frame.positions), frame.rows(k_pos), self.window, frame.documents, frame.documents)[:, None]
        if not self.alibi:
            return visible
        bias = alibi_bias(self.alibi, self.heads, frame.rows(frame.positions), frame.rows(k_pos), self.scale)
        return bias.masked_fill(~visible, -torch.inf).to(frame.dtype)

    def _runs(self) -> tuple[Tensor, Tensor] | tuple[None, None]:
        positions, window, plan = self.frame.rows(self.frame.positions), self.window, self.plan
        if self.alibi and self.alibi.coarse:                                    # what a key costs is no slope times a distance
            return None, None
        if self.fresh:
            last = torch.arange(positions.shape[1], device=positions.device).expand_as(positions)
            first = last - positions                                            # where its document begins
        elif not plan.ring:
            last, first = positions, torch.zeros_like(positions)                # position p lies in slot p
        elif plan.join or self.alibi:
            return None, None
        else:                                                                   # one token: all that the ring holds is in its window
            return (torch.zeros_like(positions, dtype=torch.int32), positions.clamp(max=plan.size - 1).int())
        if window is not None:
            first = torch.maximum(first, last - window + 1)
        return first.clamp(min=0).int(), last.int()
