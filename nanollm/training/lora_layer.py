"""LoRA: beside a frozen weight W stands the product of two small matrices, and they alone are trained.

    y = W x + b + s · B A dropout(x)        s = α / r                  Hu et al. 2021 (arXiv 2106.09685) §4.1
    rsLoRA   s = α / √r                                                Kalajdzievski 2023 (arXiv 2312.03732) eq. 4
    DoRA     V = W + s B A,   y = (m / ‖V‖) ⊙ V x + b                  Liu et al. 2024 (arXiv 2402.09353) eq. 5
             ‖V‖, of each row, is a constant to the gradient (§4.3); m begins as ‖W‖
    LoRA+    B learns several times as fast as A (tuning.py)           Hayou et al. 2024 (arXiv 2402.12354)

B begins as 0, so that y is W x + b before the first step; lora_weights.py has other beginnings. A, B and m are float32.
Where the layer's numbers have fewer bits, the side path is computed in float32, added to W x + b, and the sum is
rounded: peft's order.

Shapes: N outputs, K inputs, r rank; W (N, K), A (r, K), B (N, r), m (N,). Experts are stacked, with E in front.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanollm.init import one, zero
from nanollm.layers.linear import Linear
from nanollm.layers.moe import Stacked


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


def uniform_in(value: Tensor, draw: torch.Generator, depth: int) -> Tensor:
    """U(−1/√K, 1/√K)."""
    return value.uniform_(-(value.shape[-1] ** -0.5), value.shape[-1] ** -0.5, generator=draw)


class LoRALinear(nn.Module):
    """A frozen module and what is trained beside it: a Linear, one weight of experts, or what keeps either in fewer
    bits: a module with `shape`, `bias`, and `dense()`, which is W in float32."""
    INIT = {"A": uniform_in, "B": zero, "magnitude": one}       # then lora_weights.begin, which reads W
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
