"""Mixture of experts: a router picks k of E small MLPs for each token and mixes what they say.

    z = W_r x [+ b]             router logits
    s = softmax(z)  over all E experts [or σ(z), each by itself], in float32
    T = the k largest of s [+ c], [among the experts of the best groups]; ties: torch.topk's; no token is dropped
    g_e = λ s_e  [/ Σ_T s, renormalised]
    expert_e(x) = down_e( act(gate_e x) ⊙ up_e x )      or without gates  down_e( act(up_e x) )
    y = Σ_{e ∈ T} g_e · expert_e(x)   [ + σ(w·x) · shared(x)  or  shared(x) ]

What is in brackets, and λ, is there where the config has it:

    Mixtral       s softmax, renormalised                                                       arXiv 2401.04088 §2.1
    LFM2          s sigmoid, renormalised with Σ_T s + 1e-6, c as in V3                         arXiv 2511.23404
    DeepSeek-V2   groups: each is as good as its best expert; experts of the others are out     arXiv 2405.04434 §2.2.2
    DeepSeek-V3   s sigmoid, renormalised; c spreads the load: learned beside the gradient,     arXiv 2412.19437 §2.1.2,
                  it counts for the choice and not for g; a group is as good as its             eq. 12-16
                  two best experts together
    Kolibri       s sigmoid; c is added to z, not to s, for the choice
    Phi-3.5-MoE   another rule, `sparse_route`
    Nemotron 3    no gates; in Super and Ultra y = widen Σ g_e · expert_e(narrow x), so that    arXiv 2604.12374
                  experts are small and many; router and shared expert read x itself

Groups, E = 8 in 4 groups of which 2 are kept, each as good as its two best (V3), k = 3:

    s + c           .9 .1 │ .6 .5 │ .2 .7 │ .3 .3        groups 1.0  1.1  0.9  0.6: the first two are kept
    chosen          *     │ *  *  │       │              .7 would have been second of all

Shapes: N tokens in all, D model width, E experts, k experts a token, F width of an expert.
The experts are stacked, gate and up (E, F, D), down (E, D, F), so that one grouped product can run them all.

A router left alone sends everything to few experts; `Balance` in training/losses.py spreads the load.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanollm.config import MLP as MLPConfig
from nanollm.config import ClippedGLU, ExpertGroups, LatentExpert
from nanollm.config import MoE as MoEConfig
from nanollm.config import ScaledMLP as ScaledMLPConfig
from nanollm.init import Draw, matrix, residual, zero
from nanollm.layers.linear import Linear
from nanollm.layers.mlp import MLP, activate
from nanollm.layers.scaled_mlp import ScaledMLP
from nanollm.ops import accelerated

# ---- the router

class Routed(NamedTuple):
    """What a router says: logits z (N, E), weights g (N, k) float32, experts chosen T (N, k) int64."""
    logits: Tensor
    weights: Tensor
    chosen: Tensor


class Router(Linear):
    """W_r, b and c. The config may ask for a product in float32: logits can differ by less than bfloat16 shows."""
    INIT = {**Linear.INIT, "correction": zero}
    FLOAT32 = frozenset({"correction"})         # also in a model loaded in fewer bits: its values differ by as little

    def __init__(self, config: MoEConfig, dim: int) -> None:
        super().__init__(dim, config.experts, config.router_bias)
        self.config = config
        self.correction = nn.Parameter(torch.empty(config.experts)) if config.correction else None

    def forward(self, x: Tensor) -> Routed:  # type: ignore[override]  # (N, D); a router is no Linear to its callers
        if self.config.router_float32:
            logits = F.linear(x.float(), self.weight.float(), None if self.bias is None else self.bias.float())
        else:
            logits = super().forward(x)
        weights, chosen = route(logits, self.config, self.correction)
        return Routed(logits, weights.to(x.dtype).float() if self.config.round_weights else weights, chosen)


def route(logits: Tensor, config: MoEConfig, correction: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Logits z (N, E), c (E,) → weights (N, k) float32, experts (N, k)."""
    if config.sparse is not None:
        weights, chosen = sparse_route(logits, config.top_k, config.sparse)
    else:
        scores = logits.float().sigmoid() if config.score == "sigmoid" else logits.softmax(-1, dtype=torch.float32)
        ranked = logits.float() if config.correction == "logits" else scores
        ranking = ranked if correction is None else ranked + correction
        if config.groups is not None:
            ranking = ranking.masked_fill(~in_best_groups(ranking, config.groups), -torch.inf)
        chosen = ranking.topk(config.top_k, -1).indices
        weights = scores.gather(-1, chosen)
        if config.renormalize:
            least = 1e-20 if config.renormalize is True else config.renormalize     # sigmoids may all be 0
            weights = weights / (weights.sum(-1, keepdim=True) + least)
        if config.scale != 1:
            weights = weights * config.scale
    return weights, chosen


