"""What the ranks of tests/test_distributed.py run: python -m torch.distributed.run … tests/ranks.py CASE OUT
REPLICAS, or forked.py's `run`

Each case works on a small sharded model, and the first rank writes what it found to OUT as JSON.
"""

import dataclasses
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from nanollm import cli
from nanollm.config import (
    MLP,
    Attention,
    CrossLayerAttention,
    Layer,
    LayerEnd,
    Mamba2,
    ModelConfig,
    Norm,
    NormedValueAttention,
    PerLayerInput,
    Rope,
    SharedBlock,
    SharedBlockScan,
)
from nanollm.init import initial_values
from nanollm.model import Decoder
from nanollm.presets import preset
from nanollm.training import distributed, optim
from nanollm.training.distributed import DTYPES, World
from nanollm.training.losses import token_loss

torch.set_num_threads(1)


def build(world: World, name: str | ModelConfig, dtype: str = "float32", **how) -> Decoder:
    with torch.device("meta"):
        model = Decoder(preset(name, 300, 32) if isinstance(name, str) else name)
    distributed.shard(model, world.mesh, DTYPES[dtype], **how)
    model.to_empty(device="cpu")
    distributed.fill(model, initial_values(model, seed=3))
    return model


def losses(world: World, name: str | ModelConfig, dtype: str = "float32", steps: int = 4, **how) -> list[float]:
    """A few steps on rows that all ranks share out; loss and gradient norm of each."""
    model, found = build(world, name, dtype, **how), []
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.1
    )  # AdamW's first steps make much of differences in the last bit
    stream = torch.Generator().manual_seed(5)
    for _ in range(steps):
        tokens = torch.randint(0, 300, (4, 33), generator=stream)
        mine = tokens.chunk(world.size)[world.rank]
        with distributed.cast(model, DTYPES[dtype]):
            nats, *_ = token_loss(model.head, model.hidden(mine[:, :-1]), mine[:, 1:])
            (nats / 128).backward()
        norm = distributed.clip(model, 1.0)
        found += [world.all_reduce(nats.item())[0] / 128, norm]
        optimizer.step()
        model.zero_grad()
    return found


def shared(world: World) -> dict:
    """Layers that use one block, beside which each has matrices of its own; and layers that read keys of another, and
    vectors that are made for all."""
    block = SharedBlock(0, Attention(4, 2, 32, Rope()), MLP(40), Norm())
    layer = Layer(SharedBlockScan(block, Mamba2(4, 16, 1, 8, 4), Norm(), 4), None, None, pre_ffn=None)
    config = dataclasses.replace(preset("mamba", 300, 32), dim=64, layers=(layer,) * 3)
    mixers = NormedValueAttention(4, 2, 16, Rope(), kept=True), CrossLayerAttention(4, 2, 16, Rope())
    layers = tuple(Layer(mixer, MLP(40), end=LayerEnd(PerLayerInput(8), Norm())) for mixer in mixers)
    keys = dataclasses.replace(preset("llama", 300, 32), dim=64, layers=layers)
    found = {how: losses(world, config, recompute=how) for how in ("none", "full")}
    return found | {f"keys {how}": losses(world, keys, recompute=how) for how in ("none", "full")}


def initial(world: World) -> dict:
    """Every toy, drawn in slices and gathered again, is what one process draws; heads that are tied stay tied."""
    found = {}
    for name in ("llama", "qwen3", "mistral", "mixtral", "mamba"):
        model = build(world, name)
        whole, expected = distributed.gather(model, True, torch.device("cpu")), Decoder(preset(name, 300, 32), seed=3)
        same = {key: torch.equal(value, expected.state_dict()[key]) for key, value in whole.state_dict().items()}
        found[name] = [len(same), sum(same.values()), (whole.head.weight is whole.embed.weight) == expected.config.tied]
    return found


def recompute(world: World) -> dict:
    return {
        f"{name} {how}": losses(world, name, recompute=how)
        for name in ("llama", "mixtral")
        for how in distributed.RECOMPUTE
    }


def variants(world: World) -> dict:
    return {
        "plain": losses(world, "llama"), "bfloat16": losses(world, "llama", "bfloat16"),
        "offload": losses(world, "llama", offload=True), "mamba": losses(world, "mamba"),
        "mixtral": losses(world, "mixtral"),
    }


