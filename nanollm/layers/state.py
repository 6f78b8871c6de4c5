"""What one layer remembers between calls: keys and values for attention, a window and a state for a scan, or nothing.

Attention with a window W needs no more than the last W keys, so its cache is a ring of W slots; without one it has a
slot for every token. Either way position p of a row lives in slot p mod S. A ring of S = 4 fed positions 0 … 5:

    slot        0  1  2  3
    position    4  5  2  3        what the mask reads: order does not matter, the stored positions do

Rows may have different lengths: padding (position −1) is written to one more slot, a bin that nothing reads, so a batch
of ragged prompts needs no padding token, no left padding, and no second mechanism.

Shapes: B batch, K key/value heads, S slots, T new tokens, d head width, I scan channels, k conv width.
"""

from typing import Protocol

import torch
from torch import Tensor


class KVCache:
    """Keys and values of one attention layer: (B, K, S + 1, width of each); the last slot is the bin."""

    def __init__(self, batch: int, heads: int, size: int, widths: tuple[int, int], dtype: torch.dtype,
                 device: torch.device, ring: bool = False) -> None:
        self.size, self.ring = size, ring
        shape = batch, heads, size + 1
        self.k, self.v = (torch.zeros(*shape, width, dtype=dtype, device=device) for width in widths)

    def extend(self, k: Tensor, v: Tensor, slots: "SlotMapping") -> tuple[Tensor, Tensor]:
        """Store k, v (B, K, T, d); return all keys and values that the new queries may need (B, K, S', d)."""
        old = self.k[:, :, : slots.old], self.v[:, :, : slots.old]
        if slots.join:                                   # a chunk would overwrite keys that its own first queries need
            old = torch.cat([old[0], k], 2), torch.cat([old[1], v], 2)
        for mine, new in ((self.k, k), (self.v, v)):
            if slots.alike:                              # one index for all rows: a plain copy, several times as fast
                mine.index_copy_(2, slots.index[0], new)
            else:
                mine.transpose(1, 2)[slots.rows, slots.index] = new.transpose(1, 2)     # 40 times as fast as scatter_
        if slots.join:
            return old
        return (k, v) if slots.fresh else (self.k[:, :, : slots.used], self.v[:, :, : slots.used])


class ConvState:
    """The last inputs of a convolution, (B, channels, k − 1)."""

    def __init__(self, batch: int, channels: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.conv = torch.zeros(batch, channels, width - 1, dtype=dtype, device=device)


class ScanState(ConvState):
    """What a recurrence carries on: the last inputs of its convolution, and its state, (B, …).

    The state is float32 whatever the weights are.
    """

    def __init__(self, batch: int, channels: int, width: int, state: tuple[int, ...], dtype: torch.dtype,
                 device: torch.device) -> None:
        super().__init__(batch, channels, width, dtype, device)
        self.state = torch.zeros(batch, *state, dtype=torch.float32, device=device)


class ParallelState(KVCache, ScanState):
    """Of attention and a scan side by side: keys and values, and a window and a state, as one object."""

    def __init__(self, keys: KVCache, scan: ScanState) -> None:
        vars(self).update(vars(keys) | vars(scan))


class NoState:
    """Of a layer without a mixer, which remembers nothing."""


State = KVCache | ConvState | NoState


class SlotMapping:
    """Where one call writes in a cache of S slots and what it reads, worked out once for all layers of that size."""
    full = True                     # every slot that is read holds a key; not where all slots are (inference/static.py)

    def __init__(self, held: Tensor, positions: Tensor, ring: bool, alike: bool, filled: int, longest: int) -> None:
        """held (B, S + 1): the position in each slot before the call, or −1. alike: all rows have the same positions.

        filled, longest: tokens of the longest row before and after the call.
        """
        self.size = size = held.shape[1] - 1
        self.ring, chunk = ring, positions.shape[1]
        self.alike = alike
        self.fresh = filled == 0
        self.join = ring and chunk > 1 and not self.fresh
        self.old, self.used = min(filled, size), min(longest, size)
        last = positions.amax(1, keepdim=True)
        self.index = torch.where((positions >= 0) & (positions > last - size), positions % size, size)      # (B, T)
        self.rows = torch.arange(len(positions), device=positions.device)[:, None]
        joined = torch.cat([held[:, : self.old], positions], 1) if self.join else positions
        held.scatter_(1, self.index, positions)
        held[:, size] = -1
        self.key_positions = joined if self.join or self.fresh else held[:, : self.used]


class RowLengths(Protocol):
    """What the layers ask of a cache (nanollm/cache.py): how long each row is, and where a call writes."""
    lengths: Tensor  # (B,), the tokens of this call included

    def slots(self, state: KVCache, positions: Tensor) -> SlotMapping:
        """Of a call with these positions (B, T)."""
        ...
