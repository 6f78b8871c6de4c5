"""Each operation of benchmarks/kernel_cases.py: ours, the definition in eager PyTorch, and through torch.compile.

In two rounds, each in the order of FIRST: ours, eager and other libraries, then torch.compile, which takes seconds to
minutes a case. A share is the floor of kernels/roofline.py over the time, with the ceilings measured in this session.
"""

import time
from collections.abc import Callable, Iterator

import torch

from benchmarks.gpu.facts import ceilings
from benchmarks.gpu.items import Item, Row, Setting, Tell
from benchmarks.kernel_cases import (
    Case,
    Sizes,
    attentions,
    duals,
    elementwise,
    experts,
    norms,
    products,
    scans,
)
from benchmarks.kernels import error, timed
from kernels.roofline import Device, Work
from nanollm import ops

GROUPS = (attentions, products, norms, elementwise, experts, duals, scans)
FIRST = ("attend 2 x 8192", "attend backward 2 x 8192", "quantized_linear", "decode", "linear_cross_entropy",
         "rms_norm 16384 x 4096", "rms_norm backward 16384 x 4096", "gated", "add_rms_norm", "rotate", "expert_mlp",
         "ssd", "delta_walk", "mamba_scan", "causal_conv")
DRY = ("rms_norm 16", "gated 16", "quantized_linear")
AMOUNTS: dict[str, Callable[[Work], tuple[float, str]]] = {
    "bytes": lambda work: (work.bytes / 1e9, "GB/s"), "FLOPs": lambda work: (work.flops / 1e12, "TFLOP/s"),
    "exp2": lambda work: (work.exp2 / 1e12, "T exp2/s"),
}


def named(case: Case) -> str:
    return f"{case.name} {case.shape}"


def ordered(setting: Setting) -> list[Case]:
    """What matters most first. A group whose inputs cannot be made is left out, and the error is printed to the log."""
    sizes = Sizes(setting.dry, setting.device.type, torch.float32 if setting.dry else torch.bfloat16)
    found = []
    for group in GROUPS:
        try:
            found += list(group(sizes))
        except Exception as problem:                            # out of memory, or a broken kernel
            print(f"{group.__name__}: {type(problem).__name__}: {problem}", flush=True)
    if setting.dry:
        return [next(case for case in found if named(case).startswith(name)) for name in DRY]
    ranks = {id(case): next((n for n, name in enumerate(FIRST) if named(case).startswith(name)), len(FIRST))
             for case in found}
    return sorted(found, key=lambda case: ranks[id(case)])


def items(setting: Setting) -> Iterator[Item]:
    cases, device = ordered(setting), ceilings(setting)
    for case in cases:
        yield Item(named(case), lambda tell, case=case: measured(case, device, setting, tell), 60)
    for case in cases:
        yield Item(f"{named(case)} | compiled", lambda tell, case=case: compiled(case, device, setting), 60)


def milliseconds(case: Case, version: Callable, setting: Setting) -> float:
    """Of one call. In a dry run of a single one, which says nothing."""
    if not setting.dry:
        return timed(case, version)
    inputs, start = case.inputs(), time.perf_counter()
    version(*inputs)
    return (time.perf_counter() - start) * 1e3


def measured(case: Case, device: Device, setting: Setting, tell: Tell) -> Row:
    """Ours first, so that it is known when the others fail. A kernel that differs from its definition is an error."""
    wrong = error(case)
    with ops.using("triton"):
        ms = milliseconds(case, case.run, setting)
    work, limit = case.work, case.work.limit(device)
    amount, unit = AMOUNTS[limit](work)
    row: Row = {"operation": case.name, "shape": case.shape, "ms": ms, "rate": f"{amount / ms * 1e3:.4g} {unit}",
                "of roofline": work.floor(device) * 1e3 / ms, "set by": limit, "goal": case.goal, "error": wrong}
    tell(row)
    for label, version in {"eager": case.run, **case.rivals}.items():
        with ops.using("torch"):
            try:
                row |= beside(label, milliseconds(case, version, setting), ms, case, device)
            except Exception as problem:                        # out of memory, or another library's refusal
                row[f"{label} of roofline"] = type(problem).__name__
        tell(row)
    if setting.device.type == "cuda":
        torch.cuda.empty_cache()
    return row


def compiled(case: Case, device: Device, setting: Setting) -> Row:
    """The definition through torch.compile, beside the time that ours took."""
    ours = next((row["ms"] for row in setting.rows("kernels")
                 if (row.get("operation"), row.get("shape")) == (case.name, case.shape)), float("nan"))
    torch.compiler.reset()
    with ops.using("torch"):
        ms = milliseconds(case, torch.compile(case.run, dynamic=False), setting)
    if setting.device.type == "cuda":
        torch.cuda.empty_cache()
    return beside("compiled", ms, ours, case, device)


def beside(label: str, ms: float, ours: float, case: Case, device: Device) -> Row:
    """Its share, and how many times our time it takes: above 1 we are faster."""
    return {f"{label} of roofline": case.work.floor(device) * 1e3 / ms, f"x {label}": ms / ours}
