"""What a training run would take, before it has a GPU: memory of a rank, communication, FLOPs, time.

    memory    weights, gradients, optimizer    counted on the real model, sharded over N ranks that do not exist
                                               (torch's fake process group), on the meta device: no numbers
              activations                      one layer of each kind run forward and backward without numbers
                                               (FakeTensorMode), each storage followed to its end
    time      FLOPs / (MFU · peak)             see flops.py; the MFU is an assumption, to be measured on a GPU

Shapes: B rows of a micro-batch, T tokens of the context.
"""

import argparse
import dataclasses
import difflib
import math
import weakref
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from nanollm import config as c
from nanollm.config.positions import places
from nanollm.errors import InputError
from nanollm.layers.forward_context import ForwardContext
from nanollm.model import Decoder
from nanollm.training import distributed, losses, optim
from nanollm.training.flops import DEVICES, Device, flops_per_token
from nanollm.training.options import rows_at_once

Adapt = Callable[[Decoder], Decoder]        # puts adapters beside a model on the meta device, or does nothing

SHORT = 128, 256            # tokens at which a scan is traced, see `activations`: two chunks and more


def msign_flops(shape: torch.Size) -> float:
    """Of `optim.msign` on (…, n, m): five times A = X Xᵀ, A², and (bA + cA²) X."""
    n, m = sorted(shape[-2:])
    return 5.0 * shape[:-2].numel() * (4 * n * n * m + 2 * n**3)


# ---- activations

