"""LoRA: beside a frozen weight W stands the product of two small matrices, and they alone are trained.

    y = W x + b + s · B A dropout(x)        s = α / r                  Hu et al. 2021 (arXiv 2106.09685) §4.1
    rsLoRA   s = α / √r                                                Kalajdzievski 2023 (arXiv 2312.03732) eq. 4
    DoRA     V = W + s B A,   y = (m / ‖V‖) ⊙ V x + b                  Liu et al. 2024 (arXiv 2402.09353) eq. 5
             ‖V‖, of each row, is a constant to the gradient (§4.3); m begins as ‖W‖
    LoRA+    B learns several times as fast as A (tuning.py)           Hayou et al. 2024 (arXiv 2402.12354)

B begins as 0, so that y is W x + b before the first step; lora_weights.py has other beginnings. A, B and m are float32.
Where the layer's numbers have fewer bits, the side path is computed in float32, added to W x + b, and the sum is
rounded: peft's order.

    model = lora.add(model, LoRA(rank=8, alpha=16, targets=("q", "v")))      # in place; all else is frozen
    lora.merge(model)                                                        # W + s B A in the place of each

Shapes: N outputs, K inputs, r rank; W (N, K), A (r, K), B (N, r), m (N,). Experts are stacked, with E in front.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanollm.errors import InputError
from nanollm.init import one, zero
from nanollm.layers.linear import Linear
from nanollm.layers.moe import Experts, SplitExperts, Stacked, joined, split
from nanollm.model import Decoder
from nanollm.training import lora_weights


@dataclass(frozen=True)
class LoRA:
    """What is added to which weights. A target is a part of a name between dots: "q", "ffn", "layers.0.mixer.q"."""
    rank: int
    alpha: float
    dropout: float = 0.0                        # of what A reads, in training
    rslora: bool = False
    dora: bool = False
    targets: Collection[str] = ("all",)         # "all": every Linear and expert in the layers; the router has none
    ranks: Mapping[str, int] = field(default_factory=dict)      # target → a rank of its own, {"o": 4}; the first counts
    alphas: Mapping[str, float] = field(default_factory=dict)   # target → an α of its own
    init: str = "zero"                          # or "pissa", "loftq": lora_weights.py

    def rank_of(self, name: str) -> int:
        """r of the weight of this name."""
        return next((rank for part, rank in self.ranks.items() if has(name, (part,))), self.rank)

    def scale_of(self, name: str) -> float:
        """s of the weight of this name."""
        alpha = next((alpha for part, alpha in self.alphas.items() if has(name, (part,))), self.alpha)
        return alpha / (math.sqrt(self.rank_of(name)) if self.rslora else self.rank_of(name))


def has(name: str, parts: Collection[str]) -> bool:
    """Whether a name has one of these parts between its dots."""
    return any(f".{part}." in f".{name}." for part in parts)


class LoRALinear(nn.Module):
    """A frozen module and what is trained beside it: a Linear, one weight of experts, or what keeps either in fewer
    bits: a module with `shape`, `bias`, and `dense()`, which is W in float32."""
    INIT = {"A": lora_weights.uniform_in, "B": zero, "magnitude": one}       # then lora_weights.begin, which reads W
    FLOAT32 = frozenset({"A", "B", "magnitude"})                                # whatever the dtype of the model

    def __init__(self, base: nn.Module, rank: int, scale: float, dropout: float = 0.0, dora: bool = False) -> None:
        super().__init__()
        self.base, self.scale, self.dropout = base, scale, dropout
        *experts, outputs, inputs = (base.weight if isinstance(base, (Linear, Stacked)) else base).shape  # type: ignore
        device = [*base.parameters(), *base.buffers()][0].device
        self.A = nn.Parameter(torch.empty(*experts, rank, inputs, device=device))
        self.B = nn.Parameter(torch.empty(*experts, outputs, rank, device=device))
        self.magnitude = nn.Parameter(torch.empty(outputs, device=device)) if dora else None
        self.taken: tuple[Tensor, Tensor] | None = None         # by "pissa" out of W: the first A and B

    def forward(self, x: Tensor, expert: int | None = None) -> Tensor:          # (…, K) → (…, N)
        y = self.base(x) if expert is None else self.base(x, expert)
        A, B = (self.A, self.B) if expert is None else (self.A[expert], self.B[expert])
        dropped = F.dropout(x.to(A.dtype), self.dropout, self.training)
        side = self.scale * F.linear(F.linear(dropped, A), B)
        if self.magnitude is None:
            return (y + side).to(y.dtype)
        W = self.frozen().to(A.dtype)
        stretch = self.magnitude / (W + self.scale * B @ A).detach().norm(dim=1)
        if self.dropout and self.training:
            plain = F.linear(dropped, W)
        else:
            plain = y if self.bias is None else y - self.bias
        return (y + (stretch - 1) * plain + stretch * side).to(y.dtype)

    def frozen(self) -> Tensor:
        """W, (N, K) or (E, N, K)."""
        return self.base.weight if isinstance(self.base, (Linear, Stacked)) else self.base.dense()  # type: ignore

    def merged(self) -> Tensor:
        """W + s B A in float32, of DoRA with rows of length m."""
        V = self.frozen().float() + self.scale * self.B.float() @ self.A.float()
        return V if self.magnitude is None else (self.magnitude / V.detach().norm(dim=1))[:, None] * V

    @property
    def weight(self) -> Tensor:
        """The same in the dtype of W, for layers that read a weight and call nothing. Without dropout."""
        return self.merged().to(self.frozen().dtype)

    @property
    def bias(self) -> Tensor | None:
        """b, which is the frozen module's."""
        return self.base.bias  # type: ignore[return-value]  # a Linear's, or of what stands in its place

    def extra_repr(self) -> str:
        return f"rank={self.A.shape[-2]}, scale={self.scale:g}, dropout={self.dropout}"