def casts(world: World) -> dict:
    """Products in bfloat16 on one rank: gradients of copies in bfloat16 reach the float32 weights, which are in
    place again."""
    found = {}
    for name in ("llama", "mamba"):                                             # mamba's head is tied
        model, by_hand = build(world, name), Decoder(preset(name, 300, 32), seed=3).bfloat16()
        before, tokens = (
            list(model.parameters()), torch.randint(0, 300, (2, 17), generator=torch.Generator().manual_seed(5)),
        )
        for _ in range(2):                                                      # micro-batches: gradients add up
            with distributed.cast(model, torch.bfloat16):
                inside = {p.dtype for p in (model.embed.weight, model.head.weight)}
                token_loss(model.head, model.hidden(tokens[:, :-1]), tokens[:, 1:])[0].backward()
        token_loss(by_hand.head, by_hand.hidden(tokens[:, :-1]), tokens[:, 1:])[0].backward()
        after = list(model.parameters())
        same = [torch.equal(p.grad, 2 * q.grad.float()) for p, q in zip(after, by_hand.parameters(), strict=True)]
        found[name] = {
            "inside": [str(dtype) for dtype in inside], "same": all(same),
            "in place": all(a is b for a, b in zip(before, after, strict=True)),
            "kinds": sorted({type(p).__name__ for p in after}),
            "gradients": sorted({str(p.grad.dtype) for p in after}),
        }
    return found


def experts(world: World) -> dict:
    """Three experts: two ranks cut each of them in two. Muon, which has to put them together again."""
    config = preset("mixtral", 300, 32)
    moe = dataclasses.replace(config.layers[0].ffn, experts=3)
    config = dataclasses.replace(config, layers=(dataclasses.replace(config.layers[0], ffn=moe),) * 2)
    with torch.device("meta"):
        model = Decoder(config)
    distributed.shard(model, world.mesh, torch.float32)
    model.to_empty(device="cpu")
    distributed.fill(model, initial_values(model, seed=3))
    optimizers, tokens = (
        optim.build(model, "muon", 0.1, torch.float32),
        torch.randint(0, 300, (4, 33), generator=torch.Generator().manual_seed(5)),
    )
    for _ in range(3):
        mine = tokens.chunk(world.size)[world.rank]
        nats, *_ = token_loss(model.head, model.hidden(mine[:, :-1]), mine[:, 1:])
        (nats / 128).backward()
        optim.step(optimizers, 0.003)
        model.zero_grad()
    gate = dict(model.named_parameters())["layers.0.ffn.experts.gate"]
    whole = distributed.gather(model, True, torch.device("cpu"))
    return {
        "loss": world.all_reduce(nats.item())[0] / 128, "slice": list(distributed.local(gate).shape),
        "sum": sum(p.double().abs().sum().item() for p in whole.parameters()),
    }


def memory(world: World) -> dict:
    """What a rank holds of weights and optimizer: numbers, over those of the whole model."""
    model = build(world, "llama")
    tensors = optim.tensors(model, optim.build(model, "adamw", 0.0, torch.float32))
    held = [
        distributed.local(tensor).numel() for tensor in tensors.values() if tensor.ndim
    ]  # a count of steps has none
    return {"share": sum(held) / (3 * sum(p.numel() for p in Decoder(preset("llama", 300, 32)).parameters()))}


def broken(world: World) -> dict:
    """A NaN in the loss, then one in a gradient, of the last rank only: every rank has to see it."""
    found = []
    for where in ("loss", "gradient"):
        model = build(world, "llama")
        tokens = torch.randint(0, 300, (2, 17))
        hidden = model.hidden(tokens[:, :-1])
        nats, *_ = token_loss(model.head, hidden, tokens[:, 1:])
        if world.rank == world.size - 1 and where == "loss":
            nats = nats * torch.nan
        if world.rank == world.size - 1 and where == "gradient":
            hidden.register_hook(lambda g: g * torch.nan)
        nats.backward()
        found.append([str(distributed.clip(model, 1.0)), str(world.all_gather(nats.item()).sum().item())])
    return {"all": world.all_gather_objects(found)}


def together(world: World) -> dict:
    """An error on one rank is the same error on all; none waits for another."""
    from nanollm.errors import DataError

    def work() -> str:
        if world.rank == world.size - 1:
            raise DataError("the last rank's file is gone")
        return "fine"

    try:
        world.on_all_ranks(work)
        caught = "nothing"
    except DataError as error:
        caught = str(error)
    return {
        "caught": world.all_gather_objects(caught), "first": world.all_gather_objects(world.on_rank_0(lambda: "once")),
        "total": world.all_reduce(1, world.rank), "gathered": world.all_gather_objects(world.rank),
    }


def run() -> None:
    name, out, replicas = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    with distributed.world("cpu", replicas) as world:
        found = globals()[name](world)
        if world.rank == 0:
            out.write_text(json.dumps(found))


if __name__ == "__main__":
    cli.main(run)
