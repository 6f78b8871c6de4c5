"""The optimizers AdamW and Muon, which parameter goes to which, and the learning-rate schedule.

    AdamW     m ← β₁m + (1 − β₁)g     v ← β₂v + (1 − β₂)g²
              w ← w − η (m̂ / (√v̂ + ε) + λw)                                  Loshchilov & Hutter 2017
    Muon      M ← μM + (1 − μ)G
              w ← w − η (0.2 √max(n, m) · msign((1 − μ)G + μM) + λw)          Jordan et al. 2024

For M = U S Vᵀ, msign(M) = U Vᵀ is the orthogonal matrix nearest to M (n, m): an update has the same size in every
direction. It is computed without an SVD, by five iterations of Newton–Schulz, a polynomial that brings all singular
values close to 1:

    X ← aX + (bA + cA²)X,   A = X Xᵀ,   X₀ = M / ‖M‖          (a, b, c) = (3.4445, −4.7750, 2.0315)
                                                              kellerjordan.github.io/posts/muon

The factor 0.2 √max(n, m) makes an update about as large as AdamW's, so one learning rate serves both in a large model
(Liu et al. 2025, arXiv 2502.16982 §2.2). In a small one AdamW's parameters gain from a larger rate: see `build`.

Optimizers whose state takes less memory are in files of their own: galore.py, badam.py, adamw8bit.py.

torch.optim.Muon computes the same on one process, and a test compares the two. This one also takes shards (each matrix
is gathered once and orthogonalised by one rank, in turn) and stacked experts (E, n, m). It orthogonalises matrices of
one shape as one batch, and in float32 where the run is in float32, so that N ranks give the result of one.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nanollm.layers.linear import Linear
from nanollm.layers.moe import Experts
from nanollm.model import Decoder
from nanollm.training import low_memory
from nanollm.training.adamw8bit import TABLES, adamw8bit
from nanollm.training.badam import BAdam, blocks
from nanollm.training.distributed import local, local_shard
from nanollm.training.galore import GaLore

NAMES = ("muon", "adamw", *low_memory.NAMES)
SCHEDULES = ("cosine", "linear", "wsd")
BETAS = (0.9, 0.95)         # of AdamW, also beside Muon
MUON_MOMENTUM = 0.9
ADAMW_BESIDE_MUON = 8.0     # AdamW's learning rate beside Muon, as a multiple of Muon's; measured, see `build`
BATCH = 2**24       # numbers in one batched product of Muon (64 MB in float32); a larger matrix is a batch of its own


# ---- the learning rate

def lr_factor(step: int, steps: int, warmup: int, schedule: str, decay: float = 0.2, least: float = 0.0) -> float:
    """The learning rate of step 0 … steps − 1 as a share of the peak rate. A checkpoint needs to keep nothing of it.

        all      linear warm-up over `warmup` steps, then
        cosine   ╱‾╲_    half a cosine to 0           Loshchilov & Hutter 2016 (arXiv 1608.03983)
        linear   ╱╲      a line to 0
        wsd      ╱‾‾╲    constant, then a line to 0 over the last `decay` of the steps: warm-up, stable, decay
                                                      Hu et al. 2024 (arXiv 2404.06395) §4
    The first step has 1/warmup of the peak and the last a little more than 0, so no step has the rate 0.
    least: where the decay ends, instead of 0, as a share of the peak; the same curve, drawn between 1 and that.
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
    return up * (least + (1 - least) * down)


# ---- who has which parameter

