"""Experts beside an MLP: both read the stream itself, each through a norm of its own, and so does the router.

    x ─┬─ norm ── MLP ───────────── norm ─┐
       ├─ norm ─┬─ experts T, g ─── norm ─ + ─
       │        │
       └─ r̂ ── router                               r̂ = x / rms(x) ⊙ s / √D        s (D,): learned

    z = W_r r̂,   g_e = a_e · softmax(z)_e / Σ_T softmax(z)       T: the k largest;  a (E,): learned, a number an expert

The layer has no norm before the feed-forward, so x comes as it is; that behind the sum is the layer's. The MLP is what
`shared` is in moe.py, where the rest of the router and the experts are. Gemma 4 26B-A4B, 2026.

Shapes: N tokens in all, D model width, E experts, k experts a token.
"""

import torch
from torch import Tensor, nn

from nanollm.config import Norm
from nanollm.config import NormedMoE as NormedMoEConfig
from nanollm.init import one
from nanollm.layers.moe import MoE, Routed, Router
from nanollm.layers.norm import build_norm


class RouterInput(nn.Module):
    """x → r̂."""
    INIT = {"scale": one}

    def __init__(self, config: NormedMoEConfig, dim: int) -> None:
        super().__init__()
        self.norm = build_norm(Norm(eps=config.norm.eps, gain=False), dim)
        self.scale = nn.Parameter(torch.empty(dim))                             # s

    def forward(self, x: Tensor) -> Tensor:                     # (N, D) → (N, D)
        return self.norm(x) * self.scale * x.shape[-1] ** -0.5


class ScaledRouter(Router):
    """W_r and a."""
    INIT = {**Router.INIT, "expert_scale": one}

    def __init__(self, config: NormedMoEConfig, dim: int) -> None:
        super().__init__(config, dim)
        self.expert_scale = nn.Parameter(torch.empty(config.experts))           # a

    def forward(self, x: Tensor) -> Routed:  # type: ignore[override]  # (N, D), as Router
        routed = super().forward(x)
        own = self.expert_scale.expand(len(x), -1).gather(-1, routed.chosen)    # (N, k)
        return routed._replace(weights=routed.weights * own)


class NormedMoE(MoE):
    """The feed-forward at the head of the file."""
    WORDS = MoE.WORDS | {"norm": "experts, MLP and router each with norms of their own: {}"}

    def __init__(self, config: NormedMoEConfig, dim: int) -> None:
        super().__init__(config, dim)
        self.pre_router, self.router = RouterInput(config, dim), ScaledRouter(config, dim)
        self.pre_shared, self.post_shared = build_norm(config.norm, dim), build_norm(config.norm, dim)
        self.pre_experts, self.post_experts = build_norm(config.norm, dim), build_norm(config.norm, dim)

    def forward(self, x: Tensor) -> Tensor:                     # (B, T, D) → (B, T, D)
        assert self.shared is not None, "what the config demands"
        flat = x.flatten(0, -2)                                 # (N, D)
        routed = self.router(self.pre_router(flat))
        y = self.experts(self.pre_experts(flat), routed.weights, routed.chosen)
        return (self.post_shared(self.shared(self.pre_shared(flat))) + self.post_experts(y)).view_as(x)