def in_best_groups(ranking: Tensor, groups: ExpertGroups) -> Tensor:
    """(N, E) → bool (N, E): whether an expert belongs to one of the groups that are kept."""
    grouped = ranking.unflatten(-1, (groups.count, -1))                            # (N, groups, E/groups)
    best = grouped.topk(groups.best, -1).values.sum(-1).topk(groups.kept, -1).indices
    kept = torch.zeros(grouped.shape[:-1], dtype=torch.bool, device=ranking.device).scatter(-1, best, True)
    return kept[..., None].expand_as(grouped).flatten(-2)


def sparse_route(logits: Tensor, top_k: int, eps: float) -> tuple[Tensor, Tensor]:
    """SparseMixer-v2 as it infers (Liu et al. 2024, arXiv 2409.12136 §2): the experts are chosen one after the other.

    Each is weighed only against those that come near it, so the weights of the k do not add up to one.

        m    = max_{e ∈ rest} z_e
        near = { e ∈ rest : (m − z_e) / max(|z_e|, m) ≤ 2ε }
        g    = softmax over near, of the best, which then leaves rest

    In training the paper draws an expert from `near` and corrects the gradient; here training takes the best, and the
    plain gradient of g.
    """
    rest, weights, chosen = logits, [], []
    for _ in range(top_k):
        most, best = rest.max(-1, keepdim=True)                                 # (N, 1)
        far = (most - logits) / logits.abs().clamp(min=most) > 2 * eps
        weights.append(rest.masked_fill(far, -torch.inf).softmax(-1, dtype=torch.float32).gather(-1, best))
        chosen.append(best)
        rest = rest.scatter(-1, best, -torch.inf)
    return torch.cat(weights, -1), torch.cat(chosen, -1)


def probabilities(logits: Tensor, config: MoEConfig) -> Tensor:
    """Router logits → the share of a token each expert would get, (N, E) float32; rows add up to 1. For `Balance`."""
    if config.score == "sigmoid":
        return F.normalize(logits.float().sigmoid(), p=1, dim=-1)               # arXiv 2412.19437, eq. 19
    return logits.softmax(-1, dtype=torch.float32)


@contextmanager
def routing(model: nn.Module) -> Iterator[list[Routed]]:
    """Collect what the router of every MoE layer says that runs inside the block, in order."""
    routed: list[Routed] = []
    routers = [module for module in model.modules() if isinstance(module, Router)]
    hooks = [router.register_forward_hook(lambda _, __, out: routed.append(out)) for router in routers]
    try:
        yield routed
    finally:
        for hook in hooks:
            hook.remove()


# ---- the experts

def visits(chosen: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """chosen (N, k) → expert, the tokens that chose it, and as which of their k. Experts without tokens are skipped."""
    if len(chosen) == 1:                                        # one token: its experts one by one, none is sought
        for rank, e in enumerate(chosen[0].tolist()):
            yield e, chosen.new_tensor([0]), chosen.new_tensor([rank])
        return
    for e in chosen.unique().tolist():
        yield e, *torch.where(chosen == e)


@accelerated
def expert_mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, weights: Tensor, chosen: Tensor,
               activation: str) -> Tensor:
    """Σ_{e ∈ T} g_e · expert_e(x), (N, D).

    x (N, D), gate and up (E, F, D), down (E, D, F), weights g (N, k) float32, chosen T (N, k) int64.
    """
    return mixed(x, weights, chosen, lambda own, e: F.linear(
        activate(activation, F.linear(own, gate.select(0, e))) * F.linear(own, up.select(0, e)), down.select(0, e)))


