"""How a kernel is held to its definition.

    exact    the definition, on the same (rounded) inputs in float64, and its gradients by autograd
    plain    the definition in the dtype of the test, as PyTorch would run it
    ours     the kernel: every input lies between NaNs, every output starts as NaN

    ‖ours − exact‖ / ‖exact‖  ≤  LIMIT of the dtype
    max |ours − exact|        ≤  2 · max |plain − exact|           (FlashAttention's rule)

Where Triton finds a GPU the tests run on it, else in Triton's interpreter.
"""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanollm import ops

INTERPRETED = not torch.cuda.is_available()
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LIMIT = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}                # results
LIMIT_GRADIENT = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


def in_turn(cases: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Each case with a dtype behind it: float32, and one of the 16-bit types in turn, as both take the same path."""
    narrow = itertools.cycle((torch.float16, torch.bfloat16))
    whole = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [(*case, dtype) for case in whole for dtype in (torch.float32, next(narrow))]


def between_nans(x: Tensor) -> Tensor:
    """The same tensor, shape and strides, in the middle of a larger one that is NaN: a read out of bounds shows."""
    if not x.is_floating_point() or x.numel() == 0:
        return x
    span = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    margin = 64                                                         # a multiple of 16 bytes: alignment is as before
    whole = torch.full((span + 2 * margin,), torch.nan, dtype=x.dtype, device=x.device)
    inner = whole.as_strided(x.shape, x.stride(), margin)
    with torch.no_grad():
        inner.copy_(x)
    return inner


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Memory that is allocated and not written is NaN."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = before


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """x.float() is x.double(): the float32 islands of a definition become float64 too."""
    before = torch.Tensor.float
    torch.Tensor.float = torch.Tensor.double
    try:
        yield
    finally:
        torch.Tensor.float = before


def far(shape: tuple[int, ...], dtype: torch.dtype = torch.float16) -> Tensor:
    """A contiguous tensor of more than 2³¹ elements that takes no memory until it is written, with as much room before
    it: an offset that overflows 32 bits reads 0 there."""
    numel = math.prod(shape)
    return torch.empty(2 * numel, dtype=dtype)[numel:].view(shape)


@contextlib.contextmanager
def programs_from(first: int, axis: int = 0) -> Iterator[None]:
    """Interpreted launches number their programs from `first` on: the last of a billion runs without the others."""
    from triton.runtime.interpreter import InterpreterBuilder

    before = InterpreterBuilder.create_get_program_id

    def shifted(self, wanted):
        handle = before(self, wanted)
        return type(handle)(handle.data + np.int32(first), handle.dtype) if wanted == axis else handle

    InterpreterBuilder.create_get_program_id = shifted
    try:
        yield
    finally:
        InterpreterBuilder.create_get_program_id = before


def tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [t for t in result if t is not None]


def run(function: Callable, inputs: Sequence[Any], dtype: torch.dtype | None,
        backward: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Results, and gradients of the floating inputs for cotangents that depend on the shapes alone.

    dtype None: inputs as they are."""
    given = []
    for x in inputs:
        if isinstance(x, Tensor) and x.is_floating_point():
            x = x.detach().clone(memory_format=torch.preserve_format) if dtype is None else x.detach().to(dtype)
            x = between_nans(x).requires_grad_(backward) if dtype is None else x.requires_grad_(backward)
        given.append(x)
    results = tensors(function(*given))
    if not backward:
        return results, []
    draw = torch.Generator().manual_seed(7)
    shaped = [torch.randn(r.shape, generator=draw, dtype=torch.float32) for r in results]
    cotangents = [c.to(inputs_dtype(inputs)).to(r.device, r.dtype) for c, r in zip(shaped, results, strict=True)]
    wanted = [x for x in given if isinstance(x, Tensor) and x.requires_grad]
    pairs = [(r, c) for r, c in zip(results, cotangents, strict=True) if r.requires_grad]
    return results, list(torch.autograd.grad([r for r, _ in pairs], wanted, [c for _, c in pairs]))


def inputs_dtype(inputs: Sequence[Any]) -> torch.dtype:
    """What cotangents are rounded to, so that all three runs are given the same: the narrowest of the inputs."""
    dtypes = {x.dtype for x in inputs if isinstance(x, Tensor) and x.is_floating_point()}
    return min(dtypes, key=lambda d: (d.itemsize, d == torch.float16))


def agree(kernel: Callable, definition: Callable, *inputs: Any, backward: bool = True,
          terms: Mapping[int, Tensor] | None = None) -> None:
    """Fail unless kernel(*inputs) and its gradients agree with the definition, as the head of this file says.

    Tensors among the inputs keep their strides; plain values are handed on. terms: for a gradient, by its number, whose
    few elements are long sums of either sign, and now and then 0 by accident: the sums of the terms' magnitudes, which
    its error is relative to."""
    inputs = [x.to(DEVICE) if isinstance(x, Tensor) else x for x in inputs]
    dtype = inputs_dtype(inputs)
    with ops.using("torch"):
        with in_float64():
            exact = run(definition, inputs, torch.float64, backward)
        plain = run(definition, inputs, None, backward)
    with poisoned():
        ours = run(kernel, inputs, None, backward)
    held("result", LIMIT[dtype], dtype, ours[0], exact[0], plain[0], {})
    held("gradient", LIMIT_GRADIENT[dtype], dtype, ours[1], exact[1], plain[1], terms or {})


def held(kind: str, limit: float, dtype: torch.dtype, ours: list[Tensor], exact: list[Tensor], plain: list[Tensor],
         terms: Mapping[int, Tensor]) -> None:
    """`compare` for each of the results, or each of the gradients."""
    for number, (mine, right, same) in enumerate(zip(ours, exact, plain, strict=True)):
        compare(f"{kind} {number}", mine, right, same, terms.get(number, right), limit, dtype)


def compare(what: str, mine: Tensor, right: Tensor, same: Tensor, size: Tensor, limit: float,
            dtype: torch.dtype) -> None:
    """mine, right, same: what the head of this file calls ours, exact and plain.

    size: what errors are relative to, exact itself for most."""
    shapes = (what, mine.shape, right.shape, mine.dtype, same.dtype)
    assert mine.shape == right.shape and mine.dtype == same.dtype, shapes
    mine, right, same = (x.detach().double() for x in (mine, right, same))
    assert torch.isfinite(mine).all(), f"{what}: {int((~torch.isfinite(mine)).sum())} of {mine.numel()} are not finite"
    if right.numel() == 0:
        return
    norm = size.detach().double().norm()
    relative = float((mine - right).norm() / norm) if norm > 0 else float(mine.norm())
    assert relative <= limit, f"{what}: relative error {relative:.2e}, at most {limit:.0e}"
    if dtype != torch.float32:
        ulp = torch.finfo(dtype).eps * float(size.abs().max())
        worst, allowed = float((mine - right).abs().max()), max(2 * float((same - right).abs().max()), ulp)
        assert worst <= allowed, f"{what}: largest error {worst:.2e}, PyTorch's own {allowed / 2:.2e}"


def compiles(function: Callable, *inputs: Any) -> None:
    """torch.compile takes the operation as it is, forward and backward, without a break in the graph, and gives the
    same to the bit."""
    inputs = [x.to(DEVICE) if isinstance(x, Tensor) else x for x in inputs]
    whole = torch.compile(function, fullgraph=True, backend="aot_eager")
    eager, traced = (run(f, inputs, None, True) for f in (function, whole))
    for mine, theirs in zip((*eager[0], *eager[1]), (*traced[0], *traced[1]), strict=True):
        assert torch.equal(mine, theirs) and mine.stride() == theirs.stride()
