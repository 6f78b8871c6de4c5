"""Arrangements of stacked experts, one class each as in ops.py: a file holds those of a layer in one tensor.

    GateUp         gate rows above up rows, in each expert          (E, 2F, D)      transformers in memory
    Interleaved    a gate row, an up row, and so on, transposed     (E, D, 2F)      gpt-oss; its biases (E, 2F)
    TurnedGateUp   gate columns left of up columns, in each         (E, D, 2F)      Qwen3-VL-MoE, Llama 4
    Turned         each expert's matrix transposed                  (E, F, D)       down of these three
    Piled          all experts' rows in one matrix                  (E·F, D)        DBRX; its down transposed first
    Leading        a vector as a matrix of one row                  (1, E)          ERNIE-4.5, the correction

Shapes: E experts, F feed-forward width, D model width. Ours: gate and up (E, F, D), down (E, D, F).
"""

from collections.abc import Sequence

from torch import Tensor

from checkpoints.names.ops import Beside, Pieces, Shape
from nanollm.config import Layer


class GateUp:
    """One stored tensor has gate above up."""

    @staticmethod
    def shapes(ours: Sequence[Tensor], layer: Layer | None) -> list[Shape]:
        gate, up = ours
        return [(len(gate), gate.shape[1] + up.shape[1], *gate.shape[2:])]

    @staticmethod
    def pieces(ours: Sequence[Tensor], layer: Layer | None) -> Pieces:
        yield from ((0, part) for expert in zip(*ours, strict=True) for part in expert)


class Interleaved:
    """One stored tensor has columns gate up gate up …; of biases the numbers."""

    @staticmethod
    def shapes(ours: Sequence[Tensor], layer: Layer | None) -> list[Shape]:
        gate = ours[0]
        return [(len(gate), *gate.shape[2:], 2 * gate.shape[1])]

    @staticmethod
    def pieces(ours: Sequence[Tensor], layer: Layer | None) -> Pieces:
        for gate, up in zip(*ours, strict=True):  # (F, D), of a bias (F,)
            yield 0, Beside([part.T.unsqueeze(-1) if part.ndim == 2 else part.unsqueeze(-1) for part in (gate, up)])


class TurnedGateUp:
    """One stored tensor has, for each expert, the columns of gate, then those of up."""

    @staticmethod
    def shapes(ours: Sequence[Tensor], layer: Layer | None) -> list[Shape]:
        return Interleaved.shapes(ours, layer)

    @staticmethod
    def pieces(ours: Sequence[Tensor], layer: Layer | None) -> Pieces:
        for gate, up in zip(*ours, strict=True):  # (F, D)
            yield 0, Beside([gate.T, up.T])


class Turned:
    """One stored tensor, each expert's matrix transposed."""

    @staticmethod
    def shapes(ours: Sequence[Tensor], layer: Layer | None) -> list[Shape]:
        experts, rows, columns = ours[0].shape
        return [(experts, columns, rows)]

    @staticmethod
    def pieces(ours: Sequence[Tensor], layer: Layer | None) -> Pieces:
        yield 0, ours[0].transpose(1, 2)


class Piled:
    """One stored matrix has the rows of all experts, one expert under another."""

    @staticmethod
    def shapes(ours: Sequence[Tensor], layer: Layer | None) -> list[Shape]:
        experts, rows, columns = ours[0].shape
        return [(experts * rows, columns)]

    @staticmethod
    def pieces(ours: Sequence[Tensor], layer: Layer | None) -> Pieces:
        yield 0, ours[0]


class PiledTurned:
    """The same of each expert's matrix transposed."""

    @staticmethod
    def shapes(ours: Sequence[Tensor], layer: Layer | None) -> list[Shape]:
        experts, rows, columns = ours[0].shape
        return [(experts * columns, rows)]

    @staticmethod
    def pieces(ours: Sequence[Tensor], layer: Layer | None) -> Pieces:
        yield 0, ours[0].transpose(1, 2)


class Leading:
    """One stored matrix has one row, which is our vector."""

    @staticmethod
    def shapes(ours: Sequence[Tensor], layer: Layer | None) -> list[Shape]:
        return [(1, len(ours[0]))]

    @staticmethod
    def pieces(ours: Sequence[Tensor], layer: Layer | None) -> Pieces:
        yield 0, ours[0]
