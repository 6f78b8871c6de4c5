"""What every kernel file shares: how an operation refuses, the numbers it is tuned to, how many programs fill a device.

An operation `y = op(x, …)` is, in this order in its file,

    @triton.jit  forward and backward kernels           one program computes one tile
    custom_op    nanollm::op, nanollm::op_backward      allocate, launch; a fake version for torch.compile; autograd
    @operation   op(x, …)                               the signature of the definition in `nanollm`; refuses what it
                                                        cannot do right

Numbers that a device is tuned to (tile sizes, warps, stages) are in tuning/*.json and never in the code: nothing is
measured at run time, so a result does not depend on what ran before, and no call takes minutes.
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
NEVER = 2**31                               # sizes that are an int32 inside a kernel stay below; all offsets are int64


def operation(refuses: Callable[..., str | None]) -> Callable[[Callable], Callable]:
    """Make a function an operation: refuses(same arguments) says in a sentence what is not supported, or None.

    Called directly, the operation raises it as a ValueError. `nanollm.ops` asks by itself, and then calls `unchecked`
    or the definition.
    """
    def wrap(run: Callable) -> Callable:
        """`run`, which now asks first. It carries `refuses`, and itself as `unchecked`."""
        @functools.wraps(run)
        def checked(*args, **kwargs):
            reason = refuses(*args, **kwargs)
            if reason is not None:
                raise ValueError(f"kernels.{run.__name__}: {reason}")
            return run(*args, **kwargs)

        checked.refuses, checked.unchecked = refuses, run
        return checked
    return wrap


INTERPRETS_BFLOAT16 = False                 # set by the tests, which repair it


@torch.compiler.assume_constant_result      # torch.compile cannot follow it into triton's settings
def interpreting() -> bool:
    """Whether TRITON_INTERPRET=1: kernels run on a CPU, slowly."""
    return bool(triton.knobs.runtime.interpret)


def unlike(x: Tensor, **others: Tensor | None) -> str | None:
    """Refuse tensors on another device than x, and dtypes that no kernel computes with. Absent tensors pass."""
    if not x.is_cuda and TARGET is None:
        if not interpreting():
            return (f"tensors on {x.device}; kernels run on an NVIDIA GPU, "
                    "or with TRITON_INTERPRET=1 in Triton's interpreter")
        dtypes = {tensor.dtype for tensor in (x, *others.values()) if tensor is not None}
        if not INTERPRETS_BFLOAT16 and torch.bfloat16 in dtypes:
            return "Triton's interpreter gives wrong numbers in bfloat16; float32 and float16 are right"
    for name, tensor in {"the first argument": x, **others}.items():
        if tensor is not None and tensor.device != x.device:
            return f"{name} is on {tensor.device}, the first argument on {x.device}"
        if tensor is not None and tensor.is_floating_point() and tensor.dtype not in FLOATS:
            return f"{name} is {str(tensor.dtype)[6:]}, supported are float32, float16 and bfloat16"
    return None


# ---- tuning

TABLE = {name: rows for path in sorted(Path(__file__).parent.glob("tuning/*.json"))
         for name, rows in json.loads(path.read_text()).items()}
TARGET: str | None = None                   # "sm_90": compile as for that device (set by tests, which have no device)


def arch(device: torch.device) -> str:
    """The row of the tuning table: sm_80 (A100), sm_90 (H100, H200), sm_100 (B200); "any" on all else."""
    if TARGET is not None:
        return TARGET
    if device.type != "cuda":
        return "any"
    major, minor = capability(device)
    return f"sm_{major}{minor}"


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def tuned(name: str, size: int, device: torch.device) -> dict[str, int]:
    """Tile sizes, num_warps and num_stages of a kernel, to be passed on to its launch.

    `size` is what the kernel is tuned by (its file says what: a width, a head width); the next larger entry holds.
    A device without a row of its own has "any", which fits in the shared memory of every GPU since 2020.
    """
    rows = TABLE[name]
    return _entry(name, size, arch(device) if arch(device) in rows else "any")


@functools.cache
def _entry(name: str, size: int, row: str) -> dict[str, int]:
    entries = TABLE[name][row]
    fitting = [int(key) for key in entries if int(key) >= size]
    if not fitting:
        raise ValueError(f"kernels/tuning: {name} has no entry for a size of {size}, the largest is {largest(name)}")
    return entries[str(min(fitting))]


def largest(name: str) -> int:
    """The largest size that the table has an entry for, on every device."""
    return min(max(int(key) for key in entries) for entries in TABLE[name].values())


def multiprocessors(device: torch.device) -> int:
    """How many programs of a persistent kernel run side by side, at one a multiprocessor."""
    if TARGET is not None:
        return 132
    return _multiprocessors(device) if device.type == "cuda" else 2


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
