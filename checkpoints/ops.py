"""How a parameter is arranged on disk and how it is arranged here: one class an arrangement, each its own inverse pair.

    Same             one tensor there is one tensor here, element for element
    Stack            one tensor an expert there, (F, D) each; one stacked tensor here, (E, F, D)
    Blocks           several of ours, one under another, are one there:        rows  q q q q k k v v
    Groups           the same, a key/value head at a time:                     rows  q q k v q q k v       (K = 2 of H = 4 heads)
    Transposed(op)   as op, with matrices stored (in, out)

`save` says what the stored tensors are, given ours; `load` fills ours from stored ones. Two habits follow from that:

- The shapes that a file must have are never computed by hand: `save`, run on the meta device, is the plan (table.py).
- `save` returns views where it can, and `load` is handed a `put(k, tensor)` that writes the k-th stored tensor into
  memory of ours, straight from the file. `torch.stack` of 128 experts would hold all of them twice.

`layer` is the config of the layer that the parameters belong to, None outside the layers.
Shapes: E experts, F feed-forward width, D model width, H query heads, K key/value heads.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from nanollm.config import Layer

Put = Callable[[int, Tensor], None]


class Op(Protocol):
    def load(self, put: Put, ours: Sequence[Tensor], layer: Layer | None) -> None:
        """Fill our parameters; `put(k, tensor)` copies the k-th stored tensor of the rule into a tensor of its shape."""

    def save(self, ours: Sequence[Tensor], layer: Layer | None) -> list[Tensor]:
        """Our parameters as the stored tensors, in the order of the rule."""


class Same:
    """One stored tensor is one parameter."""

    @staticmethod
    def load(put: Put, ours: Sequence[Tensor], layer: Layer | None) -> None:
        put(0, ours[0])

    @staticmethod
    def save(ours: Sequence[Tensor], layer: Layer | None) -> list[Tensor]:
        return [ours[0]]


class Stack:
    """One stored tensor an expert; the parameter has the expert as its first dimension."""

    @staticmethod
    def load(put: Put, ours: Sequence[Tensor], layer: Layer | None) -> None:
        for e, expert in enumerate(ours[0]):     # (F, D), a view of (E, F, D)
            put(e, expert)

    @staticmethod
    def save(ours: Sequence[Tensor], layer: Layer | None) -> list[Tensor]:
        return list(ours[0])                     # E views


class Blocks:
    """One stored tensor has the rows of several parameters, one block under another."""

    @staticmethod
    def load(put: Put, ours: Sequence[Tensor], layer: Layer | None) -> None:
        stored = torch.empty_like(torch.cat([tensor.to("meta") for tensor in ours]), device=ours[0].device)
        put(0, stored)
        for tensor, rows in zip(ours, stored.split([len(tensor) for tensor in ours])):
            tensor.copy_(rows)

    @staticmethod
    def save(ours: Sequence[Tensor], layer: Layer | None) -> list[Tensor]:
        return [torch.cat(list(ours))]


class Groups:
    """One stored tensor has the rows of q, k and v, sorted by key/value head: the queries that read it, its key, its value.

    With K = 1 this is Blocks (Falcon-7B), with K = H it is q k v of each head (GPT-NeoX, BLOOM), between them InternLM2."""

    @staticmethod
    def load(put: Put, ours: Sequence[Tensor], layer: Layer | None) -> None:
        K = layer.mixer.kv_heads
        stored = torch.empty_like(torch.cat([tensor.to("meta") for tensor in ours]), device=ours[0].device)
        put(0, stored)
        for tensor, rows in zip(ours, stored.unflatten(0, (K, -1)).split([len(tensor) // K for tensor in ours], 1)):
            tensor.copy_(rows.flatten(0, 1))

    @staticmethod
    def save(ours: Sequence[Tensor], layer: Layer | None) -> list[Tensor]:
        K = layer.mixer.kv_heads
        return [torch.cat([tensor.unflatten(0, (K, -1)) for tensor in ours], 1).flatten(0, 1)]


class Transposed:
    """As another op, with matrices stored as (in, out); vectors are as they are. GPT-2."""

    def __init__(self, op: Op) -> None:
        self.op = op

    def load(self, put: Put, ours: Sequence[Tensor], layer: Layer | None) -> None:
        self.op.load(lambda k, tensor: put(k, tensor.T if tensor.ndim == 2 else tensor), ours, layer)

    def save(self, ours: Sequence[Tensor], layer: Layer | None) -> list[Tensor]:
        return [tensor.T if tensor.ndim == 2 else tensor for tensor in self.op.save(ours, layer)]
