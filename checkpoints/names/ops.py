"""How a parameter is arranged on disk and how it is arranged here: one class an arrangement, which serves both ways.

    Same             one tensor there is one tensor here, element for element
    Stack            one tensor an expert there, (F, D) each; one stacked tensor here, (E, F, D)
    Blocks           several of ours, one under another, are one there:        rows  q q q q k k v v
    Groups           the same, a key/value head at a time:                     rows  q q k v q q k v  (K = 2, H = 4)
    Transposed(op)   as op, with matrices stored (in, out)
    Interleaving     here the halves of a head, as RoPE turns them; there pairs:   rows  0 1 2 3 → 0 2 1 3     (d = 4)
    Halving          the inverse: pairs here, halves there

An op names the parts of our parameters in the order in which a file holds them:

    pieces(ours)     (0, q of group 0), (0, k of group 0), (0, v of group 0), (0, q of group 1), …
                      └ of the rule's stored tensors, the first        └ a view of our memory

Loading fills the pieces from the file, one after another; saving writes them to it in the same order. So the two
cannot disagree, nothing is ever held twice, and a tensor of any size goes through a buffer of a few megabytes
(storage/stream.py).
`shapes(ours)` is what the stored tensors' headers say; on the meta device it is the plan (table.py).

`layer` is the config of the layer that the parameters belong to, None outside the layers.
Shapes: E experts, F feed-forward width, D model width, H query heads, K key/value heads, d head width.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from nanollm.config import Attention, Layer


class Beside:
    """Several views that a file holds side by side, as the columns of one matrix: row 0 of each, then row 1 of each, …

    It can be used like a tensor by the code that fills and reads pieces: it has a length, is cut by rows, and copied
    into."""

    def __init__(self, views: Sequence[Tensor]) -> None:
        self.views = views

    def __len__(self) -> int:
        return len(self.views[0])

    def __getitem__(self, rows: slice) -> "Beside":
        return Beside([view[rows] for view in self.views])

    def numel(self) -> int:
        """The number of elements of all views."""
        return sum(view.numel() for view in self.views)

    def dense(self) -> Tensor:
        """The views as one matrix, as the file holds them."""
        return torch.cat(list(self.views), -1)

    def copy_(self, dense: Tensor) -> None:
        """Fill the views from such a matrix."""
        rows = dense.view(*self.views[0].shape[:-1], -1)
        for view, part in zip(self.views, rows.split([view.shape[-1] for view in self.views], -1), strict=True):
            view.copy_(part)


Piece = Tensor | Beside
Pieces = Iterator[tuple[int, Piece]]
Shape = tuple[int, ...]


class Op(Protocol):
    """What stands in a rule of a table."""

    def shapes(self, ours: Sequence[Tensor], layer: Layer | None) -> list[Shape]:
        """Of the stored tensors, in the order of the rule."""

    def pieces(self, ours: Sequence[Tensor], layer: Layer | None) -> Pieces:
        """(which of the stored tensors, a view of ours): each stored tensor is its pieces, flattened, end to end."""


class Same:
    """One stored tensor is one parameter."""

    @staticmethod
    def shapes(ours: Sequence[Tensor], layer: Layer | None) -> list[Shape]:
        return [tuple(ours[0].shape)]

    @staticmethod
    def pieces(ours: Sequence[Tensor], layer: Layer | None) -> Pieces:
        yield 0, ours[0]


class Stack:
    """One stored tensor an expert; the parameter has the expert as its first dimension."""

    @staticmethod
    def shapes(ours: Sequence[Tensor], layer: Layer | None) -> list[Shape]:
        return [tuple(ours[0].shape[1:])] * len(ours[0])

    @staticmethod
    def pieces(ours: Sequence[Tensor], layer: Layer | None) -> Pieces:
        yield from enumerate(ours[0])


class Blocks:
    """One stored tensor has the rows of several parameters, one block under another."""

    @staticmethod
    def shapes(ours: Sequence[Tensor], layer: Layer | None) -> list[Shape]:
        return [(sum(map(len, ours)), *ours[0].shape[1:])]

    @staticmethod
    def pieces(ours: Sequence[Tensor], layer: Layer | None) -> Pieces:
        yield from ((0, tensor) for tensor in ours)


class Groups(Blocks):
    """One stored tensor has the rows of q, k and v by key/value head: the queries that read it, its key, its value.

    With K = 1 this is Blocks (Falcon-7B), with K = H it is q k v of each head (GPT-NeoX, BLOOM); between: InternLM2."""

    @staticmethod
    def pieces(ours: Sequence[Tensor], layer: Layer | None) -> Pieces:
        assert layer is not None and isinstance(layer.mixer, Attention)
        grouped = [tensor.unflatten(0, (layer.mixer.kv_heads, -1)) for tensor in ours]  # (H d, D) → (K, H/K d, D)
        yield from ((0, rows) for group in zip(*grouped, strict=True) for rows in group)


class Transposed:
    """As Same or Blocks, with matrices stored as (in, out); vectors are as they are. GPT-2."""

    def __init__(self, op: Op) -> None:
        self.op = op

    def shapes(self, ours: Sequence[Tensor], layer: Layer | None) -> list[Shape]:
        return [shape[::-1] if len(shape) == 2 else shape for shape in self.op.shapes(ours, layer)]

    def pieces(self, ours: Sequence[Tensor], layer: Layer | None) -> Pieces:
        if ours[0].ndim == 2:
            yield 0, Beside([tensor.T for tensor in ours])  # blocks of rows are blocks of columns when turned
        else:
            yield from self.op.pieces(ours, layer)


class _HeadByHead(Same):
    """One stored tensor is one parameter, with the rows within each head in another order."""
    parts: tuple[int, int]  # of a head here; there the second comes first

    @classmethod
    def pieces(cls, ours: Sequence[Tensor], layer: Layer | None) -> Pieces:
        assert layer is not None and isinstance(layer.mixer, Attention)
        heads = len(ours[0]) // layer.mixer.head_dim
        yield 0, ours[0].unflatten(0, (heads, *cls.parts)).transpose(1, 2)


class Interleaving(_HeadByHead):
    """q or k, in two halves that RoPE rotates against each other; stored as neighbours, as in Meta's layout."""
    parts = (2, -1)


class Halving(_HeadByHead):
    """q or k, as neighbours that RoPE rotates against each other; stored in two halves, as in Hugging Face's layout."""
    parts = (-1, 2)