class Live(TorchDispatchMode):
    """Bytes of the storages that are made inside the block: `now` those that still exist, `most` at the worst moment.
    With `experts`, what moe.py asks and only numbers could answer is answered here: each expert is chosen, by as many
    tokens as any other."""

    def __init__(self, experts: int = 0) -> None:
        super().__init__()
        self.now, self.most, self.experts = 0, 0, experts
        self.known: dict[int, weakref.finalize] = {}

    def __torch_dispatch__(self, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self._track((args, kwargs), new=False)                  # weights, inputs and their views were there before
        if self.experts and operation is torch.ops.aten._unique2.default:
            with _disable_current_modes():                      # real numbers: Python loops over them
                made = torch.arange(self.experts), None, None
        elif self.experts and operation is torch.ops.aten.nonzero.default:
            tokens = -(-args[0].numel() // self.experts)
            made = args[0].new_empty((tokens, args[0].ndim), dtype=torch.long)
        else:
            made = operation(*args, **(kwargs or {}))
        self._track(made, new=True)
        self.most = max(self.most, self.now)
        return made

    def _track(self, tensors: Any, new: bool) -> None:
        for storage in (tensor.untyped_storage() for tensor in tree_leaves(tensors) if isinstance(tensor, Tensor)):
            key, size = id(storage), storage.nbytes() * new
            if key not in self.known:
                self.now += size
                self.known[key] = weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self.now -= size
        del self.known[key]


def trace(
    run: Callable[[Tensor], Tensor], shape: tuple[int, ...], dtype: torch.dtype, experts: int = 0,
) -> tuple[int, int]:
    """Bytes (kept, more) of a part of the model on an input of this shape: what it keeps from its forward to its
    backward pass, and what it needs beyond that at the worst moment, the gradients of its own weights included."""
    source = torch.zeros(shape, dtype=dtype, requires_grad=True)
    with Live(experts) as live:
        out = run(source.clone())                               # what the part before gives: it stays if it is needed
        edge, gradient = torch.autograd.graph.get_gradient_edge(out), torch.ones_like(out)
        del out
        kept = live.now - gradient.nbytes
        torch.autograd.backward(edge, gradient)
    return kept, live.most - kept


def as_it_is(model: Decoder) -> Decoder:
    """The `Adapt` of a run that trains the model itself."""
    return model


def activations(config: c.ModelConfig, rows: int, context: int, dtype: torch.dtype, recompute: str,
                adapt: Adapt = as_it_is) -> tuple[int, int]:
    """Bytes (kept, more) of a forward and backward pass over (rows, context): what all parts keep, and what the one at
    work adds at most. Each row is one document; packed ones need a mask (B, 1, T, T) in each attention. Experts get
    even shares. A scan in PyTorch keeps every step, and takes as many operations: it is traced at 128 and 256 tokens,
    and the straight line through both is followed to `context`."""
    if any(isinstance(layer.mixer, c.CrossLayerAttention) or (layer.end and layer.end.inputs)
           for layer in config.layers):
        raise InputError("--plan adds up what each layer keeps by itself; here layers read keys of other layers, or "
                         "vectors that are made for all at once (per-layer embeddings)")
    kinds = Counter(config.layers)
    with torch.device("meta"):
        model = adapt(Decoder(dataclasses.replace(config, layers=tuple(kinds))))
    looked_up = rows if places(config.positions) is None else 2 * rows     # tokens, and places in a table, if any
    kept = context * 8 * (looked_up + (recompute != "none"))    # one row of positions more for layers that run again
    more, stream = 0, torch.float32 if config.float32_residual else dtype
    with FakeTensorMode(allow_non_fake_inputs=True):            # the tables of NF4 are real
        for name, p in model.named_parameters():                # no numbers, but a device that has fused attention
            owner, _, leaf = name.rpartition(".")
            one = nn.Parameter(torch.empty(p.shape, dtype=dtype), requires_grad=p.requires_grad)
            setattr(model.get_submodule(owner), leaf, one)
        for name, buffer in model.named_buffers():              # quantised weights
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, torch.empty(buffer.shape, dtype=buffer.dtype))
        model.tie()
        if model.embed_norm is not None:
            first, more = trace(model.embed_norm, (rows, context, config.dim), dtype)
            kept += first
        contexts = {}
        for length in (context, *SHORT):
            embedded = torch.zeros(rows, length, config.dim, dtype=dtype, requires_grad=True)
            positions = torch.arange(length).expand(rows, length)
            contexts[length] = ForwardContext(positions, True, dtype, None, model.shared, embedded)
        for block, (layer, count) in zip(model.layers, kinds.items(), strict=True):
            experts = layer.ffn.experts if isinstance(layer.ffn, c.MoE) else 0
            scans = isinstance(layer.mixer, (*c.SCANS, *c.WITH_SCAN))       # of attention too the memory grows linearly
            T, T2 = SHORT if scans and context > SHORT[1] else (context, context)
            with Live(experts), torch.no_grad():
                block(torch.zeros(rows, T, config.dim, dtype=stream), contexts[T])      # makes what all layers share
            held = []
            for length in dict.fromkeys((T, T2)):
                run = distributed.recomputed(partial(block, ctx=contexts[length]), recompute)
                held.append(trace(run, (rows, length, config.dim), stream, experts))
            here = [a + (b - a) * (context - T) // max(1, T2 - T) for a, b in zip(held[0], held[-1], strict=True)]
            kept, more = kept + count * here[0], max(more, here[1])
        shared = tree_leaves(list(contexts[context].memo.values()))
        kept += sum(table.nbytes for table in shared if isinstance(table, Tensor))
        targets, shape = torch.zeros(rows, context, dtype=torch.long), (rows, context, config.dim)

        def read(x: Tensor) -> Tensor:
            x = model.norm(x).to(dtype)                         # what the norm read is free, unless it is kept
            return losses.token_loss(model.head, x, targets)[0]

        loss = trace(read, shape, stream)
        # the gradient of the head waits, whole, for that of the embedding
        waiting = model.head.weight.nbytes * model.head.weight.requires_grad
        return kept + loss[0], max(more + waiting, loss[1])


# ---- the ranks

class Share(NamedTuple):
    """What rank 0 has, whose shards are the largest. groups, trained and matrices count numbers of whole tensors,
    padded to even shards."""
    parameters: int         # without quantised ones
    learned: int            # of them, those that are trained
    weights: int            # bytes of their shards, float32; those of the gradients are as large
    state: int              # bytes of the optimizer's
    frozen: int             # bytes of the shards of parameters that are not trained
    quantised: int          # bytes of weights in few bits, which no rank shares out
    whole: int              # numbers of all parameters, padded to even shards
    groups: list[int]       # what is gathered and reduced at a time: a layer each, with the block that it shares, and
                            # last embedding, norm and head
    trained: list[int]      # the same, of what has gradients
    matrices: list[tuple[torch.Size, int]]      # that Muon has


def share(config: c.ModelConfig, ranks: int, replicas: int, dtype: torch.dtype, optimizer: str,
          adapt: Adapt = as_it_is) -> Share:
    """Shard the model and build its optimizers as the trainer does, on the meta device, as rank 0 of a process group
    without processes."""
    from torch.testing._internal.distributed.fake_pg import (
        FakeStore,  # makes the backend "fake" known; only planning needs it
    )
    if ranks % replicas:
        raise InputError(f"--replicas {replicas} does not divide the {ranks} process(es) of --world-size")
    if dist.is_initialized():
        raise InputError("--plan makes a process group of its own, and this process belongs to one already; plan in a "
                         "process of its own")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        with torch.device("meta"):
            model = adapt(Decoder(config))
        for p in model.parameters():
            p.data = p.data if p.requires_grad else p.data.to(dtype)            # as folders have them
        distributed.shard(model, distributed.build_mesh("cpu", ranks, replicas), dtype)
        optimizers = optim.build(model, optimizer, 0.0, dtype)
        padded = {p: distributed.local(p).numel() * (ranks // replicas) for p in model.parameters()}
        at_work = [{*block.parameters(), *shared_by(layer, model)}
                   for block, layer in zip(model.layers, config.layers, strict=True)]
        at_work.append(padded.keys() - set().union(*at_work))
        groups = [sum(padded[p] for p in group) for group in at_work]
        trained = [sum(padded[p] for p in group if p.requires_grad) for group in at_work]
        held = {p: distributed.local(p).nbytes for p in padded}
        states = [state for each in optimizers for state in each.state.values()]
        muon = [group["params"] for each in optimizers if isinstance(each, optim.Muon) for group in each.param_groups]
        return Share(
            parameters=sum(p.numel() for p in padded),
            learned=sum(p.numel() for p in padded if p.requires_grad),
            weights=sum(size for p, size in held.items() if p.requires_grad),
            frozen=sum(size for p, size in held.items() if not p.requires_grad),
            quantised=sum(buffer.nbytes for buffer in model.buffers()),
            state=sum(distributed.local(value).nbytes for state in states for value in state.values()),
            whole=sum(padded.values()),
            groups=groups,
            trained=trained,
            matrices=[(p.shape, padded[p]) for group in muon for p in group],
        )
    finally:
        dist.destroy_process_group()


def shared_by(layer: c.Layer, model: Decoder) -> list[nn.Parameter]:
    """The parameters of the block that a layer uses together with others."""
    if not isinstance(layer.mixer, c.SharedBlockScan):
        return []
    return list(model.shared[str(layer.mixer.block.number)].parameters())


def report(options: argparse.Namespace, config: c.ModelConfig, adapt: Adapt = as_it_is) -> str:
    """The plan as a table. Raises InputError for an unknown --device, and where ranks, replicas and rows do not divide.

    Memory is added up although not all of it peaks at one moment. Communication is bytes by bandwidth; latency, which
    counts in groups of hundreds of ranks, is left out. All-gathers and reduce-scatters of FSDP2 run beside the
    computation, those of Muon come after it. 1 GB is 10⁹ bytes."""
    if options.device not in DEVICES:
        near = [f"; did you mean {name}?" for name in difflib.get_close_matches(options.device, DEVICES, 1)]
        raise InputError(f"--device {options.device}: --plan expects the name of a GPU, one of "
                         f"{', '.join(DEVICES)}{''.join(near)}")
    if not 0 < options.mfu <= 1:
        raise InputError(f"--mfu {options.mfu:g}: expected a share of the peak, above 0 and at most 1; 0.4 is common")
    device, ranks = DEVICES[options.device], options.world_size
    name = "bfloat16" if options.dtype == "auto" else options.dtype
    dtype, shards, peak = distributed.DTYPES[name], ranks // options.replicas, getattr(device, name)
    rows = rows_at_once(options.batch_size, options.micro_batch, ranks)
    passes, tokens = options.batch_size // (rows * ranks), options.batch_size * options.context
    steps = options.steps or math.ceil(1e9 / tokens)            # of data that nobody has counted, a billion tokens
    mine = share(config, ranks, options.replicas, dtype, options.optimizer, adapt)

    resting, working = memory(options, config, mine, rows, passes, dtype, adapt)
    held = working if options.offload else resting | working
    total = sum(held.values())

    during, after = communication(options, mine, passes, dtype, device)
    flops = flops_per_token(config, options.context)
    if mine.frozen or mine.quantised:                           # a third of a step is the gradients of weights
        flops *= 2 / 3
    busy = flops * tokens / ranks / (peak * options.mfu)
    talk, update = (sum(size / speed for size, speed in sent.values()) for sent in (during, after))
    update += muon_flops(mine, ranks) / (peak * options.mfu)
    update += 0 if options.offload else (3 * mine.weights + 2 * mine.state) / device.bandwidth
    step = max(busy, talk) + update
    time = {f"{flops * tokens:.3g} FLOPs at {options.mfu:.0%} of {ranks:,} × {peak / 1e12:g} TFLOP/s": busy,
            "communication, " + ("hidden behind that" if talk <= busy else "NOT hidden: ranks wait for it"): talk,
            "optimizer, with its own communication": update}

    lines = [
        f"{mine.parameters:,} parameters{trains(mine)} in {shards:,} shards × {options.replicas} replica(s) on "
        f"{ranks:,} × {options.device}, products in {name}",
        f"a step: {options.batch_size:,} rows × {options.context:,} = {tokens / 1e6:,.2f} M tokens; a rank takes "
        f"{passes} micro-batch(es) of {rows} row(s)",
        f"\n{'memory of a rank':60}{'GB':>9}",
        *(f"  {what:58}{size / 1e9:9.2f}" for what, size in held.items() if size),
        f"  {'total':58}{total / 1e9:9.2f}   of {device.memory / 1e9:g}"]
    if options.offload:
        in_ram = sum(resting.values()) / 1e9
        lines.append(f"  {'in the memory of the CPU; its traffic is not timed':58}{in_ram:9.2f}")
    lines += [
        f"\n{'communication of a rank and step':60}{'GB':>9}{'GB/s':>9}{'s':>9}",
        *(f"  {what:58}{size / 1e9:9.2f}{speed / 1e9:9.0f}{size / speed:9.3f}"
          for what, (size, speed) in (during | after).items() if size),
        f"\n{'time of a step':60}{'s':>9}", *(f"  {what:58}{seconds:9.3f}" for what, seconds in time.items()),
        f"  {'total':58}{step:9.3f}   MFU {flops * tokens / (step * ranks * peak):.1%}",
        f"\n{tokens / step:,.0f} tokens/s, {tokens / step / ranks:,.0f} a GPU; {steps:,} steps, "
        f"{steps * tokens / 1e9:,.2f} G tokens: {steps * step / 3600:,.1f} hours"]
    if (uneven := mine.whole / mine.parameters) > 1.1:
        lines.append(f"warning: tensors with fewer rows than {shards:,} are padded, to {uneven:.1f} times the model; "
                     "more --replicas make fewer shards")
    if total > 0.9 * device.memory:                             # the rest: CUDA context, NCCL's buffers, fragmentation
        helps = {"--recompute full": options.recompute != "full", "a smaller --micro-batch": rows > 1,
                 "--offload": not options.offload, "a --batch-size of one micro-batch a rank": passes > 1,
                 "fewer --replicas": options.replicas > 1, "a larger --world-size": uneven < 1.1}
        fits = "do not" if total > device.memory else "hardly"
        lines.append(f"warning: {total / 1e9:.1f} GB {fits} fit into {device.memory / 1e9:g}; what helps: "
                     f"{', '.join(what for what, able in helps.items() if able) or 'a GPU with more memory'}")
    return "\n".join(lines)


def trains(mine: Share) -> str:
    """How many of the parameters are trained, where not all are."""
    if not mine.frozen and not mine.quantised:
        return ""
    return f", of which {mine.learned:,} are trained, and {mine.quantised / 1e9:.2f} GB of quantised weights,"


def memory(
    options: argparse.Namespace, config: c.ModelConfig, mine: Share, rows: int, passes: int, dtype: torch.dtype,
    adapt: Adapt = as_it_is,
) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes of a rank: (at rest, at work), each {what: bytes}.

    FSDP2 gathers two layers at a time, the one at work and the next; of one the float32 gradient is being reduced. With
    gradient accumulation nothing is reduced before the last micro-batch (FSDPParam.to_accumulated_grad_if_needed): each
    rank holds the gradient of the whole model. One rank without offload is not sharded: it has copies of its weights
    only where they are cast (distributed.cast)."""
    ranks, name = options.world_size, str(dtype).removeprefix("torch.")
    *layers, root = mine.groups
    sharded = ranks > 1 or options.offload
    few = ranks > options.replicas or options.offload           # a single shard is gathered once a step, and stays
    copied = root + sum(sorted(layers)[-2:] if few else layers)
    kept, more = activations(config, rows, options.context, dtype, options.recompute, adapt)
    resting = {f"frozen parameters in {name}": mine.frozen, "quantised weights, whole on each rank": mine.quantised,
               "parameters": mine.weights, "gradients": mine.weights, f"optimizer ({options.optimizer})": mine.state}
    working = {}
    if sharded:
        what = f"gathered in {name}: embedding, head, {'2 layers' if few else 'all layers'}"
        working[what] = copied * dtype.itemsize + 4 * max(mine.trained[:-1])
        working[f"whole float32 gradients, until {passes} micro-batches are done"] = 4 * mine.learned * (passes > 1)
    elif dtype != torch.float32:
        working[f"copies of the weights in {name}"] = mine.learned * dtype.itemsize
    working[f"activations kept (recomputed: {options.recompute})"] = kept
    working["activations and gradients of the part at work"] = more
    return resting, working


def communication(
    options: argparse.Namespace, mine: Share, passes: int, dtype: torch.dtype, device: Device,
) -> tuple[dict[str, tuple[float, float]], dict[str, tuple[float, float]]]:
    """Of a rank and step: (beside the computation, after it), each {what: (bytes, bytes a second)}."""
    ranks, replicas = options.world_size, options.replicas
    shards = ranks // replicas
    *layers, root = mine.groups
    part, inside = (shards - 1) / shards, device.between(shards)
    gathered = passes * (2 * sum(layers) + root) * dtype.itemsize               # layers twice: forward, backward
    during = {
        "all-gather of weights": (gathered * part, inside),
        "reduce-scatter of gradients": (4 * sum(mine.trained) * part, inside),
        "all-reduce between replicas": (2 * mine.weights * (1 - 1 / replicas), device.between(replicas, shards)),
    }
    momentum = sum(count for _, count in mine.matrices)
    updates = sum(shape.numel() for shape, _ in mine.matrices)
    after = {
        "Muon: all-gather of momentum": (4 * momentum * part, inside),
        "Muon: broadcast of updates": (updates * dtype.itemsize * (ranks > 1), device.between(ranks)),
    }
    return during, after


def muon_flops(mine: Share, ranks: int) -> float:
    """Of the rank that has most: the ranks share out the matrices of one shape, and wait for each other."""
    shapes = Counter((*shape[:-2], *sorted(shape[-2:])) for shape, _ in mine.matrices)
    return sum(-(-count // ranks) * msign_flops(torch.Size(shape)) for shape, count in shapes.items())
