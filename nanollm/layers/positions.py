"""Positions: what they must be, and what of them is added to a token's embedding: a row of a learned table, or sines.

    e = E[token] + P[position + first]          first: rows of P that no position reads; OPT 2, else 0
    e = E[token] + [sin(ω_0 n), …, sin(ω_h n), cos(ω_0 n), …, cos(ω_h n)]      n = position + first,  h = D/2 − 1

    ω_j = 10000^(−j / h)       Vaswani et al. 2017, §3.5, have −2j/D, and sin and cos in turn; this is tensor2tensor's
                               arrangement, which fairseq's models were trained with

Shapes: B batch, T tokens, D model width.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanollm.config import Positions, Sines
from nanollm.config.positions import Table, table_of
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


class SinusoidTable(nn.Module):
    """The sines above, for any position. There is nothing to learn."""

    def __init__(self, config: Sines, dim: int) -> None:
        super().__init__()
        self.first, self.pairs = config.first, dim // 2

    def forward(self, positions: Tensor) -> Tensor:             # (B, T) → (B, T, D) float32
        """Padding (−1) reads what position 0 does."""
        step = math.log(10_000.0) / (self.pairs - 1)
        rates = torch.exp(torch.arange(self.pairs, device=positions.device).float() * -step)         # ω, (D/2,)
        angles = (positions.clamp(min=0) + self.first).float()[..., None] * rates                   # (B, T, D/2)
        return torch.cat([angles.sin(), angles.cos()], -1)


def build_positions(config: Table, dim: int) -> PositionTable | SinusoidTable | None:
    """What a config describes."""
    if config is None:
        return None
    return SinusoidTable(config, dim) if isinstance(config, Sines) else PositionTable(config, dim)


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
