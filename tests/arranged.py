"""Arrangements on whole tensors in memory: what a file would hold of ours, and back."""

import torch

from checkpoints.names.ops import Beside


def stored_tensors(op, ours, layer=None) -> list[torch.Tensor]:
    """The stored tensors of a rule, from its pieces."""
    parts = [[] for _ in op.shapes(ours, layer)]
    for k, piece in op.pieces(ours, layer):
        parts[k].append((piece.dense() if isinstance(piece, Beside) else piece).reshape(-1))
    return [torch.cat(some).view(shape) for some, shape in zip(parts, op.shapes(ours, layer), strict=True)]


def fill(op, stored, ours, layer=None) -> None:
    """The inverse: our tensors from stored ones."""
    left = [tensor.reshape(-1) for tensor in stored]
    for k, piece in op.pieces(ours, layer):
        part, left[k] = left[k].tensor_split([piece.numel()])
        piece.copy_(part if isinstance(piece, Beside) else part.view(piece.shape))
    assert not any(part.numel() for part in left)
