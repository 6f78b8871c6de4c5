"""Whole numbers of few bits, packed into words: w = s (q − z), and s and z belong to a group of inputs.

    codes    (N, K b/32) int32    q of b bits, the first in the lowest bits
    s, z     (N, G)               of a group of K/G inputs; G = 1: of a row; z is 2^(b−1) where none is stored
    order    (K,) int32           the group of each input, where the inputs were sorted before ("act-order")

Each of the parts has the rows of the weight, so what moves rows of a weight (names/ops.py) moves theirs, and weights of
4 bits can stay as they are (checkpoints/packing.py). compressed.py, gptq.py and awq.py bring their tensors into this
form.

Shapes: N outputs, K inputs, G groups.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from checkpoints.storage.files import Stored
from checkpoints.storage.quantized.parts import Packed, rows_of, unpacked, whole
from nanollm.errors import CheckpointError


@dataclass(frozen=True)
class Integers:
    """How a weight is kept."""
    bits: int
    group: int | None                            # inputs that share s and z; None: a row
    symmetric: bool                              # without z

    def __str__(self) -> str:
        group = "with a scale a row" if self.group is None else f"in groups of {self.group}"
        return f"{self.bits} bits {group}" + ("" if self.symmetric else ", with zero points")


@dataclass(frozen=True)
class Ints(Packed):
    """A weight (N, K), which reads as what it stands for; file, start and size are those of its codes."""
    scales: Stored                               # (N, G)
    zeros: Stored | None                         # (N, G)
    how: Integers
    order: Stored | None = None                  # (K,)

    def rows(self, top: int, end: int) -> Tensor:
        """w = s (q − z) of the rows from `top` to `end`, float32 (end − top, K)."""
        groups = self.scales.shape[1]
        codes = unpacked(rows_of(self.codes, top, end), self.how.bits)[:, : self.shape[1]]
        zeros = rows_of(self.zeros, top, end).int() if self.zeros else None
        scales, half = rows_of(self.scales, top, end).float(), 1 << self.how.bits - 1
        if self.in_order:
            codes = codes.unflatten(1, (groups, -1))
            return ((codes - (half if zeros is None else zeros[..., None])).float() * scales[..., None]).flatten(1)
        each = self._groups()
        offsets = half if zeros is None else zeros.index_select(1, each)
        return (codes - offsets).float() * scales.index_select(1, each)

    def _groups(self) -> Tensor:
        """(K,) the group of each input."""
        K, groups = self.shape[1], self.scales.shape[1]
        found = whole(self.order).long() if self.order else torch.arange(K) // (self.how.group or K)
        if not 0 <= int(found.min()) <= int(found.max()) < groups:
            raise CheckpointError(f"{self.file}: an order of inputs with groups from {int(found.min())} to "
                                  f"{int(found.max())}; expected 0 to {groups - 1}")
        return found

    @cached_property
    def in_order(self) -> bool:
        """Whether the groups are neighbours, all of one size. Reads the order, if there is one."""
        K, groups = self.shape[1], self.scales.shape[1]
        return K % groups == 0 and torch.equal(self._groups(), torch.arange(K) // (K // groups))
