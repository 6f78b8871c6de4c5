"""Which rows of a stored weight are which rows of ours. An adapter's B, and m of DoRA, are arranged as the rows of W.

    qkv_proj of Phi-3      rows  q q q q k k v v        q = rows 0 to 3, k = rows 4 and 5, v = rows 6 and 7
    gate_up_proj, experts  rows  g g u u in each        gate of expert e = rows 0 and 1 of expert e
    c_attn of GPT-2        columns; peft's B has rows   as qkv_proj

Nothing new is said about any family: the rows of our weights are numbered, and the family's own table arranges the
numbers. What does more than move rows, such as one of our weights out of two of theirs, can have no adapter.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from checkpoints.names.ops import Beside
from checkpoints.names.table import Step


class Place(NamedTuple):
    """Where the rows of a matrix of ours are: our i-th row is rows[i] of one matrix of theirs."""
    stored: int                                  # of the step's stored tensors
    expert: int | None                           # of a stored tensor with three dimensions
    rows: Tensor


class Arrangement(NamedTuple):
    """What a step does to rows."""
    places: dict[tuple[int, int | None], Place]  # (number of our weight, expert or None) → where it is
    shapes: list[tuple[int, ...]]                # of the stored tensors, (N, K) or (E, N, K), turned to have rows
    transposed: bool


def arrangement(step: Step, parameters: Mapping[str, Tensor]) -> Arrangement | None:
    """None where the step does more than move rows. `parameters` may be on the meta device."""
    ours = [parameters[name] for name in step.ours]
    if any(one.ndim not in (2, 3) for one in ours):
        return None
    marks, count = [], 0                         # (…, N, 3): row n, of all weights together, is 3 n, 3 n + 1, 3 n + 2
    for one in ours:
        rows = one.shape[:-1].numel()
        marks.append(torch.arange(3 * count, 3 * (count + rows)).view(*one.shape[:-1], 3))
        count += rows
    found: list[list[Tensor]] = []
    try:
        shapes = step.op.shapes(marks, step.layer)
        found = [[] for _ in shapes]
        for k, piece in step.op.pieces(marks, step.layer):
            found[k].append((piece.dense() if isinstance(piece, Beside) else piece).flatten())
    except RuntimeError:                         # it takes columns apart, of which there are three
        return None
    stored = [torch.cat(parts).view(shape) for parts, shape in zip(found, shapes, strict=True)]
    transposed = not all(map(_by_rows, stored))
    if transposed:
        stored = [one.transpose(-1, -2) for one in stored]
    if not all(map(_by_rows, stored)):
        return None
    matrix, row = torch.empty(count, dtype=torch.long), torch.empty(count, dtype=torch.long)
    theirs: list[tuple[int, int | None]] = []    # the matrices of the stored tensors
    for k, one in enumerate(stored):
        numbers = one[..., 0] // 3
        for e, own in enumerate(numbers) if one.ndim == 3 else [(None, numbers)]:
            matrix[own], row[own] = len(theirs), torch.arange(len(own))
            theirs.append((k, e))
    places: dict[tuple[int, int | None], Place] = {}
    at = 0
    for j, one in enumerate(ours):
        for e in range(len(one)) if one.ndim == 3 else [None]:
            mine = slice(at, at + one.shape[-2])
            at += one.shape[-2]
            if bool((matrix[mine] != matrix[mine][0]).any()):
                return None                      # rows of two of theirs
            places[j, e] = Place(*theirs[int(matrix[mine][0])], row[mine])
    K = ours[0].shape[-1]
    return Arrangement(places, [(*one.shape[:-1], K) for one in stored], transposed)


def _by_rows(stored: Tensor) -> bool:
    """Whether numbered rows are still rows."""
    return (stored.ndim in (2, 3) and stored.shape[-1] == 3 and
            bool((stored == stored[..., :1] // 3 * 3 + torch.arange(3)).all()))
