"""A feed-forward whose activation bends as it has learned to: a parabola to the right, an exponential to the left.

    y = down( xielu(up x) )

    xielu(x) = α₊ x² + β x                        x > 0          Huang & Schlag 2024 (arXiv 2411.13010)
             = α₋ (e^min(x, ε) − 1 − x) + β x     else           α₊ = softplus(a₊),  α₋ = β + softplus(a₋)

a₊ and a₋ are learned, two numbers a layer; β = 0.5 and ε = −10⁻⁶ are not, but checkpoints hold them. The four are one
parameter, `curve`, in this order, of which only the first two get a gradient.

Shapes: B batch, T tokens, D model width, F feed-forward width.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanollm.config import XIELU as XIELUConfig
from nanollm.init import residual
from nanollm.layers.linear import Linear

FIRST = (math.log(math.expm1(0.8)), math.log(math.expm1(0.3)), 0.5, -1e-6)     # α₊ = α₋ = 0.8


def xielu(x: Tensor, curve: Tensor) -> Tensor:
    """x of any shape, curve (4,): a₊, a₋, β, ε."""
    a_right, a_left = curve[:2]
    beta, eps = curve[2:].detach()
    right, left = F.softplus(a_right), beta + F.softplus(a_left)
    return torch.where(x > 0, right * x * x + beta * x, (torch.expm1(torch.min(x, eps)) - x) * left + beta * x)


class XIELU(nn.Module):
    """The equations at the head of the file."""
    INIT = {"down.weight": residual, "curve": lambda value, stream, depth: value.copy_(torch.tensor(FIRST))}

    def __init__(self, config: XIELUConfig, dim: int) -> None:
        super().__init__()
        self.config = config
        self.up = Linear(dim, config.hidden, bias=False)
        self.down = Linear(config.hidden, dim, bias=False)
        self.curve = nn.Parameter(torch.empty(4))

    def forward(self, x: Tensor) -> Tensor:                     # (B, T, D) → (B, T, D)
        return self.down(xielu(self.up(x), self.curve))

    @staticmethod
    def multiply_adds(config: XIELUConfig, dim: int) -> int:
        return 2 * dim * config.hidden
