"""How a parameter is arranged on disk and how it is arranged here: one class an arrangement, each its own inverse pair.

    Same      one tensor there is one tensor here, element for element
    Stack     one tensor an expert there, (F, D) each; one stacked tensor here, (E, F, D)

`save` says what the stored tensors are, given ours; `load` fills ours from stored ones. Two habits follow from that:

- The shapes that a file must have are never computed by hand: `save`, run on the meta device, is the plan (table.py).
- `save` returns views where it can, and `load` is handed a `put(k, tensor)` that writes the k-th stored tensor into
  memory of ours, straight from the file. `torch.stack` of 128 experts would hold all of them twice.

Shapes: E experts, F feed-forward width, D model width.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

Put = Callable[[int, Tensor], None]


class Op(Protocol):
    def load(self, put: Put, ours: Sequence[Tensor]) -> None:
        """Fill our parameters; `put(k, tensor)` copies the k-th stored tensor of the rule into a tensor of its shape."""

    def save(self, ours: Sequence[Tensor]) -> list[Tensor]:
        """Our parameters as the stored tensors, in the order of the rule."""


class Same:
    """One stored tensor is one parameter."""

    @staticmethod
    def load(put: Put, ours: Sequence[Tensor]) -> None:
        put(0, ours[0])

    @staticmethod
    def save(ours: Sequence[Tensor]) -> list[Tensor]:
        return [ours[0]]


class Stack:
    """One stored tensor an expert; the parameter has the expert as its first dimension."""

    @staticmethod
    def load(put: Put, ours: Sequence[Tensor]) -> None:
        for e, expert in enumerate(ours[0]):     # (F, D), a view of (E, F, D)
            put(e, expert)

    @staticmethod
    def save(ours: Sequence[Tensor]) -> list[Tensor]:
        return list(ours[0])                     # E views
