"""One model on many processes. Each keeps a slice of every parameter; a layer is whole only while it computes (FSDP2).

                     rank 0        rank 1                 one step, for each layer
    at rest          W[0:n/2]      W[n/2:n]               float32, with the optimizer's state beside it
    forward          all-gather ─→ W ─→ x W               in the dtype of the products, then let go again
    backward         all-gather ─→ W ─→ ∂W                each rank has the sum over its own rows of the batch
                     reduce-scatter: ∂W summed            in float32, and each rank keeps its slice of the sum

Zhao et al. 2023 (arXiv 2304.11277); Rajbhandari et al. 2019 (arXiv 1910.02054), stage 3. With `replicas` R the slices are R times
larger and R groups hold the same ones (HSDP): gathers stay inside a group, one all-reduce between groups is added.

On one rank there is nothing to shard: the model stays an ordinary module, and `cast` makes the copies in the dtype of the products
(only --offload uses FSDP2 there too, for its copies between CPU and GPU). Gradients are summed over ranks, never averaged: the loss
is divided by the tokens of the whole step (losses.py), so each rank already computes its part of the sum.

The order of wrapping matters: recomputation inside compilation inside sharding.
"""

import contextlib
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
from nanollm.model import Decoder

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class World:
    """The processes of this run, and which of them this one is. mesh: (shard,) or (replicate, shard)."""
    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh

    def total(self, *values: float) -> list[float]:
        """Each value summed over ranks, in float64: the same on every rank."""
        sums = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(sums)
        return sums.tolist()

    def everyone(self, *values: float) -> Tensor:
        """The values of all ranks, float64 (ranks, values)."""
        rows = torch.empty(self.size, len(values), dtype=torch.float64)
        dist.all_gather(list(rows), torch.tensor(values, dtype=torch.float64))
        return rows

    def tell(self, value: object) -> list:
        """What every rank has to say: any plain value, a list by rank."""
        said = [None] * self.size
        dist.all_gather_object(said, value)
        return said

    def together(self, work: Callable[[], Any]) -> Any:
        """Do `work` on every rank. An error of our own on any of them is raised on all: none is left waiting for the others."""
        done = problem = None
        try:
            done = work()
        except NanollmError as error:
            problem = error
        for found in self.tell(problem):
            if found is not None:
                raise found
        return done

    def first(self, work: Callable[[], Any]) -> Any:
        """Do `work` on the first rank, while the others wait."""
        return self.together(lambda: work() if self.rank == 0 else None)


@contextlib.contextmanager
def world(device: str, replicas: int = 1) -> Iterator[World]:
    """Join the processes that torchrun started, or be the only one. Raises InputError where replicas do not divide them."""
    rank, size, local = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if size % replicas:
        raise InputError(f"--replicas {replicas} does not divide the {size} process(es) of this run")
    here = torch.device(f"cuda:{local}" if device == "cuda" else device)
    if here.type == "cuda":
        torch.cuda.set_device(here)
    backend = "cpu:gloo,cuda:nccl" if here.type == "cuda" else "gloo"
    place = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group(backend, timeout=timedelta(minutes=30), **place)
    try:
        yield World(rank, size, here, build_mesh(here.type, size, replicas))
        part()
    except NanollmError as error:
        if not error.alone:                                     # raised on every rank, see `together`
            part()
        raise
    finally:
        dist.destroy_process_group()


def part() -> None:
    """Wait for the others before leaving: one that goes while they still listen can bring them down."""
    with contextlib.suppress(RuntimeError, ValueError):
        dist.monitored_barrier(timeout=timedelta(seconds=20))


