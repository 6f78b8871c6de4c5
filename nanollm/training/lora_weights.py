"""The two ends of an adapter: where A, B and m begin, and the plain weight that is left when they are merged.

    zero       A is U(−1/√K, 1/√K), which is Kaiming's rule with a = √5, and B is 0
    pissa      W = U S Vᵀ, of which the first r: A = √(S/s) Vᵀ, B = U √(S/s); then W ← W − s B A. So the largest
               directions are trained, and the rest is frozen      Meng et al. 2024 (arXiv 2404.02948) eq. 2-4
    loftq      Q ← quantise(W − s B A), then A, B from the first r directions of W − Q, several times, from B = 0 on:
               what quantising lost is in the adapter              Li et al. 2023 (arXiv 2310.08659) algorithm 1

Shapes: N outputs, K inputs, r rank; W (N, K), A (r, K), B (N, r), m (N,); of stacked experts with E in front.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nanollm.errors import InputError
from nanollm.init import stream
from nanollm.layers.linear import Linear
from nanollm.layers.moe import Stacked
from nanollm.training.lora_layer import LoRA, LoRALinear, uniform_in

INITS = ("zero", "pissa", "loftq")
LOFTQ_STEPS = 5                                 # T of the paper's experiments
Quantise = Callable[[Tensor, Tensor | None], Any]               # W float32, b → what keeps them, with `dense()`


def check(config: LoRA, quantise: Quantise | None, bases: Iterable[nn.Module]) -> None:
    """Raise InputError for numbers out of bounds, and for a beginning that these weights cannot have."""
    init = config.init
    if not 0 <= config.dropout < 1:
        raise InputError(f"an adapter with dropout {config.dropout}; expected 0 or more, below 1")
    if not min(config.alpha, *config.alphas.values(), math.inf) > 0:
        raise InputError(f"an adapter with alpha {min(config.alpha, *config.alphas.values(), math.inf)}; expected more "
                         "than 0")
    if init not in INITS:
        raise InputError(f"init {init!r}; expected one of {', '.join(INITS)}")
    if init == "loftq" and quantise is None:
        raise InputError("init loftq is for weights that are quantised as the adapter begins, and no quantise is given")
    if init != "zero" and any(hasattr(base, "dense") for base in bases):
        raise InputError(f"init {init} needs the weights as they were before they were quantised")


@torch.no_grad()
def begin(modules: Mapping[str, LoRALinear], init: str = "zero", seed: int = 0,
          quantise: Quantise | None = None) -> None:
    """The first values of adapters, whose W is there. They follow from seed, name and W."""
    for name, module in modules.items():
        uniform_in(module.A, stream(f"{name}.A", seed, module.A.device), 0)
        module.B.zero_()
        W, rank, s = module.frozen(), module.A.shape[-2], module.scale
        if init == "pissa":
            module.taken = leading(W, rank, s)
            begin_with(module, *module.taken)
            W.copy_(W.float() - s * module.B @ module.A)
        elif init == "loftq":
            assert quantise is not None, "checked"
            for _ in range(LOFTQ_STEPS):
                module.base = quantise(W.float() - s * module.B @ module.A, module.bias)
                begin_with(module, *leading(W - module.frozen(), rank, s))
        if module.magnitude is not None:
            module.magnitude.copy_((module.frozen().float() + s * module.B @ module.A).norm(dim=1))


def begin_with(module: LoRALinear, A: Tensor, B: Tensor) -> None:
    """Set A and B."""
    module.A.copy_(A)
    module.B.copy_(B)


def leading(W: Tensor, rank: int, s: float) -> tuple[Tensor, Tensor]:
    """A and B whose s B A is the first `rank` directions of W, float32."""
    U, S, Vh = torch.linalg.svd(W.float(), full_matrices=False)
    root = (S[..., :rank] / s).sqrt()
    return root[..., None] * Vh[..., :rank, :], U[..., :rank] * root[..., None, :]


def plain(module: Any, dtype: torch.dtype) -> nn.Module:
    """The Linear, or the weight of experts, that a module with an adapter or a quantised one stands for.

    dtype: of what was quantised; other weights keep theirs."""
    base = getattr(module, "base", module)
    if isinstance(module, Stacked):
        return module
    W = module.dense() if base is module else module.merged()
    W = nn.Parameter(W.to(base.weight.dtype if isinstance(base, (Linear, Stacked)) else dtype))
    bias = None if base.bias is None else nn.Parameter(base.bias.detach())
    if W.ndim == 3:
        return Stacked(W, bias).train(module.training)
    linear = Linear(W.shape[1], W.shape[0], bias is not None, device="meta")
    linear.weight = W
    linear.register_parameter("bias", bias)
    return linear.train(module.training)
