"""The head of a decoder and its loss in one: logits stand in memory for a few hundred rows at a time.

    logits   l = x Wᵀ,   soft-capped  l = c tanh(x Wᵀ / c)  where a soft cap c is given
    log Z = log Σ_v exp(l_v)         nats = log Z − l_y
    total = Σ_rows nats + z (log Z)²

The gradient is known as soon as the logits are, so the forward pass computes it too, and the backward pass only
multiplies it by what comes in. With p = softmax(l):

    ∂total/∂l = p (1 + 2 z log Z) − 1[v = y],   times 1 − (l/c)² through the soft cap,   0 in rows without a target
    ∂total/∂x = ∂total/∂l · W        ∂total/∂W = (∂total/∂l)ᵀ x,  summed over the pieces in float32

Autograd by itself would keep the logits of all rows, their softmax and its gradient: for 1,024 rows and a vocabulary of
49,152 three times 200 MB. Here PIECE numbers at most are made, turned into their gradient in place, and dropped.

Shapes: n rows, D width, V vocabulary, m rows of a piece.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

PIECE = 2**26           # logits in memory at once: 256 MB in float32. Products of fewer rows are slower on a CPU


class LinearCrossEntropy(torch.autograd.Function):
    """hidden (n, D), weight (V, D), targets (n,) int64 with −100 for none, z, softcap → total, Σ nats, Σ (log Z)²,
    each float32 (). Only the first has a gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, z: float,
                softcap: float | None) -> tuple[Tensor, Tensor, Tensor]:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        d_hidden = torch.empty_like(hidden) if wants_hidden else None
        d_weight: Tensor | None = None
        size, sums = max(1, PIECE // len(weight)), hidden.new_zeros(3, dtype=torch.float32)
        for first in range(0, len(hidden), size):
            x, y = hidden[first : first + size], targets[first : first + size]
            product, real = F.linear(x, weight), (y >= 0).float()                       # (m, V), (m,)
            logits = product.float()                                                    # in float32 the same tensor
            if softcap is not None:
                logits = logits.div_(softcap).tanh_().mul_(softcap)
            chosen, top = logits.gather(-1, y.clamp(min=0)[:, None])[:, 0], logits.amax(-1, keepdim=True)
            slope = None if softcap is None else 1 - (logits / softcap).square()        # (m, V)
            powers = logits.sub_(top).exp_()                                            # exp(l − max), in their place
            mass = powers.sum(-1)
            log_z = mass.log() + top[:, 0]
            nats, squares = log_z - chosen, log_z.square()
            sums += (torch.stack([nats + z * squares, nats, squares]) * real).sum(-1)
            if not wants_hidden and not wants_weight:
                continue
            gradient = powers.mul_((real * (1 + 2 * z * log_z) / mass)[:, None])
            gradient.scatter_add_(-1, y.clamp(min=0)[:, None], -real[:, None])
            gradient = product.copy_(gradient if slope is None else gradient.mul_(slope))
            if d_hidden is not None:
                torch.mm(gradient, weight, out=d_hidden[first : first + size])
            if not wants_weight:
                continue
            if d_weight is None:
                d_weight = gradient.T @ x                       # the whole of it, where there is one piece
            elif hidden.dtype == torch.float32:
                d_weight.addmm_(gradient.T, x)
            else:
                d_weight = d_weight.float().add_(gradient.T @ x)
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.dtype = weight.dtype
        total, nats, squares = (one.clone() for one in sums)
        ctx.mark_non_differentiable(nats, squares)
        return total, nats, squares

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        # in place, as (V, D) may be gigabytes: a second backward pass through this graph is then an error of torch's
        d_hidden, d_weight = ctx.saved_tensors
        return (None if d_hidden is None else d_hidden.mul_(d_total.to(d_hidden.dtype)),
                None if d_weight is None else d_weight.mul_(d_total).to(ctx.dtype), None, None, None)
