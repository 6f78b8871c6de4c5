"""GaLore: AdamW on gradients that are projected to rank r, so its two averages have r columns and not m.

    every T steps   P ← the first r right singular vectors of G
    every step      R = G Pᵀ                                        the gradient's coordinates in that subspace
                    M ← β₁M + (1 − β₁)R     V ← β₂V + (1 − β₂)R²
                    w ← w − η (α (M̂ / (√V̂ + ε)) P + λw)             Zhao et al. 2024 (arXiv 2403.03507) algorithm 2

    bytes of state, float32     AdamW 8nm     GaLore 8nr + 4rm, which is a third of it for n = m and r = m/4.5

Shapes: G, w (n, m) with n ≥ m; a wide matrix is turned first, so P has its left singular vectors. P (r, m); R, M, V
(n, r). Of stacked experts with E in front. α scales the update in the matrices; the paper pretrains with 0.25.

M and V stay as they are when P changes, as in the authors' code, although they are coordinates in the old subspace.
What is not saved: a gradient is whole until the step is over (the authors also free each in the backward pass). And an
SVD needs the whole matrix, so this is for one device.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nanollm.training.adam import direction


class GaLore(torch.optim.Optimizer):
    """For matrices whose smaller side is above the rank, and stacks of them."""

    def __init__(self, params: Sequence[nn.Parameter], weight_decay: float, betas: Sequence[float], rank: int,
                 every: int, scale: float) -> None:
        """rank: r; every: T; scale: α."""
        super().__init__(params, {"lr": 0.0, "lr_scale": 1.0, "weight_decay": weight_decay})
        self.betas, self.every, self.scale = betas, every, scale
        for p in params:                                            # as the first step would make it: see optim.py
            *experts, n, m = tall(p).shape
            self.state[p] = {
                "step": torch.zeros(()),                            # on the CPU: it decides when P is made anew
                "projection": p.new_zeros(*experts, rank, m),
                "exp_avg": p.new_zeros(*experts, n, rank),
                "exp_avg_sq": p.new_zeros(*experts, n, rank),
            }

    # override: torch's step also takes a closure, for which there is no use here
    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of every matrix that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                P = state["projection"]
                if state["step"] % self.every == 0:
                    P.copy_(subspace(p.grad, P.shape[-2]))
                state["step"] += 1
                R = tall(p.grad) @ P.mT
                N = direction(R, state["exp_avg"], state["exp_avg_sq"], state["step"].item(), self.betas)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                tall(p).add_(N @ P, alpha=-group["lr"] * self.scale)


def tall(matrix: Tensor) -> Tensor:
    """(…, n, m) with n ≥ m: the matrix itself, or a view of it turned over."""
    return matrix.mT if matrix.shape[-2] < matrix.shape[-1] else matrix


def subspace(G: Tensor, rank: int) -> Tensor:
    """P (…, r, m). The SVD is that of G as it lies: it decides the sign of a vector, and M outlives P."""
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    return Vh[..., :rank, :] if G.shape[-2] >= G.shape[-1] else U[..., :rank].mT
