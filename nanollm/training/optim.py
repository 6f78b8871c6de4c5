"""What turns gradients into steps: which optimizer has which parameter, Muon, and the learning-rate schedule.

    AdamW     m ← β₁m + (1 − β₁)g     v ← β₂v + (1 − β₂)g²     w ← w − η (m̂ / (√v̂ + ε) + λw)    Loshchilov & Hutter 2017
    Muon      M ← μM + (1 − μ)G       w ← w − η (0.2 √max(n, m) · msign((1 − μ)G + μM) + λw)     Jordan et al. 2024

msign(M) = U Vᵀ of M = U S Vᵀ is the orthogonal matrix nearest to M (n, m), so all directions of a matrix learn alike.
It is not computed by an SVD but by a polynomial that drives all singular values towards 1 (Newton–Schulz, five times):

    X ← aX + (bA + cA²)X,   A = X Xᵀ       (a, b, c) = (3.4445, −4.7750, 2.0315), X₀ = M / ‖M‖
                                                                             kellerjordan.github.io/posts/muon

0.2 √max(n, m) makes a step as long as AdamW's commonly are, so one learning rate does for both (Liu et al. 2025, arXiv
2502.16982 §2.2).

torch.optim.Muon computes the same for one process; a test holds this one to it. This one also takes shards (each matrix
is gathered once and orthogonalised by one rank, in turn) and stacked experts (E, n, m), orthogonalises matrices of one
shape as one batch, and works in float32 where the run does, so that N ranks give what one gives.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nanollm.layers.linear import Linear
from nanollm.layers.moe import Experts
from nanollm.model import Decoder
from nanollm.training.distributed import local, local_shard

SCHEDULES = ("cosine", "linear", "wsd")
BATCH = 2**24       # numbers in one batched product of Muon: small matrices share it, larger ones go alone


# ---- the learning-rate schedule

def lr_factor(step: int, steps: int, warmup: int, schedule: str, decay: float = 0.2) -> float:
    """The factor of the peak learning rate in step 0 … steps − 1: a function of the step, so nothing of it is saved.

        cosine   ╱‾╲_    up in a line over `warmup` steps, then half a cosine to 0      Loshchilov & Hutter 2016
        linear   ╱╲      then a line to 0                                               (arXiv 1608.03983)
        wsd      ╱‾‾╲    then level, and a line to 0 over the last `decay` of the steps     Hu et al. 2024
                                                                                        (arXiv 2404.06395) §4
    The first step has 1/warmup of the rate and the last a little more than 0: none is wasted.
    """
    up = min(1.0, (step + 1) / warmup) if warmup else 1.0
    left = (steps - step) / max(1, steps - max(warmup, 1) + 1)  # 1 where the warm-up ends, 0 just past the last step
    match schedule:
        case "cosine":
            down = 0.5 - 0.5 * math.cos(math.pi * min(1.0, left))
        case "linear":
            down = min(1.0, left)
        case "wsd":
            down = min(1.0, (steps - step) / max(1.0, decay * steps))
    return up * down


# ---- who has which parameter

def build(model: Decoder, name: str, weight_decay: float, dtype: torch.dtype) -> list[torch.optim.Optimizer]:
    """Every parameter in exactly one group. Matrices inside the layers belong to `name`, embedding and head to AdamW,
    and both decay; gains, biases and what a scan keeps go to AdamW without decay. What AdamW has beside Muon learns 1.5
    times as fast, which was measured to be better (group["lr_scale"])."""
    matrices: list[nn.Parameter] = []
    tables: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    owners = [module for module in model.layers.modules() if isinstance(module, (Linear, Experts))]
    inside = {id(p) for owner in owners for key, p in owner.named_parameters(recurse=False)
              if p.ndim > 1 and not key.endswith("bias")}
    for key, p in model.named_parameters():
        is_table = key in ("embed.weight", "positions.weight", "head.weight")
        (matrices if id(p) in inside else tables if is_table else rest).append(p)
    lr_scale = 1.5 if name == "muon" else 1.0
    outer = [{"params": tables, "weight_decay": weight_decay, "lr_scale": lr_scale},
             {"params": rest, "weight_decay": 0.0, "lr_scale": lr_scale}]
    optimizers: list[torch.optim.Optimizer]
    if name == "muon":
        optimizers = [Muon(matrices, weight_decay, dtype), adamw(outer)]
    else:
        optimizers = [adamw([{"params": matrices, "weight_decay": weight_decay, "lr_scale": 1.0}, *outer])]
    init_state(optimizers)
    return optimizers


def adamw(groups: list[dict]) -> torch.optim.Optimizer:
    """torch's, over the groups that have parameters."""
    return torch.optim.AdamW([group for group in groups if group["params"]], betas=(0.9, 0.95), fused=True)


