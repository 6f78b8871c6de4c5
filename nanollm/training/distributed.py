"""One model on many processes. Each keeps a shard of every parameter; a layer is whole only while it computes (FSDP2).

                     rank 0        rank 1                 one step, for each layer
    at rest          W[0:n/2]      W[n/2:n]               float32, with the optimizer's state beside it
    forward          all-gather ─→ W ─→ x W               in the dtype of the products, then freed
    backward         all-gather ─→ W ─→ ∂W                each rank has the sum over its own rows of the batch
                     reduce-scatter: ∂W summed            in float32, and each rank keeps its shard of the sum

Zhao et al. 2023 (arXiv 2304.11277); Rajbhandari et al. 2019 (arXiv 1910.02054), stage 3. With `replicas` R there are R
groups of ranks, each with a whole copy of the model (HSDP): a shard is R times as large, all-gather and reduce-scatter
stay inside a group, and an all-reduce between the groups is added.

On one rank there is nothing to shard: the model stays an ordinary module, and `cast` makes the copies in the dtype of
the products. (Only --offload uses FSDP2 on one rank, for its copies between CPU and GPU.) Gradients are summed over
ranks, never averaged: the loss is divided by the tokens of the whole step (losses.py), so what each rank computes is
already its part of the sum.

The order of wrapping matters: recomputation inside compilation inside sharding.
"""

import contextlib
import copy
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from nanollm.errors import InputError, NanollmError
from nanollm.layers.frozen import FrozenLinear
from nanollm.model import Decoder

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class World:
    """The processes of this run, and which of them this one is. mesh: (shard,) or (replicate, shard)."""
    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh

    def all_reduce(self, *values: float) -> list[float]:
        """Each value summed over ranks, in float64: the same on every rank."""
        sums = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(sums)
        return sums.tolist()

    def all_gather(self, *values: float) -> Tensor:
        """All-gather: the values of every rank, float64 (ranks, values)."""
        rows = torch.empty(self.size, len(values), dtype=torch.float64)
        dist.all_gather(list(rows), torch.tensor(values, dtype=torch.float64))
        return rows

    def all_gather_objects(self, value: object) -> list[Any]:
        """All-gather of any plain value: a list by rank."""
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, value)
        return gathered

    def on_all_ranks(self, work: Callable[[], Any]) -> Any:
        """Do `work` on every rank. A NanollmError on one rank is raised on all, so that none waits for it forever."""
        done = problem = None
        try:
            done = work()
        except NanollmError as error:
            problem = error
        for found in self.all_gather_objects(problem):
            if found is not None:
                raise found
        return done

    def broadcast(self, value: Any) -> Any:
        """The plain value that rank 0 has, on all ranks."""
        return self.all_gather_objects(value)[0]

    def on_rank_0(self, work: Callable[[], Any]) -> Any:
        """Do `work` on rank 0 while the others wait; None on those."""
        return self.on_all_ranks(lambda: work() if self.rank == 0 else None)