# ---- a model

def add(model: Decoder, config: LoRA, seed: int = 0, quantise: lora_weights.Quantise | None = None) -> Decoder:
    """Freeze a model, put adapters beside the weights that config names, in place, and return it.

    On the meta device adapters have no values; lora_weights.begin sets them once W is there. quantise: for "loftq".
    Raises InputError, before anything is changed, for a target that no weight has, or can have such an adapter."""
    names = chosen(model, config)
    lora_weights.check(config, quantise, model.layers.modules())
    model.requires_grad_(False)
    model.lora = config  # type: ignore[assignment]  # for whoever writes it; nn.Module declares tensors and modules
    for name in names:
        owner = name.rpartition(".")[0]
        experts = model.get_submodule(owner)
        if isinstance(experts, Experts):
            model.set_submodule(owner, split(experts))
        base = model.get_submodule(name)
        added = LoRALinear(base, config.rank_of(name), config.scale_of(name), config.dropout, config.dora)
        model.set_submodule(name, added.train(base.training))
    if not model.embed.weight.is_meta:
        lora_weights.begin(loras(model), config.init, seed, quantise)
    return model


def targets(model: Decoder) -> dict[str, bool]:
    """The names of all weights that can have an adapter, layers.0.mixer.q …, and whether it is one of experts."""
    names: dict[str, bool] = {}
    for name, module in model.layers.named_modules(prefix="layers"):
        if isinstance(module, (Experts, SplitExperts)):
            names |= dict.fromkeys((f"{name}.{leaf}" for leaf in module.leaves), True)
        elif type(module) is Linear or hasattr(module, "dense"):
            names.setdefault(name, False)
    return names


def chosen(model: Decoder, config: LoRA) -> list[str]:
    """The weights that config names. Raises InputError for a target that is none, and for what no adapter can do."""
    there = targets(model)
    if adapted := loras(model):
        raise InputError(f"{next(iter(adapted))} has an adapter already; merge it first")
    if (least := min(config.rank, *config.ranks.values(), 1)) < 1:
        raise InputError(f"an adapter of rank {least}; expected 1 or more")
    for part in (*config.targets, *config.ranks, *config.alphas):
        if part != "all" and not any(has(name, (part,)) for name in there):
            known = dict.fromkeys(name.rpartition(".")[2] for name in there)
            meant = part.removesuffix("_proj")              # q_proj, as most folders and peft call q
            hint = f" (did you mean {meant}?)" if meant in known else ", which should have an adapter"
            raise InputError(f"no weight of the layers is called {part}{hint}; there are {', '.join(known)}, "
                             f"by full names {next(iter(there))} …, and all")
    names = [name for name in there if "all" in config.targets or has(name, config.targets)]
    if config.dora and (stacked := [name for name in names if there[name]]):
        raise InputError(f"{stacked[0]}: DoRA is for Linears, and this is a weight of experts; name other targets")
    return names


def loras(model: nn.Module) -> dict[str, LoRALinear]:
    """The modules with an adapter, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def adapters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of adapters, by name: layers.0.mixer.q.A …"""
    owners = loras(model)
    return {name: p for name, p in model.named_parameters() if name.rpartition(".")[0] in owners}


@torch.no_grad()
def merge(model: Decoder) -> Decoder:
    """Put W + s B A in the place of each adapter, in place, and return the model, which is a plain one again.

    Computed in float32, and rounded to the dtype of W; where W was quantised, to that of the embedding."""
    dtype = model.embed.weight.dtype
    for name, experts in [pair for pair in model.named_modules() if isinstance(pair[1], SplitExperts)]:
        if loras(experts):
            for leaf in experts.leaves:
                setattr(experts, leaf, lora_weights.plain(getattr(experts, leaf), dtype))
            model.set_submodule(name, joined(experts))
    for name, module in loras(model).items():
        model.set_submodule(name, lora_weights.plain(module, dtype))
    return model.requires_grad_(True)