def mixed(x: Tensor, weights: Tensor, chosen: Tensor, expert: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Σ_{e ∈ T} g_e · expert(x, e), (N, D). Each expert runs once, on the tokens that chose it."""
    y = torch.zeros_like(x)
    for e, token, rank in visits(chosen):
        out = expert(x[token], e)
        y = y.index_add(0, token, (out * weights[token, rank, None]).to(x.dtype))
    return y


def gated(config: MLPConfig | ClippedGLU, gate: Tensor | None, up: Tensor) -> Tensor:
    """What an expert hands to down, of gate_e x, if there is a gate, and up_e x."""
    if gate is None:
        assert isinstance(config, MLPConfig)
        return activate(config.activation, up)
    if isinstance(config, MLPConfig):
        return activate(config.activation, gate) * up
    gate, up = gate.clamp(max=config.limit), up.clamp(-config.limit, config.limit)
    return gate * torch.sigmoid(config.slope * gate) * (up + 1)


class Experts(nn.Module):
    """The weights of E gated MLPs side by side."""
    INIT: dict[str, Draw] = {"gate": matrix, "up": matrix, "down": residual}
    leaves: tuple[str, ...] = ("gate", "up", "down")

    def __init__(self, experts: int, config: MLPConfig | ClippedGLU, dim: int) -> None:
        super().__init__()
        self.config = config
        self.gate = nn.Parameter(torch.empty(experts, config.hidden, dim))
        self.up = nn.Parameter(torch.empty(experts, config.hidden, dim))
        self.down = nn.Parameter(torch.empty(experts, dim, config.hidden))

    def forward(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:    # (N, D), (N, k), (N, k) → (N, D)
        assert isinstance(self.config, MLPConfig), "ClippedExperts have a forward of their own"
        return expert_mlp(x, self.gate, self.up, self.down, weights, chosen, self.config.activation)


class PlainExperts(Experts):
    """The same without gates."""
    leaves = "up", "down"

    def __init__(self, experts: int, config: MLPConfig, dim: int) -> None:
        nn.Module.__init__(self)
        self.config = config
        self.up = nn.Parameter(torch.empty(experts, config.hidden, dim))
        self.down = nn.Parameter(torch.empty(experts, dim, config.hidden))

    def forward(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:    # (N, D), (N, k), (N, k) → (N, D)
        return mixed(x, weights, chosen, lambda own, e: F.linear(
            gated(self.config, None, F.linear(own, self.up.select(0, e))), self.down.select(0, e)))


class ClippedExperts(Experts):
    """The same with biases, and with an activation that cannot grow without bound (gpt-oss):

        g = min(gate_e x + b, limit),    u = clip(up_e x + b, ± limit)
        expert_e(x) = down_e( g σ(α g) ⊙ (u + 1) ) + b
    """
    INIT = {**Experts.INIT, "gate_bias": zero, "up_bias": zero, "down_bias": zero}

    def __init__(self, experts: int, config: ClippedGLU, dim: int) -> None:
        super().__init__(experts, config, dim)
        self.gate_bias = nn.Parameter(torch.empty(experts, config.hidden))
        self.up_bias = nn.Parameter(torch.empty(experts, config.hidden))
        self.down_bias = nn.Parameter(torch.empty(experts, dim))

    def forward(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:    # (N, D), (N, k), (N, k) → (N, D)
        def expert(own: Tensor, e: int) -> Tensor:
            gate, up = self.product("gate", own, e), self.product("up", own, e)
            return self.product("down", gated(self.config, gate, up), e)

        return mixed(x, weights, chosen, expert)

    def product(self, leaf: str, x: Tensor, e: int) -> Tensor:
        """leaf_e x + b, (n, K) → (n, N)."""
        return F.linear(x, getattr(self, leaf).select(0, e), getattr(self, f"{leaf}_bias").select(0, e))


class Stacked(nn.Module):
    """One of the three weights of experts, (E, N, K), as a module: N outputs, K inputs."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x: Tensor, expert: int) -> Tensor:        # (n, K) → (n, N)
        bias = None if self.bias is None else self.bias.select(0, expert)
        return F.linear(x, self.weight.select(0, expert), bias)


class SplitExperts(nn.Module):
    """Experts whose weights are modules, quantised or with adapters, called with x and an expert's number."""

    def __init__(self, config: MLPConfig | ClippedGLU, up: nn.Module, down: nn.Module,
                 gate: nn.Module | None = None) -> None:
        super().__init__()
        self.config, self.gate, self.up, self.down = config, gate, up, down
        self.leaves = kind_of(config).leaves

    def forward(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:    # (N, D), (N, k), (N, k) → (N, D)
        def expert(own: Tensor, e: int) -> Tensor:
            gate = None if self.gate is None else self.gate(own, e)
            return self.down(gated(self.config, gate, self.up(own, e)), e)

        return mixed(x, weights, chosen, expert)


def kind_of(config: MLPConfig | ClippedGLU) -> type[Experts]:
    """The experts that a config describes."""
    if isinstance(config, ClippedGLU):
        return ClippedExperts
    return Experts if config.gated else PlainExperts


def split(experts: Experts) -> SplitExperts:
    """The same experts, each of the weights in a module of its own."""
    parts = {leaf: Stacked(getattr(experts, leaf), getattr(experts, f"{leaf}_bias", None)) for leaf in experts.leaves}
    return SplitExperts(experts.config, **parts).train(experts.training)


def joined(experts: SplitExperts) -> Experts:
    """The inverse: the parts have a `weight` and a `bias`."""
    whole = kind_of(experts.config)(0, experts.config, 0)
    for leaf in experts.leaves:
        setattr(whole, leaf, getattr(experts, leaf).weight)
        if isinstance(whole, ClippedExperts):
            setattr(whole, f"{leaf}_bias", getattr(experts, leaf).bias)
    return whole.train(experts.training)


class MoE(nn.Module):
    """Route, run the chosen experts on the tokens that chose them, add up."""
    INIT = {"widen.weight": residual}
    WORDS = {
        "renormalize": {True: "their weights divided by their sum", float: "their weights divided by their sum + {}"},
        "shared": "every token goes to {} too",
        "shared_gate": "which has a gate of its own",
        "score": {"sigmoid": "scores are sigmoids"},
        "correction": {True: "a bias for the choice and not for the weight",
                       "logits": "a bias on the logits, for the choice and not for the weight"},
        "groups": "of the best groups only: {}",
        "scale": "the weights times {}",
        "sparse": "each choice weighed against those within {} of it",
        "router_bias": "a bias on the router",
        "router_float32": "the router in float32",
        "round_weights": "the weights rounded to the working dtype",
    }

    def __init__(self, config: MoEConfig, dim: int) -> None:
        super().__init__()
        self.config = config
        self.router = Router(config, dim)
        (one, width), latent = inside(config, dim), isinstance(config.expert, LatentExpert)
        self.narrow = Linear(dim, width, bias=False) if latent else None
        self.widen = Linear(width, dim, bias=False) if latent else None
        self.experts: nn.Module = kind_of(one)(config.experts, one, width)
        self.shared = None if config.shared is None else kind_of_shared(config.shared)(config.shared, dim)
        self.shared_gate = Linear(dim, 1, bias=False) if config.shared_gate else None

    def forward(self, x: Tensor) -> Tensor:                     # (B, T, D) → (B, T, D)
        flat = x.flatten(0, -2)                                 # (N, D)
        y = self.routed(flat)
        if self.shared is not None:
            shared = self.shared(flat)
            y = y + (shared if self.shared_gate is None else torch.sigmoid(self.shared_gate(flat)) * shared)
        return y.view_as(x)

    def routed(self, flat: Tensor) -> Tensor:
        """What a token's own experts say, (N, D) → (N, D)."""
        routed = self.router(flat)
        if self.narrow is None or self.widen is None:
            return self.experts(flat, routed.weights, routed.chosen)
        return self.widen(self.experts(self.narrow(flat), routed.weights, routed.chosen))

    @staticmethod
    def multiply_adds(config: MoEConfig, dim: int) -> int:
        """Experts count where they are chosen."""
        (one, width), latent = inside(config, dim), isinstance(config.expert, LatentExpert)
        experts = config.top_k * len(kind_of(one).leaves) * width * one.hidden + 2 * dim * width * latent
        shared = kind_of_shared(config.shared).multiply_adds(config.shared, dim) if config.shared else 0
        return experts + dim * config.experts + shared + dim * config.shared_gate


def kind_of_shared(config: MLPConfig | ScaledMLPConfig) -> Any:
    """The module of the expert that every token visits."""
    return MLP if isinstance(config, MLPConfig) else ScaledMLP


def inside(config: MoEConfig, dim: int) -> tuple[MLPConfig | ClippedGLU, int]:
    """What an expert is, and the width of what it reads."""
    one = config.expert
    return (one.mlp, one.width) if isinstance(one, LatentExpert) else (one, dim)
