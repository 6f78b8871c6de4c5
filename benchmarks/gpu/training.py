"""Whole training steps of a 1B model, as train.py takes them: tokens a second, MFU, peak memory.

With and without kernels, eager and compiled, on the same weights and tokens: the losses must be alike. MFU is as in
nanollm/training/flops.py, over the vendor's dense peak; "of products" over the rate measured in this session.
"""

import contextlib
import time
from collections.abc import Iterator

import torch

from benchmarks import train as bench
from benchmarks.gpu.decode import draw
from benchmarks.gpu.facts import ceilings
from benchmarks.gpu.items import Item, Row, Setting, Tell
from nanollm import ops
from nanollm.config import ModelConfig
from nanollm.presets import transformer
from nanollm.training import distributed
from nanollm.training.flops import flops_per_token, peak_flops

STEPS = 12                                  # at most, after two that are not counted


def shape(setting: Setting) -> tuple[ModelConfig, int, int]:
    """Config, rows, tokens a row."""
    if setting.dry:
        return transformer(512, 64, 2, 4, 2, 128, tied=True, context=64), 2, 64
    return bench.SHAPES["llama-1b"][:3]


def items(setting: Setting) -> Iterator[Item]:
    with contextlib.ExitStack() as stack:
        world = stack.enter_context(distributed.world(setting.device.type))
        for compile in (False, True):
            for kernels in ("auto", "torch"):
                name = ("kernels" if kernels == "auto" else "definitions") + ", compiled" * compile
                yield Item(name, lambda tell, how=(name, kernels, compile): trained(setting, world, *how, tell), 150)


def trained(setting: Setting, world: distributed.World, name: str, kernels: str, compile: bool, tell: Tell) -> Row:
    """Steps until there are enough, or half of the time that is left is used up."""
    config, rows, length = shape(setting)
    device, dtype = setting.device.type, "float32" if setting.dry else "bfloat16"
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    torch.compiler.reset()
    with ops.using(kernels):
        step = bench.ours(config, dtype, device, compile, world, draw)
        tokens = torch.randint(0, config.vocab, (rows, length + 1), generator=torch.Generator().manual_seed(0))
        start = time.perf_counter()
        first = step(tokens)
        row: Row = {"how": name, "rows × tokens": f"{rows} × {length}", "first step s": time.perf_counter() - start}
        step(tokens)
        taken, end = [], setting.left() / 2
        while len(taken) < (2 if setting.dry else STEPS) and (not taken or setting.left() > end):
            start = time.perf_counter()
            last = step(tokens)                                 # returns the loss, so the device is done
            taken.append(time.perf_counter() - start)
            seconds = sorted(taken)[len(taken) // 2]
            rate = rows * length / seconds
            flops = flops_per_token(config, length) * rate
            peak = peak_flops(world.device, "bfloat16")
            row |= {"ms a step": seconds * 1e3, "tokens/s": rate, "TFLOP/s": flops / 1e12,
                    "MFU, of peak": None if peak is None else flops / peak,
                    "of products": flops / ceilings(setting).flops, "first loss": first, "last loss": last,
                    "steps": len(taken)}
            if device == "cuda":
                row["peak GB"] = torch.cuda.max_memory_allocated() / 1e9
            tell(row)
    return row
