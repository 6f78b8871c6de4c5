"""The one door to the kernels: `@accelerated` above a definition, a switch, and nothing else.

    @accelerated
    def rms_norm(x, gain, eps, …):          the definition: plain PyTorch, what a reader reads and what a CPU runs
        …

    NANOLLM_KERNELS=auto       on an NVIDIA GPU kernels.rms_norm runs in its place, same signature, same result up to
                               rounding; where the kernel does not support the arguments (a width, a dtype, a stride)
                               the definition runs
                    torch      always the definition
                    triton     always the kernel; ValueError where it does not support the arguments

    with using("torch"): …     the same, for a block of code

`kernels` is imported when it is first needed, so nothing here asks for Triton or a GPU.
"""

import functools
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor

from nanollm.errors import InputError

Definition = TypeVar("Definition", bound=Callable)


class Kernel(Protocol):
    """What `kernels` has under the name of a definition, with its arguments; kernels.common.operation makes it."""
    refuses: Callable[..., str | None]      # why it does not support these arguments
    unchecked: Callable[..., Any]           # the same for arguments that it does not refuse

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


MODES = ("auto", "torch", "triton")
KERNELS: dict[str, Kernel] = {}             # operation → its kernel, once it was needed


def _checked(mode: str) -> str:
    if mode not in MODES:
        raise InputError(f"NANOLLM_KERNELS is {mode!r}, expected one of {', '.join(MODES)}")
    return mode


_mode = _checked(os.environ.get("NANOLLM_KERNELS", "auto"))


def mode() -> str:
    """That which holds now."""
    return _mode


@contextmanager
def using(mode: str) -> Iterator[None]:
    """Choose inside the block what `accelerated` functions run; raises InputError for anything but the three modes."""
    global _mode
    before, _mode = _mode, _checked(mode)
    try:
        yield
    finally:
        _mode = before


def accelerated(definition: Definition) -> Definition:
    """Let the kernel of the same name run in place of a definition, on the device of the first argument, a tensor."""
    name = definition.__name__

    @functools.wraps(definition)
    def run(*args: Any, **kwargs: Any) -> Any:
        if _mode == "torch" or (_mode == "auto" and not on_gpu(args[0])):
            return definition(*args, **kwargs)
        find(name)
        kernel = KERNELS[name]
        if _mode == "triton":
            return kernel(*args, **kwargs)                                      # says itself what it does not support
        return (definition if kernel.refuses(*args, **kwargs) else kernel.unchecked)(*args, **kwargs)

    return cast(Definition, run)


def on_gpu(x: Tensor) -> bool:
    """Whether a tensor is on an NVIDIA GPU, and Triton is there."""
    return x.is_cuda and has_triton()


@functools.cache
def has_triton() -> bool:
    """False on AMD's GPUs, which torch calls cuda too. The kernels are untested there; NANOLLM_KERNELS=triton asks for
    them nevertheless."""
    return torch.version.cuda is not None and importlib.util.find_spec("triton") is not None


def find(name: str) -> bool:
    """Put the kernel of that name into KERNELS. Raises InputError where another package called kernels hides ours."""
    package = importlib.import_module("kernels")
    if not hasattr(package, "OPERATIONS"):
        raise InputError(f"{package.__file__} is another package named kernels, which hides nanollm's: "
                         "uninstall it, or put nanollm first on PYTHONPATH")
    KERNELS[name] = getattr(package, name)
    return True


# torch.compile does not look inside, it could not follow an import. This is what torch.compiler.assume_constant_result
# sets; to call that would import the compiler into every process, which doubles the time that a command takes to start
find._dynamo_marked_constant = True  # type: ignore[attr-defined]  # functions have whatever attribute they are given