def build(
    model: Decoder, name: str, weight_decay: float, dtype: torch.dtype, betas: Sequence[float] = BETAS, *,
    rank: int = low_memory.RANK, every: int = 200, scale: float = low_memory.SCALE,
) -> list[torch.optim.Optimizer]:
    """Put every parameter that is trained into exactly one group, and return the optimizers. rank, every, scale: of
    galore.py; every: of badam.py too.

        weight matrices and experts in the layers      optimizer `name`, weight decay
        embedding, positions and head                  AdamW, weight decay
        gains, biases, the parameters of a scan        AdamW, none
        frozen: requires_grad is False                 none, and no state

    galore has the matrices whose smaller side is above the rank. badam and adamw8bit are AdamW of every parameter.

    Beside Muon, AdamW has ADAMW_BESIDE_MUON times the learning rate (group["lr_scale"]). Measured on the toy Llama,
    320 steps, seed 1, in bits per byte held out: 1.751; with 1.5 times the rate 1.799; with a momentum of 0.95, torch's
    default, 1.773. No other scale, and no larger model or longer run, was measured.
    """
    inner = [m for name in ("layers", "shared") for m in model.get_submodule(name).modules()]
    owners = [m for m in inner if isinstance(m, (Linear, Experts))]
    inside = {
        id(p) for m in owners for key, p in m.named_parameters(recurse=False)
        if p.ndim > 1 and not key.endswith("bias")
    }
    matrices: list[nn.Parameter] = []
    tables: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for key, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if id(p) in inside:
            matrices.append(p)
        elif key in ("embed.weight", "positions.weight", "head.weight", "shared.per_layer.table"):
            tables.append(p)
        else:
            rest.append(p)
    lr_scale = ADAMW_BESIDE_MUON if name == "muon" else 1.0
    groups = [
        {"params": tables, "weight_decay": weight_decay, "lr_scale": lr_scale},
        {"params": rest, "weight_decay": 0.0, "lr_scale": lr_scale},
    ]
    optimizers: list[torch.optim.Optimizer] = []
    own: list[nn.Parameter] = []
    if name == "muon":
        own = matrices
    elif name == "galore":
        own = [p for p in matrices if min(p.shape[-2:]) > rank]
    if own:                                                 # torch refuses an optimizer of nothing
        optimizers.append(Muon(own, weight_decay, dtype) if name == "muon" else
                          GaLore(own, weight_decay, betas, rank, every, scale))
    taken = {*map(id, own)}
    matrices = [p for p in matrices if id(p) not in taken]
    groups.insert(0, {"params": matrices, "weight_decay": weight_decay, "lr_scale": 1.0})
    optimizers += of_groups(model, name, groups, betas, every)
    init_state(optimizers)
    return optimizers


def of_groups(model: Decoder, name: str, groups: list[dict[str, Any]], betas: Sequence[float],
              every: int) -> list[torch.optim.Optimizer]:
    """AdamW over groups of parameters of a model, or what stands in its place; none of no parameters."""
    groups = [group for group in groups if group["params"]]
    if not groups:
        return []
    if name == "badam":
        return [BAdam(groups, betas, blocks(model), every)]
    return [adamw8bit(groups, betas) if name == "adamw8bit" else adamw(groups, betas)]


def constants(name: str) -> dict[str, float]:
    """What this file fixes for a run with the optimizer `name`, for run.json: a resumed run has to have the same."""
    return {"momentum": MUON_MOMENTUM, "lr_scale": ADAMW_BESIDE_MUON} if name == "muon" else {}


def adamw(groups: list[dict[str, Any]], betas: Sequence[float] = BETAS) -> torch.optim.Optimizer:
    """AdamW over groups of parameters. betas: β₁ and β₂."""
    return torch.optim.AdamW(groups, betas=(betas[0], betas[1]), fused=True)


def step(optimizers: Iterable[torch.optim.Optimizer], lr: float) -> None:
    """One step of all optimizers, each group at its share of the learning rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        optimizer.step()


def begin(optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """What is to be done before the first step, and before that of a run that is resumed."""
    for optimizer in optimizers:
        if isinstance(optimizer, BAdam):
            optimizer.begin()


def init_state(optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Make the state of Muon and AdamW, zeros, as the first step would: a checkpoint has the same tensors at every
    step. Others make theirs themselves."""
    for optimizer in (each for each in optimizers if isinstance(each, (Muon, torch.optim.AdamW))):
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            names = ("momentum",) if isinstance(optimizer, Muon) else ("exp_avg", "exp_avg_sq")
            optimizer.state[p] = {name: torch.zeros_like(p) for name in names}
            if not isinstance(optimizer, Muon):
                optimizer.state[p]["step"] = torch.zeros((), device=p.device)


