"""The kernels on an NVIDIA GPU: how long, what share of the roofline, how many times PyTorch's and others' speed.

    python -m benchmarks.kernels                     every operation; a table and one JSON line
    python -m benchmarks.kernels --only attend       the operations whose name begins so
    python -m benchmarks.kernels --write             … and keep the table as benchmarks/kernels.md

Each case (kernel_cases.py) is first compared with its definition: a wrong kernel has no speed. Then all versions of it
are timed in the same run on random numbers: the median of many calls, on inputs in rotation so that no call finds its
own in the cache, replayed as a CUDA graph where a call takes less than 50 µs. The share is the floor of
kernels/roofline.py over the time. "x eager" is the definition's time over ours, "x compiled" that of the definition
through torch.compile: above 1 we are faster. Liger-Kernel, flash-attn, mamba-ssm and causal-conv1d take part where they
are installed.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from benchmarks.kernel_cases import Case, Sizes, cases
from kernels.roofline import DEVICES, Device
from nanollm import ops
from nanollm.errors import RunError

CACHE = 200e6                               # bytes of inputs in rotation: more than any GPU's cache
SHORT = 0.05                                # milliseconds: below, launches would be timed and not kernels
TOLERANCE = 2e-2                            # of a bfloat16 result against its definition's, relative


def results(case: Case, version: Callable, inputs: tuple, cotangents: list[Tensor] | None = None) -> list[Tensor]:
    """What a version gives for these inputs: its results, or their gradients."""
    found = version(*inputs)
    found = [found] if isinstance(found, Tensor) else list(found)
    if not case.backward:
        return found
    cotangents = cotangents or [torch.ones_like(r) for r in found]
    return list(torch.autograd.grad(found, wanted(inputs), cotangents))


def wanted(inputs: tuple) -> list[Tensor]:
    return [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]


def error(case: Case) -> float:
    """The largest relative distance between what kernel and definition give.

    Raises RunError where that is no rounding error."""
    inputs, answers = case.inputs(), []
    for mode in ("triton", "torch"):
        with ops.using(mode):
            answers.append([r.detach().double() for r in results(case, case.run, inputs)])
    pairs = zip(*answers, strict=True)
    worst = max(float((mine - theirs).norm() / theirs.norm().clamp(min=1e-30)) for mine, theirs in pairs)
    if not worst <= TOLERANCE:
        raise RunError(f"{case.name} {case.shape}: differs from its definition by {worst:.1e}")
    return worst


def timed(case: Case, version: Callable) -> float:
    """Milliseconds of one call."""
    first = case.inputs()
    count = min(16, 1 + math.ceil(CACHE / sum(x.nbytes for x in first if isinstance(x, Tensor))))
    rotation, turn = [first, *(case.inputs() for _ in range(count - 1))], 0
    if case.backward:
        graphs = []
        for inputs in rotation:
            found = version(*inputs)
            found = [found] if isinstance(found, Tensor) else list(found)
            graphs.append((found, wanted(inputs), [torch.randn_like(r) for r in found]))

    def call() -> None:
        nonlocal turn
        turn = (turn + 1) % count
        if case.backward:
            torch.autograd.grad(*graphs[turn], retain_graph=True)
        else:
            version(*rotation[turn])

    ms = triton.testing.do_bench(call, return_mode="median")
    return triton.testing.do_bench_cudagraph(call, return_mode="median") if ms < SHORT and not case.backward else ms


def measure(case: Case, device: Device) -> dict[str, Any]:
    """One row. Ratios by the name of the version; a version that fails has the name of its error."""
    wrong = error(case)
    with ops.using("triton"):
        ours = timed(case, case.run)
    work, limit = case.work, case.work.limit(device)
    amounts = {"bytes": (work.bytes / 1e9, "GB/s"), "FLOPs": (work.flops / 1e12, "TFLOP/s"),
               "exp2": (work.exp2 / 1e12, "T exp2/s")}
    amount, unit = amounts[limit]
    row = {"operation": case.name, "shape": case.shape, "ms": ours, "rate": f"{amount / ours * 1e3:.4g} {unit}",
           "share": work.floor(device) * 1e3 / ours, "set by": limit, "goal": case.goal, "error": wrong, "x": {}}
    compiled = torch.compile(case.run, dynamic=False)
    for label, version in {"eager": case.run, "compiled": compiled, **case.rivals}.items():
        with ops.using("torch"):
            try:
                row["x"][label] = timed(case, version) / ours
            except Exception as problem:                            # out of memory, or another library's refusal
                row["x"][label] = type(problem).__name__
    torch.compiler.reset()
    torch.cuda.empty_cache()
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    others = list(dict.fromkeys(label for row in rows for label in row["x"]))
    ratios_of = "".join(f" x {label} |" for label in others)
    lines = ["| operation | shape | ms | rate | of the roofline | goal |" + ratios_of,
             "|---|---|--:|--:|--:|--:|" + "--:|" * len(others)]
    for row in rows:
        ratios = [row["x"].get(label, "") for label in others]
        cells = "".join(f" {r:.2f} |" if isinstance(r, float) else f" {r} |" for r in ratios)
        lines.append(f"| {row['operation']} | {row['shape']} | {row['ms']:.3f} | {row['rate']} "
                     f"| {row['share']:.0%} ({row['set by']}) | {row['goal']} |{cells}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", default="", metavar="NAME", help="operations whose name begins so")
    parser.add_argument("--ceilings", default="h200", choices=DEVICES,
                        help="the device whose roofline the share is of (%(default)s)")
    parser.add_argument("--write", action="store_true", help="keep the table as benchmarks/kernels.md")
    options = parser.parse_args()
    if not (torch.cuda.is_available() and torch.version.cuda):
        sys.exit("benchmarks.kernels needs an NVIDIA GPU, and torch sees none here; "
                 "python -m kernels.roofline tells the floors without one")
    torch.manual_seed(0)
    device, rows = DEVICES[options.ceilings], []
    machine = (f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, "
               f"{date.today()}; ceilings: {device.name}")
    for case in cases(Sizes(small=False, device="cuda")):
        if case.name.startswith(options.only):
            rows.append(measure(case, device))
            print(table(rows[-1:]).splitlines()[-1], flush=True)
    print(f"\n{machine}\n\n{table(rows)}")
    if options.write:
        head = f"# Kernels beside PyTorch\n\n`python -m benchmarks.kernels --write`, {machine}\n\n"
        Path(__file__).with_suffix(".md").write_text(f"{head}{table(rows)}\n")
    print(json.dumps({"machine": machine, "rows": rows}))


if __name__ == "__main__":
    main()