@contextlib.contextmanager
def world(device: str, replicas: int = 1) -> Iterator[World]:
    """Join the processes that torchrun started, or be the only one.

    Raises InputError where `replicas` does not divide the number of processes, or WORLD_SIZE stands without RANK.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.get("LOCAL_RANK", 0))
    if size > 1 and "RANK" not in os.environ:
        raise InputError(f"WORLD_SIZE is {size} and RANK is not set: torchrun sets both; one process needs neither")
    if size % replicas:
        raise InputError(f"--replicas {replicas} does not divide the {size} process(es) of this run")
    here = torch.device(f"cuda:{local}" if device == "cuda" else device)
    if here.type == "cuda":
        torch.cuda.set_device(here)
    backend = "cpu:gloo,cuda:nccl" if here.type == "cuda" else "gloo"
    timeout = timedelta(minutes=30)
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield World(rank, size, here, build_mesh(here.type, size, replicas))
        barrier()
    except NanollmError as error:
        if not error.alone:                                     # raised on every rank, see `on_all_ranks`
            barrier()
        raise
    finally:
        dist.destroy_process_group()


def barrier() -> None:
    """Wait for the other ranks before leaving: one that ends while they still communicate can make them fail."""
    with contextlib.suppress(RuntimeError, ValueError):
        dist.monitored_barrier(timeout=timedelta(seconds=20))


def build_mesh(kind: str, size: int, replicas: int) -> DeviceMesh:
    """The devices in a row, or in a grid of replicas, each of which is sharded."""
    if replicas == 1:
        return init_device_mesh(kind, (size,), mesh_dim_names=("shard",))
    return init_device_mesh(kind, (replicas, size // replicas), mesh_dim_names=("replicate", "shard"))


# ---- wrapping

RECOMPUTE = ("none", "selective", "full")
KINDS = ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")
SDPA = [f"aten::_scaled_dot_product_{kind}" for kind in KINDS]
# what "selective" keeps: attention, and the choice of experts, which could come out differently the second time
SAVED = {*SDPA, "nanollm::attention", "aten::topk"}


def checkpoint_policy(_: object, op: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """What activation checkpointing keeps: the products in SAVED; all else is computed again."""
    return CheckpointPolicy.MUST_SAVE if op.name() in SAVED else CheckpointPolicy.PREFER_RECOMPUTE


def shard(
    model: Decoder, mesh: DeviceMesh, dtype: torch.dtype, *,
    recompute: str = "none", compile: bool = False, offload: bool = False, random: bool = False,
) -> None:
    """Wrap each layer, each block that layers share, and then the whole model, in place. Parameters become shards;
    `fill` gives them their values.

    On one rank, without offload, nothing is sharded, and parameters stay as they are.

    dtype      of the products: parameters are cast to it in the all-gather; gradients are reduced in float32
    recompute  one of RECOMPUTE
    offload    shards and optimizer state are kept in the memory of the CPU
    random     layers draw random numbers (dropout), which recomputation has to draw again
    """
    for layer in model.layers:
        layer.forward = recomputed(layer.forward, recompute, random)
        if compile:
            layer.compile()
    if mesh.size() == 1 and not offload:
        return
    wrap = partial(
        fully_shard, mesh=mesh, shard_placement_fn=partial(shard_placement, mesh.size(-1)),
        mp_policy=MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False),
        offload_policy=CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if offload else OffloadPolicy(),
    )
    for layer in [*model.shared.values(), *model.layers]:       # what layers share is gathered at each use
        wrap(layer, reshard_after_forward=mesh.size(-1) > 1 or offload)     # not sharded: one all-gather is enough
    wrap(model)                                             # embedding, last norm and head stay whole through a step
    register_fsdp_forward_method(model, "hidden")
    for module in sharded_modules(model) if mesh.size() > 1 else []:
        module.set_gradient_divide_factor(1.0)              # sums, not means: see the head of the file
        module.set_force_sum_reduction_for_comms(True)      # otherwise FSDP asks gloo for an operation it does not have


@contextlib.contextmanager
def cast(model: Decoder, dtype: torch.dtype) -> Iterator[None]:
    """Inside the block a model that is not sharded computes with copies of its weights in dtype.

    Gradients reach the float32 weights. Forward and backward pass both belong inside. A sharded model makes such copies
    in its all-gather, so nothing is done to it here. Nor is it to a FrozenLinear, which casts by itself.
    """
    places: list[tuple[dict[str, Any], str, nn.Parameter]] = [
        (module._parameters, name, p)
        for module in model.modules() if not isinstance(module, FrozenLinear)
        for name, p in module._parameters.items() if p is not None and p.dtype != dtype
    ]
    if not places or sharded_modules(model):
        yield
        return
    copies = {p: p.to(dtype) for *_, p in places}               # by parameter: tied weights share one copy
    for parameters, name, weight in places:
        parameters[name] = copies[weight]
    try:
        yield
    finally:
        for parameters, name, weight in places:
            parameters[name] = weight


def reduce_gradients(model: Decoder, now: bool) -> None:
    """Say whether the next backward pass reduces gradients over ranks.

    With gradient accumulation only the last micro-batch of a step does.
    """
    for module in sharded_modules(model):
        module.set_requires_gradient_sync(now, recurse=False)


def recomputed(forward: Callable[..., Tensor], how: str, random: bool = False) -> Callable[..., Tensor]:
    """The same function with activation checkpointing: it keeps less, and the backward pass computes the rest again."""
    if how == "none":
        return forward
    full = partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=random)
    if how == "full":
        return full
    return partial(full, context_fn=partial(create_selective_checkpoint_contexts, checkpoint_policy))


def shard_placement(ranks: int, p: nn.Parameter) -> Shard | None:
    """The dimension that a parameter is sharded along; None: the first.

    Stacked experts (E, n, m) are sharded along the second where the ranks divide n and not E.
    """
    return Shard(1) if p.ndim == 3 and p.shape[0] % ranks and p.shape[1] % ranks == 0 else None


def sharded_modules(model: nn.Module) -> list[FSDPModule]:
    """The modules that `shard` has wrapped; none on one rank."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