def step(optimizers: Iterable[torch.optim.Optimizer], lr: float) -> None:
    """One step of all optimizers at this learning rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        optimizer.step()


def init_state(optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Make the state that the first step would make, zeros: from step 0 on a checkpoint has the same tensors."""
    for optimizer in optimizers:
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            names = ("momentum",) if isinstance(optimizer, Muon) else ("exp_avg", "exp_avg_sq")
            optimizer.state[p] = {name: torch.zeros_like(p) for name in names}
            if not isinstance(optimizer, Muon):
                optimizer.state[p]["step"] = torch.zeros((), device=p.device)


def tensors(model: Decoder, optimizers: Iterable[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """All that a step changes, by name: parameters, and the state of the optimizers for each."""
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    found: dict[str, Tensor] = {f"model.{name}": p for p, name in names.items()}
    for optimizer in optimizers:
        for p, state in optimizer.state.items():
            found |= {f"optimizer.{names[p]}.{key}": value for key, value in state.items()}
    return found


# ---- Muon

class Muon(torch.optim.Optimizer):
    """For matrices (n, m), whole or sharded, and stacks of them (E, n, m). State: one momentum for each, in float32."""

    def __init__(
        self, params: Iterable[Tensor], weight_decay: float, dtype: torch.dtype, momentum: float = 0.95,
    ) -> None:
        """dtype is that of the products inside msign."""
        super().__init__(params, {"lr": 0.0, "lr_scale": 1.0, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:            # type: ignore[override]
        """One step of every matrix. Matrices of one shape (n, m) or (m, n) are orthogonalised together, as one batched
        product. Of W ranks each takes its share of them: a matrix is gathered, orthogonalised by one rank, and
        broadcast to the others."""
        ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        for group in self.param_groups:
            shapes: dict[tuple[int, ...], list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault((*p.shape[:-2], *sorted(p.shape[-2:])), []).append(p)
            for shape, params in shapes.items():
                size = ranks * max(1, BATCH // math.prod(shape))                # matrices at a time, over all ranks
                for at in range(0, len(params), size):
                    self._step(group, params[at : at + size], ranks, rank)

    def _step(self, group: dict, params: list[Tensor], ranks: int, rank: int) -> None:
        """One step of `params`, which are of one shape: rank r orthogonalises the matrices r, r + W, r + 2W …"""
        mine = []
        for number, p in enumerate(params):
            momentum = self._momentum(p, group["momentum"])         # an all-gather: all ranks take part
            if number % ranks == rank:
                mine.append(wide(momentum))
        own = msign(torch.stack(mine), self.dtype) if mine else torch.empty(0)      # all ranks at the same time
        for owner in range(min(ranks, len(params))):
            owned, updates = params[owner::ranks], own
            if owner != rank:
                shape = (len(owned), *wide(momentum).shape)
                updates = torch.empty(shape, dtype=self.dtype, device=momentum.device)
            if ranks > 1:
                dist.broadcast(updates, owner)
            for p, update in zip(owned, updates, strict=True):
                weight, update = local(p), local_shard(update.mT if is_tall(p) else update, p)
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update.to(weight.device), alpha=-group["lr"] * 0.2 * math.sqrt(max(p.shape[-2:])))

    def _momentum(self, p: Tensor, decay: float) -> Tensor:
        """Take the gradient into the momentum, and return the momentum a step ahead (Nesterov), in full."""
        assert p.grad is not None
        average, grad = local(self.state[p]["momentum"]), local(p.grad)
        average.lerp_(grad, 1 - decay)
        ahead = grad.lerp(average, decay)
        if not isinstance(p, DTensor):
            return ahead
        how: dict[str, Any] = {"run_check": False, "shape": p.shape, "stride": p.stride()}
        return DTensor.from_local(ahead, p.device_mesh, p.placements, **how).full_tensor()


def is_tall(matrix: Tensor) -> bool:
    """Whether (…, n, m) has n > m."""
    return matrix.shape[-2] > matrix.shape[-1]


def wide(matrix: Tensor) -> Tensor:
    """(…, n, m) with n ≤ m: the matrix itself, or its transpose."""
    return matrix.mT if is_tall(matrix) else matrix


def msign(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """The equation at the head of the file: (…, n, m) → the same shape, nearly orthogonal, in dtype. CPUs, slow in
    bfloat16, compute in float32."""
    on_cpu = matrix.device.type == "cpu"
    x = matrix.to(torch.promote_types(dtype, torch.float32) if on_cpu else dtype)
    x = wide(x.reshape(-1, *matrix.shape[-2:]))
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        A = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(A, A, A, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return (x.mT if is_tall(matrix) else x).reshape(matrix.shape).to(dtype).contiguous()