def tensors(model: nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """All that a step changes, by name: the parameters that are trained, and the optimizers' state of each."""
    owned = {p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    names: dict[Any, str] = {p: name for name, p in model.named_parameters() if p in owned}
    found: dict[str, Tensor] = {f"model.{name}": p for p, name in names.items()}
    for optimizer in optimizers:
        for p, state in optimizer.state.items():                # BAdam's belongs to no parameter, and has its own name
            found |= {f"optimizer.{names.get(p, p)}.{key}": value for key, value in state.items() if key not in TABLES}
    return found


# ---- Muon

class Muon(torch.optim.Optimizer):
    """For matrices (n, m), whole or sharded, and stacks of them (E, n, m). State: one momentum for each, in float32."""

    def __init__(
        self, params: Iterable[Tensor], weight_decay: float, dtype: torch.dtype, momentum: float = MUON_MOMENTUM
    ) -> None:
        """dtype: of the products inside msign."""
        super().__init__(params, {"lr": 0.0, "lr_scale": 1.0, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype = dtype

    # override: torch's step also takes a closure that computes the loss again, for which Muon has no use
    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of every matrix.

        Matrices of one shape, (n, m) or (m, n), are orthogonalised together, as one batched product. With W ranks each
        matrix is all-gathered, orthogonalised by one rank, in turn, and broadcast to the others.
        """
        ranks, here = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        for group in self.param_groups:
            shapes: dict[tuple[int, ...], list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault((*p.shape[:-2], *sorted(p.shape[-2:])), []).append(p)
            for shape, params in shapes.items():
                turn = ranks * max(1, BATCH // math.prod(shape))            # matrices at a time, over all ranks
                for at in range(0, len(params), turn):
                    self._step(group, params[at : at + turn], ranks, here)

    def _step(self, group: dict[str, Any], params: list[Tensor], ranks: int, here: int) -> None:
        """One step of `params`, which have one shape: rank r has the matrices r, r + W, r + 2W …"""
        mine = []
        for number, p in enumerate(params):
            ahead = self._momentum(p, group["momentum"])                       # all ranks take part in each all-gather
            if number % ranks == here:
                mine.append(wide(ahead))
        ours = msign(torch.stack(mine), self.dtype) if mine else None
        for owner in range(min(ranks, len(params))):
            owned = params[owner::ranks]
            if ours is not None and owner == here:
                updates = ours
            else:
                updates = torch.empty(len(owned), *wide(ahead).shape, dtype=self.dtype, device=ahead.device)
            if ranks > 1:
                dist.broadcast(updates, owner)
            for p, update in zip(owned, updates, strict=True):
                weight, update = local(p), update.mT if is_tall(p) else update
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                length = 0.2 * math.sqrt(max(p.shape[-2:]))
                weight.add_(local_shard(update, p).to(weight.device), alpha=-group["lr"] * length)

    def _momentum(self, p: Tensor, momentum: float) -> Tensor:
        """Add the gradient to the momentum; return the momentum of the step after (Nesterov), the whole matrix."""
        assert p.grad is not None
        state, grad = self.state[p], local(p.grad)
        average = local(state["momentum"])
        average.lerp_(grad, 1 - momentum)
        ahead = grad.lerp(average, momentum)
        if not isinstance(p, DTensor):
            return ahead
        sharded = DTensor.from_local(
            ahead, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
        )
        return sharded.full_tensor()


def is_tall(matrix: Tensor) -> bool:
    """Whether a matrix has more rows than columns."""
    return matrix.shape[-2] > matrix.shape[-1]


def wide(matrix: Tensor) -> Tensor:
    """(…, n, m) with n ≤ m: the matrix itself, or its transpose."""
    return matrix.mT if is_tall(matrix) else matrix


def msign(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """The equation at the head of the file: (…, n, m) → the same shape, nearly orthogonal, in dtype.

    A CPU computes in float32 instead of bfloat16, in which it is slow.
    """
    products = torch.promote_types(dtype, torch.float32) if matrix.device.type == "cpu" else dtype
    x = matrix.to(products).reshape(-1, *matrix.shape[-2:])
    tall = is_tall(x)
    x = wide(x)
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        A = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(A, A, A, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return (x.mT if tall else x).reshape(matrix.shape).to(dtype).contiguous()
