"""A mixture of experts in which the router's weight goes into an expert, not onto what comes out of it. Llama 4.

    y = Σ_{e ∈ T} expert_e(g_e x) [ + shared(x) ]                     in place of  Σ_{e ∈ T} g_e · expert_e(x)

The two differ, since an expert is not linear: a gated one is near g_e² at small weights. g and T are those of moe.py,
where the experts are too.

Shapes: N tokens in all, D model width, k experts a token.
"""

import torch
from torch import Tensor

from nanollm.layers.moe import MoE


class InputWeightedMoE(MoE):
    """The equation at the head of the file."""

    def routed(self, flat: Tensor) -> Tensor:
        """x (N, D) → (N, D). Each of a token's k experts is given a row of its own, at the weight 1."""
        routed = self.router(flat)
        weighed = (flat[:, None] * routed.weights[..., None]).to(flat.dtype)            # (N, k, D)
        ones = torch.ones_like(routed.weights).view(-1, 1)
        return self.experts(weighed.flatten(0, 1), ones, routed.chosen.view(-1, 1)).view_as(weighed).sum(1)