@torch.no_grad()
def clip(model: nn.Module, most: float) -> float:
    """The norm of the gradient over all ranks. A gradient with a larger norm than `most` is scaled to it (0: never)."""
    gradients = [local(p.grad) for p in model.parameters() if p.grad is not None]      # a router's correction has none
    squares = torch.stack(torch._foreach_norm(gradients)).double().square().sum()
    embedding = model.get_parameter("embed.weight")
    if isinstance(embedding, DTensor):
        dist.all_reduce(squares, group=embedding.device_mesh.get_group("shard"))
    norm = squares.sqrt().item()
    if most and norm > most:
        torch._foreach_mul_(gradients, most / norm)
    return norm


# ---- parameters in and out

def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a tensor; of one that is not sharded, the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_shard(full: Tensor, like: Tensor) -> Tensor:
    """This rank's shard of `full`, sharded as `like` is. Every rank has `full`, so nothing is sent."""
    if not isinstance(like, DTensor):
        return full
    whole = DTensor.from_local(full, like.device_mesh, [Replicate()] * like.device_mesh.ndim, run_check=False)
    return whole.redistribute(placements=like.placements).to_local()


@torch.no_grad()
def fill(model: Decoder, values: Iterable[tuple[str, Tensor]]) -> None:
    """Set parameters and buffers of a model to full tensors in the order of their names, one in memory at a time.

    Tied weights, which are two parameters after the meta device, are made one again.
    """
    model.tie()
    parameters: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, value in values:
        local(parameters[name]).copy_(local_shard(value.to(parameters[name].device), parameters[name]))


@torch.no_grad()
def broadcast_parameters(model: Decoder, source: Decoder | None, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers of `source`, which only rank 0 has, broadcast to all ranks one at a time, in the dtypes
    of `model`. Each is gone from `source` when the next one comes: there is never memory for two models."""
    theirs = {} if source is None else {**dict(source.named_parameters()), **dict(source.named_buffers())}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        full = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        if source is not None:
            full.copy_(theirs[name].detach())
            theirs[name].data = torch.empty(0, dtype=theirs[name].dtype)
        dist.broadcast(full.view(-1).view(torch.uint8), 0)      # as bytes: not every backend knows every dtype
        yield name, full


@torch.no_grad()
def gather(model: Decoder, keep: bool, device: torch.device, dtype: torch.dtype = torch.float32,
           blank: Decoder | None = None) -> Decoder | None:
    """The whole model, on one device, where `keep`; None on other ranks. `blank` is the model on the meta device,
    where it is more than its config says; what is in a FrozenLinear keeps its dtype.

    All ranks take part in the all-gather of each parameter, one at a time.
    """
    found = {}
    for name, parameter in model.named_parameters():
        full = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        if keep:
            own = isinstance(model.get_submodule(name.rpartition(".")[0]), FrozenLinear)
            found[name] = nn.Parameter(full.to(device, full.dtype if own else dtype), requires_grad=False)
    if not keep:
        return None
    with torch.device("meta"):
        whole = Decoder(model.config) if blank is None else copy.deepcopy(blank)
    for name, parameter in found.items():
        owner, _, leaf = name.rpartition(".")
        setattr(whole.get_submodule(owner), leaf, parameter)
    saved = model.state_dict()                                  # a quantised module puts its codes in order for that
    for name, _ in model.named_buffers():
        owner, _, leaf = name.rpartition(".")
        setattr(whole.get_submodule(owner), leaf, saved[name].to(device))
    whole.tie()
    return whole.eval()
