"""Compile every launch for a GPU that is not there, and read what the assembler made of it.

    with compile_only("sm_90") as (found, used):        # inside, kernel[grid](…) is compiled just as a launch would compile it, and is not run
        rms_norm(torch.empty(64, 4096), …)              # the library's own wrappers on CPU tensors: nothing is written twice
    found                                               # [Compiled(kernel="forward_kernel", registers=64, spills=0, …), …]
    used                                                # {("norm", "any", "4096")}: entries of the tuning table

This needs a process without TRITON_INTERPRET: the decorator @triton.jit chooses between compiler and interpreter once. Registers and spills
stand in the header of the machine code; instructions are counted in the PTX that it was made of. The tools come inside triton's wheel.
"""

import contextlib
import dataclasses
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator

assert os.environ.get("TRITON_INTERPRET") != "1", "to compile, start a process without TRITON_INTERPRET"
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")          # multiply and add in one instruction, whatever triton's default

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import KernelInterface

import kernels.common

INSTRUCTIONS = {
    "tensor": r"\b(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)\b",                                   # on the tensor cores
    "wide": r"\b(?:ld|st)\.global\S*\.v(?:[48]\.b32|[24]\.b64)|\bcp\.async\.c[ag]\S*[^;]*\b0x10\b|\bcp\.async\.bulk",     # 16 bytes a thread or more
    "narrow": r"\b(?:ld|st)\.global(?!\S*\.v(?:[48]\.b32|[24]\.b64))|\bcp\.async\.c[ag]\S*[^;]*\b0x[48]\b",
    "exp2": r"\bex2\.approx",
    "atomic": r"\b(?:atom|red)\.",
    "float64": r"\b(?:add|sub|mul|fma|div|cvt)\S*\.f64\b",
}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """One kernel with one set of constants. spills and shared in bytes, the rest in instructions."""
    kernel: str
    constants: str              # of the tuning table and of the case: ADD=0 BLOCK=4096 …
    dtypes: str
    warps: int
    stages: int
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

    def get_current_device(self) -> int:                # triton keeps what it compiled a device: another target, another device
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
        said = subprocess.run([knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"\b{what}:(\d+)", said)[1]) for what in ("REG", "STACK", "LOCAL"))
    return registers, stack + local


def read(kernel: object, name: str, arguments: dict[str, object]) -> Compiled:
    """What one compiled kernel is made of."""
    registers, spills = resources(kernel.asm["cubin"])
    counts = {what: len(re.findall(pattern, kernel.asm["ptx"])) for what, pattern in INSTRUCTIONS.items()}
    constants = " ".join(f"{key}={int(value) if isinstance(value, bool) else value}" for key, value in arguments.items() if key.isupper() and len(key) > 1)
    dtypes = " ".join(dict.fromkeys(str(value.dtype)[6:] for value in arguments.values() if isinstance(value, torch.Tensor) and value.is_floating_point()))
    meta = kernel.metadata
    return Compiled(name, constants, dtypes, meta.num_warps, meta.num_stages, registers, spills, meta.shared, **counts)


@contextlib.contextmanager
def compile_only(target: str) -> Iterator[tuple[list[Compiled], set[tuple[str, str, str]]]]:
    """target: "sm_90" and such. Yields two collections that are filled at the end: each distinct kernel, each tuning entry used."""
    launch, active, entry = KernelInterface.__getitem__, driver._active, kernels.common._entry
    found, used, distinct = [], set(), {}

    def instead(kernel, grid):
        def compile_it(*args, **options):
            compiled = kernel.warmup(*args, grid=grid, **options)
            distinct[read(compiled, kernel.fn.__name__, dict(zip(kernel.arg_names, args)) | options)] = None
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
        KernelInterface.__getitem__, kernels.common._entry, kernels.common.TARGET, driver._active = launch, entry, None, active
        found += distinct