def build_mesh(kind: str, size: int, replicas: int) -> DeviceMesh:
    if replicas == 1:
        return init_device_mesh(kind, (size,), mesh_dim_names=("shard",))
    return init_device_mesh(kind, (replicas, size // replicas), mesh_dim_names=("replicate", "shard"))


# ---- wrapping

RECOMPUTE = ("none", "selective", "full")
SDPA = [f"aten::_scaled_dot_product_{kind}" for kind in ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")]
KEPT = {*SDPA, "nanollm::attention", "aten::topk"}      # by "selective": attention, and choices of experts, which could differ a second time


def kept(_: object, op: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op.name() in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def shard(
    model: Decoder, mesh: DeviceMesh, dtype: torch.dtype, *,
    recompute: str = "none", compile: bool = False, offload: bool = False,
) -> None:
    """Wrap each layer and then the whole model, in place. Parameters become shards; `fill` gives them values where they have none.
    On one rank, without offload, nothing is wrapped, and parameters stay as they are.

    dtype is that of the products: parameters are cast to it as they are gathered; gradients are reduced in float32.
    offload: shards and optimizer state live in the memory of the CPU."""
    for layer in model.layers:
        layer.forward = recomputed(layer.forward, recompute)
        if compile:
            layer.compile()
    if mesh.size() == 1 and not offload:
        return
    wrap = partial(
        fully_shard, mesh=mesh, shard_placement_fn=partial(cut, mesh.size(-1)),
        mp_policy=MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False),
        offload_policy=CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if offload else OffloadPolicy(),
    )
    for layer in model.layers:
        wrap(layer, reshard_after_forward=mesh.size(-1) > 1 or offload)         # what is not sharded need not be gathered twice
    wrap(model)                                                 # embedding, last norm and head, tied or not, stay whole through a step
    register_fsdp_forward_method(model, "hidden")
    for module in slices(model) if mesh.size() > 1 else []:     # sums, not means: see the head of the file
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)          # without it gloo is asked for an operation that it lacks


@contextlib.contextmanager
def cast(model: Decoder, dtype: torch.dtype) -> Iterator[None]:
    """Inside the block a model that is not sharded computes with copies of its weights in dtype; their gradients reach the float32
    weights. Forward and backward both belong inside. A sharded model makes such copies when it gathers, so nothing is done to it."""
    if dtype == torch.float32 or slices(model):
        yield
        return
    copies = {p: p.to(dtype) for p in model.parameters()}       # by parameter: tied weights share one copy
    places = [(module._parameters, name) for module in model.modules() for name, p in module._parameters.items() if p is not None]
    weights = [parameters[name] for parameters, name in places]
    for (parameters, name), weight in zip(places, weights):
        parameters[name] = copies[weight]
    try:
        yield
    finally:
        for (parameters, name), weight in zip(places, weights):
            parameters[name] = weight


def reduce_gradients(model: Decoder, now: bool) -> None:
    """Whether the next backward pass sums gradients over ranks. Gradient accumulation does so once a step, in the last micro-batch."""
    for module in slices(model):
        module.set_requires_gradient_sync(now, recurse=False)


def recomputed(forward: Callable[..., Tensor], how: str) -> Callable[..., Tensor]:
    """The same function, which keeps less for its backward pass and computes it again there."""
    if how == "none":
        return forward
    some = {"context_fn": partial(create_selective_checkpoint_contexts, kept)} if how == "selective" else {}
    return partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False, **some)


def cut(ranks: int, p: nn.Parameter) -> Shard | None:
    """Along which dimension a parameter is sliced: the first, but for stacked experts, of which there may be fewer than ranks."""
    return Shard(1) if p.ndim == 3 and p.shape[0] % ranks and p.shape[1] % ranks == 0 else None


def slices(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


@torch.no_grad()
def clip(model: nn.Module, most: float) -> float:
    """The norm of the gradient over all ranks, which is brought down to `most` where it is larger (0: any norm will do)."""
    gradients = [local(p.grad) for p in model.parameters() if p.grad is not None]      # a router's correction has none
    squares = torch.stack(torch._foreach_norm(gradients)).double().square().sum()
    if isinstance(model.embed.weight, DTensor):
        dist.all_reduce(squares, group=model.embed.weight.device_mesh.get_group("shard"))
    norm = squares.sqrt().item()
    if most and norm > most:
        torch._foreach_mul_(gradients, most / norm)
    return norm


# ---- parameters in and out

def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a tensor; of one that is not sharded, the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_shard(full: Tensor, like: Tensor) -> Tensor:
    """The part of `full` that this rank holds of `like`, where every rank has `full`: nothing is sent."""
    if not isinstance(like, DTensor):
        return full
    whole = DTensor.from_local(full, like.device_mesh, [Replicate()] * like.device_mesh.ndim, run_check=False)
    return whole.redistribute(placements=like.placements).to_local()


@torch.no_grad()
def fill(model: Decoder, values: Iterable[tuple[str, Tensor]]) -> None:
    """Give a model its values, full tensors in the order of `named_parameters`, one in memory at a time. Tied weights, which the meta
    device parts, are one parameter again."""
    model.tie()
    parameters = dict(model.named_parameters())
    for name, value in values:
        local(parameters[name]).copy_(local_shard(value.to(parameters[name].device), parameters[name]))


def from_first(model: Decoder, source: Decoder | None, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """The parameters of a model that only rank 0 holds, sent to all, one at a time, as float32."""
    theirs = dict(source.named_parameters()) if source is not None else {}
    for name, parameter in model.named_parameters():
        full = torch.empty(parameter.shape, device=device)
        if source is not None:
            full.copy_(theirs[name].detach())
        dist.broadcast(full, 0)
        yield name, full


@torch.no_grad()
def gather(model: Decoder, keep: bool, device: torch.device, dtype: torch.dtype = torch.float32) -> Decoder | None:
    """The whole model, on one device, where `keep`; None on other ranks. All ranks take part, and pass one parameter at a time."""
    found = {}
    for name, parameter in model.named_parameters():
        full = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        if keep:
            found[name] = nn.Parameter(full.to(device, dtype), requires_grad=False)
    if not keep:
        return None
    with torch.device("meta"):
        whole = Decoder(model.config)
    for name, parameter in found.items():
        owner, _, leaf = name.rpartition(".")
        setattr(whole.get_submodule(owner), leaf, parameter)
    whole.tie()
    return whole.eval()
