"""Arrangements of stacked experts: where a file holds the matrices of all experts of a layer in one tensor. One class each, as in ops.py.

    GateUp         gate rows above up rows, in each expert          (E, 2F, D)      transformers in memory
    Interleaved    a gate row, an up row, and so on, transposed     (E, D, 2F)      gpt-oss; its biases (E, 2F)
    Turned         each expert's matrix transposed                  (E, F, D)       gpt-oss, down

Shapes: E experts, F feed-forward width, D model width. Ours: gate and up (E, F, D), down (E, D, F).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from checkpoints.ops import Put
from nanollm.config import Layer


class GateUp:
    """One stored tensor has gate above up."""

    @staticmethod
    def load(put: Put, ours: Sequence[Tensor], layer: Layer | None) -> None:
        gate, up = ours
        stored = gate.new_empty(len(gate), gate.shape[1] + up.shape[1], *gate.shape[2:])
        put(0, stored)
        gate.copy_(stored[:, : gate.shape[1]])
        up.copy_(stored[:, gate.shape[1] :])

    @staticmethod
    def save(ours: Sequence[Tensor], layer: Layer | None) -> list[Tensor]:
        return [torch.cat(list(ours), 1)]


class Interleaved:
    """One stored tensor has columns gate up gate up …; of biases the numbers."""

    @staticmethod
    def load(put: Put, ours: Sequence[Tensor], layer: Layer | None) -> None:
        gate, up = ours
        stored = gate.new_empty(len(gate), *gate.shape[2:], 2 * gate.shape[1])
        put(0, stored)
        for tensor, first in ((gate, 0), (up, 1)):
            tensor.copy_(stored[..., first::2].transpose(1, -1))        # nothing to turn in a bias: 1 is its last dimension

    @staticmethod
    def save(ours: Sequence[Tensor], layer: Layer | None) -> list[Tensor]:
        return [torch.stack([tensor.transpose(1, -1) for tensor in ours], -1).flatten(-2)]


class Turned:
    """One stored tensor, each expert's matrix transposed."""

    @staticmethod
    def load(put: Put, ours: Sequence[Tensor], layer: Layer | None) -> None:
        put(0, ours[0].transpose(1, 2))

    @staticmethod
    def save(ours: Sequence[Tensor], layer: Layer | None) -> list[Tensor]:
        return [ours[0].transpose(1, 2)]
