"""Compile every launch for a GPU that is not there, and read what the assembler made of it.

    with compile_only("sm_90") as (found, used):        # inside, kernel[grid](…) is compiled as by a launch, not run
        rms_norm(torch.empty(64, 4096), …)              # the library's own wrappers on CPU tensors
    found                                               # {Launch(kernel="forward_kernel", …): Compiled(registers=64 …)}
    used                                                # {("norm", "any", "4096")}: entries of the tuning table

This needs a process without TRITON_INTERPRET: the decorator @triton.jit chooses between compiler and interpreter once.
Registers and spills are in the header of the machine code; instructions are counted in the PTX that it was made of. The
tools come inside triton's wheel.
"""

import ast
import contextlib
import functools
import hashlib
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

assert os.environ.get("TRITON_INTERPRET") != "1", "to compile, start a process without TRITON_INTERPRET"
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")          # multiply and add in one instruction, in every triton

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import KernelInterface

import kernels.common

HERE = Path(kernels.common.__file__).parent
INSTRUCTIONS = {
    "tensor": r"\b(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)\b",                           # on the tensor cores
    # 16 bytes a thread or more
    "wide": r"\b(?:ld|st)\.global\S*\.v(?:[48]\.b32|[24]\.b64)|\bcp\.async\.c[ag]\S*[^;]*\b0x10\b|\bcp\.async\.bulk",
    "narrow": r"\b(?:ld|st)\.global(?!\S*\.v(?:[48]\.b32|[24]\.b64))|\bcp\.async\.c[ag]\S*[^;]*\b0x[48]\b",
    "exp2": r"\bex2\.approx",
    "atomic": r"\b(?:atom|red)\.",
    "float64": r"\b(?:add|sub|mul|fma|div|cvt)\S*\.f64\b",
}


class Launch(NamedTuple):
    """One kernel with one set of constants."""
    kernel: str
    constants: str              # of the tuning table and of the case: ADD=0 BLOCK=4096 …
    dtypes: str
    warps: int
    stages: int
    sources: str                # digest of the kernel's file, of all that it imports from kernels/, and of which sizes
                                # are 1 or multiples of 16


class Compiled(NamedTuple):
    """What it is made of. spills and shared in bytes, the rest in instructions."""
    registers: int
    spills: int
    shared: int
    tensor: int
    wide: int
    narrow: int
    exp2: int
    atomic: int
    float64: int


class NoDevice:
    """What a launch asks the driver before it would launch."""

    def __init__(self, target: GPUTarget) -> None:
        self.target, self.utils = target, self

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:                # triton keeps compiled kernels by device: here by target
        return self.target.arch

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_properties(self, device: int = 0) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024, "multiprocessor_count": 132}


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread, and bytes of local memory: there is none but what registers spill to."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"\b{what}:(\d+)", said)[1]) for what in ("REG", "STACK", "LOCAL"))
    return registers, stack + local


def read(kernel: Any) -> Compiled:
    registers, spills = resources(kernel.asm["cubin"])
    counts = {what: len(re.findall(pattern, kernel.asm["ptx"])) for what, pattern in INSTRUCTIONS.items()}
    return Compiled(registers, spills, kernel.metadata.shared, **counts)


def named(kernel: Any, arguments: dict[str, Any]) -> Launch:
    words = {key: int(value) if isinstance(value, bool) else value for key, value in arguments.items()
             if key.isupper() and len(key) > 1}
    constants = " ".join(f"{key}={value}" for key, value in words.items())
    tensors = [value for value in arguments.values() if isinstance(value, torch.Tensor)]
    dtypes = " ".join(dict.fromkeys(str(tensor.dtype)[6:] for tensor in tensors if tensor.is_floating_point()))
    sizes = [value.data_ptr() if isinstance(value, torch.Tensor) else value for value in arguments.values()]
    special = [(size == 1, size % 16 == 0) for size in sizes if isinstance(size, int)]     # triton compiles them apart
    compiled_from = sources(kernel.fn.__module__.removeprefix("kernels.")) + str(special)
    digest = hashlib.sha256(compiled_from.encode()).hexdigest()[:12]
    warps, stages = arguments.get("num_warps", 4), arguments.get("num_stages", 3)
    return Launch(kernel.fn.__name__, constants, dtypes, warps, stages, digest)


@functools.cache
def sources(module: str) -> str:
    return "".join((HERE / f"{name}.py").read_text() for name in sorted(imported(module)))


def imported(module: str) -> frozenset[str]:
    """A module of kernels/ and all that it imports from there."""
    found = set()
    for node in ast.walk(ast.parse((HERE / f"{module}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "kernels":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kernels."):
            found.add(node.module.removeprefix("kernels."))
    return frozenset({module}.union(*map(imported, found)))


@contextlib.contextmanager
def compile_only(
    target: str, known: Callable[[Launch], bool] = lambda launch: False,
) -> Iterator[tuple[dict[Launch, Compiled | None], set[tuple[str, str, str]]]]:
    """target: "sm_90" and such. known: whether a launch need not be compiled.

    Yields what is filled inside: each distinct launch, with None where it was known, and each tuning entry used."""
    launch, active, entry = KernelInterface.__getitem__, driver._active, kernels.common._entry
    found, used = {}, set()

    def instead(kernel, grid):
        def compile_it(*args, **options):
            this = named(kernel, dict(zip(kernel.arg_names, args, strict=False)) | options)     # the rest have names
            found[this] = None if known(this) else read(kernel.warmup(*args, grid=grid, **options))
        return compile_it

    def noted(name, size, row):
        values = entry(name, size, row)
        used.add((name, row, next(key for key, value in kernels.common.TABLE[name][row].items() if value is values)))
        return values

    KernelInterface.__getitem__, kernels.common._entry, kernels.common.TARGET = instead, noted, target
    driver.set_active(NoDevice(GPUTarget("cuda", int(target[3:]), 32)))
    try:
        yield found, used
    finally:
        KernelInterface.__getitem__, kernels.common._entry, kernels.common.TARGET = launch, entry, None
        driver._active = active
