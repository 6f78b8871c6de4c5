"""Adam's direction, for optimizers that keep its averages of something smaller than all gradients.

    m ← β₁m + (1 − β₁)g     v ← β₂v + (1 − β₂)g²      m̂ / (√v̂ + ε),  m̂ = m / (1 − β₁ᵗ),  v̂ = v / (1 − β₂ᵗ)
                                                      Kingma & Ba 2014 (arXiv 1412.6980) algorithm 1
"""

from collections.abc import Sequence

from torch import Tensor

EPS = 1e-8                      # torch's default, which AdamW of optim.py has


def direction(g: Tensor, m: Tensor, v: Tensor, t: float, betas: Sequence[float]) -> Tensor:
    """m and v, of the shape of g, are changed in place. t: the steps taken with this one."""
    m.lerp_(g, 1 - betas[0])
    v.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
    return (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + EPS)
