"""Mixture of experts: a router picks k of E small MLPs for each token and mixes what they say.

    p = softmax(W_r x)  over all E experts, in float32
    T = the k largest of p;     g_e = p_e,  or  p_e / Σ_{T} p  where the config renormalises (Mixtral, arXiv 2401.04088 §2.1)
    expert_e(x) = down_e( act(gate_e x) ⊙ up_e x )
    y = Σ_{e ∈ T} g_e · expert_e(x)   [ + σ(w·x) · shared(x) ]

Shapes: N tokens in all, D model width, E experts, k experts a token, F width of an expert.
The experts are stacked, gate and up (E, F, D), down (E, D, F), so that one grouped product can run them all.

A router left alone sends everything to few experts; `losses.Balance` spreads the load.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanollm.config import MoE as MoEConfig
from nanollm.linear import Linear
from nanollm.mlp import MLP, activate
from nanollm.ops import accelerated


@accelerated
def expert_mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, weights: Tensor, chosen: Tensor, activation: str) -> Tensor:
    """Σ_{e ∈ T} g_e · expert_e(x): x (N, D), gate and up (E, F, D), down (E, D, F), weights g (N, k) float32, chosen T (N, k) int64 → (N, D)."""
    y = torch.zeros_like(x)
    for e in chosen.unique().tolist():                          # experts that no token chose cost nothing
        token, rank = torch.where(chosen == e)
        own = x[token]
        out = F.linear(activate(activation, F.linear(own, gate[e])) * F.linear(own, up[e]), down[e])
        y = y.index_add(0, token, (out * weights[token, rank, None]).to(x.dtype))
    return y


class Experts(nn.Module):
    """The weights of E gated MLPs side by side."""

    def __init__(self, experts: int, hidden: int, dim: int, activation: str) -> None:
        super().__init__()
        self.activation = activation
        self.gate = nn.Parameter(torch.empty(experts, hidden, dim))
        self.up = nn.Parameter(torch.empty(experts, hidden, dim))
        self.down = nn.Parameter(torch.empty(experts, dim, hidden))


class MoE(nn.Module):
    """Route, run the chosen experts on the tokens that chose them, add up."""

    def __init__(self, config: MoEConfig, dim: int) -> None:
        super().__init__()
        self.config = config
        self.router = Linear(dim, config.experts, bias=False)
        self.experts = Experts(config.experts, config.expert.hidden, dim, config.expert.activation)
        self.shared = None if config.shared is None else MLP(config.shared, dim)
        self.shared_gate = Linear(dim, 1, bias=False) if config.shared_gate else None

    def forward(self, x: Tensor) -> Tensor:                     # (B, T, D) → (B, T, D)
        flat = x.flatten(0, -2)                                 # (N, D)
        weights, chosen = route(self.router(flat), self.config.top_k, self.config.renormalize)
        y = expert_mlp(flat, self.experts.gate, self.experts.up, self.experts.down, weights, chosen, self.experts.activation)
        if self.shared is not None:
            shared = self.shared(flat)
            y = y + (shared if self.shared_gate is None else torch.sigmoid(self.shared_gate(flat)) * shared)
        return y.view_as(x)


def route(logits: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """Router logits (N, E) → weights (N, k) float32, experts (N, k). Softmax over all experts comes before the choice."""
    weights, chosen = logits.softmax(-1, dtype=torch.float32).topk(top_k, -1)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, chosen


@contextmanager
def routing(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the router logits (N, E) of every MoE layer that runs inside the block, in order."""
    logits: list[Tensor] = []
    hooks = [m.router.register_forward_hook(lambda _, __, out: logits.append(out)) for m in model.modules() if isinstance(m, MoE)]
    try:
        yield logits
    finally:
        for hook in hooks:
            hook.remove()
