"""Positions: what they must be, and the learned table of them, whose row is added to a token's embedding.

    e = E[token] + P[position + first]          first: rows of P that no position reads; OPT 2, else 0

Shapes: B batch, T tokens, D model width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanollm.config import Positions
from nanollm.config.positions import table_of
from nanollm.errors import InputError
from nanollm.init import normal


class PositionTable(nn.Module):
    """P above, a parameter of so many rows."""
    INIT = {"weight": normal(0.02)}

    def __init__(self, config: int | Positions, dim: int) -> None:
        super().__init__()
        rows, self.first = table_of(config)
        self.weight = nn.Parameter(torch.empty(rows, dim))

    def forward(self, positions: Tensor) -> Tensor:             # (B, T) → (B, T, D)
        """Padding (−1) reads what position 0 does. Raises InputError past the last row."""
        most = len(self.weight) - self.first
        demand(positions < most, f"the model has {most} positions, "
               f"from 0 to {most - 1}; it cannot read a longer sequence")
        return F.embedding(positions.clamp(min=0) + self.first, self.weight)


def check_positions(positions: Tensor) -> None:
    """Positions (B, T) must rise by one inside a document. Raises InputError."""
    risen = (positions[:, 1:] <= 0) | (positions[:, 1:] == positions[:, :-1] + 1)
    demand(risen, "positions rise by one inside a document; 0 begins one, -1 is padding between them")


def demand(holds: Tensor, message: str) -> None:
    """holds (B, n) must be true everywhere. Raises InputError with the first place where it is not.

    On a GPU the check does not wait for the device, which says so later.
    """
    if holds.is_cuda:
        torch._assert_async(holds.all(), message)
    elif not holds.all():
        row, column = (~holds).nonzero()[0].tolist()
        raise InputError(f"{message} (row {row}, token {column})")
