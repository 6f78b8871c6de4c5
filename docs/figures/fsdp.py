"""FSDP over time: what the link does while a layer computes.

    forward   all-gather → x W      backward   all-gather → ∂W → reduce-scatter          nanollm/training/distributed.py

The order of collectives and layers is recorded from a forward and a backward pass of `shard` on a process group of
eight ranks that do not exist. How long each takes follows from the sizes of Llama-3.1-8B, four of its layers, and the
data sheet of an H100 (nanollm/training/plan.py, flops.py) at MFU of the data sheet's peak. Collectives run one after
the other, each gather at most one layer ahead. A backward pass takes twice the forward pass.
"""

from dataclasses import replace

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from docs.figures.drawing import Axes, Picture
from nanollm.config import MLP
from nanollm.layers import MODULES
from nanollm.model import Decoder
from nanollm.presets import preset
from nanollm.training.distributed import build_mesh, shard
from nanollm.training.flops import DEVICES
from nanollm.training.losses import token_loss
from nanollm.training.plan import share

RANKS, LAYERS, MFU, CONTEXT, H100 = 8, 4, 0.5, 1024, DEVICES["h100"]
HUES = {"gather": "a", "forward": "c", "backward": "d", "scatter": "b"}


def recorded() -> list[tuple[str, int]]:
    """What is asked for, in order: ("gather", 0), ("forward", 0) …; LAYERS is what is in no layer, which computes the
    head."""
    from torch.testing._internal.distributed.fake_pg import FakeStore  # makes the backend "fake" known
    toy, found = preset("llama-toy"), []
    layers = (replace(layer, ffn=MLP(64 * (i + 1))) for i, layer in enumerate(toy.layers[:LAYERS]))    # told by size
    model, tokens = Decoder(replace(toy, layers=tuple(layers))), torch.zeros(1, 8, dtype=torch.long)
    sizes = {sum(p.numel() for p in layer.parameters()): i for i, layer in enumerate(model.layers)}

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            if "_allgather_base_" in str(operation):
                found.append(("gather", sizes.get(args[0].numel(), LAYERS)))
            elif "_reduce_scatter_base_" in str(operation):
                found.append(("scatter", sizes.get(RANKS * args[0].numel(), LAYERS)))
            return operation(*args, **(kwargs or {}))

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    try:
        shard(model, build_mesh("cpu", RANKS, 1), torch.float32)
        for i, layer in enumerate(model.layers):
            layer.register_forward_pre_hook(lambda *_, i=i: found.append(("forward", i)))
            layer.register_full_backward_pre_hook(lambda *_, i=i: found.append(("backward", i)))
        with Record():
            hidden = model.hidden(tokens)
            found.append(("forward", LAYERS))
            loss, _, _ = token_loss(model.head, hidden, tokens)
            found.append(("backward", LAYERS))
            loss.backward()
    finally:
        dist.destroy_process_group()
    return found


def timed(order: list[tuple[str, int]], tokens: int) -> list[tuple[str, int, float, float]]:
    """(what, which, start, end) in milliseconds."""
    config = preset("llama-8b")
    config = replace(config, layers=config.layers[:LAYERS])
    sizes = share(config, RANKS, 1, torch.bfloat16, "adamw").groups
    layer = config.layers[0]
    adds = [MODULES[type(layer.mixer)].multiply_adds(layer.mixer, config.dim, CONTEXT)
            + MODULES[type(layer.ffn)].multiply_adds(layer.ffn, config.dim)] * LAYERS + [config.dim * config.vocab]
    link, busy, began, gathered, found = 0.0, 0.0, 0.0, {}, []
    for what, i in order:
        if what in ("forward", "backward"):
            start = max(busy, gathered[i])
            busy = start + 2e3 * adds[i] * tokens * (1 + (what == "backward")) / (MFU * H100.bfloat16)
            began, end = start, busy
        else:
            ready = began if what == "gather" else busy
            start = max(link, ready)
            end = link = start + 1e3 * sizes[i] * (2 if what == "gather" else 4) * (1 - 1 / RANKS) / H100.link
            if what == "gather":
                gathered[i] = end
        found.append((what, i, start, end))
    return found


def draw() -> Picture:
    """Two timelines."""
    order = recorded()
    picture = Picture(770, 330, "FSDP over time: collectives on the link beside the products, for many tokens and few")
    for top, tokens in ((70, 8192), (214, 1024)):
        spans = timed(order, tokens)
        total = max(end for *_, end in spans)
        axes = Axes(picture, (84, top, 650, 62), (0, total), (0, 2))
        picture.text(84, top - 14, f"{tokens:,} tokens a GPU: {total:.1f} ms", "head")
        for lane, words in enumerate(("products", "link")):
            picture.text(76, top + 22 + 31 * lane, words, "end small")
        for what, hue in HUES.items():
            lane = int(what in ("gather", "scatter"))
            mine = [(axes.at(start, 0)[0], axes.at(end, 0)[0], i) for name, i, start, end in spans if name == what]
            picture.boxes([(a, top + 4 + 31 * lane, b - a - 1, 26) for a, b, _ in mine], hue, 0.75)
            for a, b, i in mine:
                if b - a > 12:
                    picture.text((a + b) / 2, top + 22 + 31 * lane, "+" if i == LAYERS else str(i), "mid small")
    for x, (what, hue) in zip((84, 214, 314, 424), HUES.items(), strict=True):
        picture.boxes([(x, 300, 12, 12)], hue, 0.75)
        picture.text(x + 18, 310, {"gather": "all-gather", "scatter": "reduce-scatter"}.get(what, what), "small")
    picture.text(560, 310, "+  embedding, norm, head", "small dim")
    return picture
