"""A product with a weight that is not trained, and not stored in the dtype of the product: made twice, kept never.

    forward     y = x Wᵀ          W made from what is stored, used, freed
    backward    ∂x = ∂y W         W made again                                  there is no ∂W

F.linear would keep W itself until the backward pass: those of all layers at once, a whole model in the dtype of the
product. Here the graph holds what is stored, which is there anyway, and not even x, as no ∂W needs it. So a model in 4
bits is tuned in the memory of 4 bits and one weight (Dettmers et al. 2023, arXiv 2305.14314 §3).

Shapes: N outputs, K inputs.   x (…, K) → y (…, N).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nanollm.layers.linear import Linear


class FrozenProduct(torch.autograd.Function):
    """x Wᵀ, with W = make(dtype of x, *stored). `make` is a function of a module or a partial of one: torch.compile
    follows it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, make: Callable[..., Tensor], *stored: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(*stored)
        ctx.make = make
        return F.linear(x, make(x.dtype, *stored))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        stored = ctx.saved_tensors                              # once: activation checkpointing hands them out once
        return gradient @ ctx.make(gradient.dtype, *stored), None, *(None for _ in stored)


def frozen_linear(x: Tensor, bias: Tensor | None, make: Callable[..., Tensor], *stored: Tensor) -> Tensor:
    """x (…, K) → x Wᵀ + b (…, N)."""
    if x.requires_grad and torch.is_grad_enabled():
        y = FrozenProduct.apply(x, make, *stored)
        return y if bias is None else y + bias.to(y.dtype)
    return F.linear(x, make(x.dtype, *stored), None if bias is None else bias.to(x.dtype))


def as_dtype(dtype: torch.dtype, weight: Tensor) -> Tensor:
    """A weight that is stored in another dtype than the product's."""
    return weight.to(dtype)


class FrozenLinear(Linear):
    """A Linear that is not trained: its weight stays in the dtype that it is stored in, whatever that of x is."""

    def forward(self, x: Tensor) -> Tensor:                                     # (…, K) → (…, N)
        return frozen_linear(x, self.bias, as_dtype, self.weight)
