"""Whether what came out is what was expected, and both in few digits; and how two tensors of a failed test differ."""

from typing import Any

import torch
from torch import Tensor

Case = tuple[str, Any, Any]                 # words, expected (a number, a list …), what came out (a tensor, a list …)


def same(expected: Any, got: Any) -> bool:
    """Equal up to what four digits show."""
    if isinstance(expected, str) or got is None:
        return expected == got
    want, have = torch.as_tensor(expected), torch.as_tensor(got).detach()
    if want.shape != have.shape or (want.dtype == torch.bool) != (have.dtype == torch.bool):
        return False
    return torch.allclose(want.double(), have.double(), atol=2e-4, rtol=1e-4)


def shown(value: Any) -> str:
    """A number, a list or a tensor in few digits; ■ and · of a mask."""
    if isinstance(value, str) or value is None:
        return str(value)
    tensor = torch.as_tensor(value).detach()
    if tensor.dtype == torch.bool:
        rows = tensor.flatten(0, -2) if tensor.dim() > 1 else tensor[None]
        return "  ".join("".join("■" if x else "·" for x in row) for row in rows.tolist()) + _shape(tensor)
    return _numbers(tensor.tolist()) + _shape(tensor)


def _numbers(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(_numbers, value)) + "]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _shape(tensor: Tensor) -> str:
    return f"   {tuple(tensor.shape)}" if tensor.dim() > 1 else ""


def dtype_name(dtype: torch.dtype) -> str:
    """bfloat16, without torch."""
    return str(dtype).removeprefix("torch.")


def difference(a: Tensor, b: Tensor) -> str:
    """In words, of two tensors that should have been equal bit for bit, and are not."""
    if a.shape != b.shape:
        return f"two tensors should be equal, and have the shapes {tuple(a.shape)} and {tuple(b.shape)}"
    if a.dtype != b.dtype:
        return f"two tensors should be equal, and are {dtype_name(a.dtype)} and {dtype_name(b.dtype)}"
    differ = a != b
    words = f"two tensors should be equal, and {int(differ.sum())} of {a.numel()} numbers differ"
    if not a.is_floating_point():
        return words
    far = (a.double() - b.double()).abs()
    if not far.isfinite().all():
        return f"{words}, some of them by infinity or NaN"
    by, largest = far.max().item(), b.double().abs().max().item()
    words += f", by {by:.2g} at most, where the largest is {largest:.3g}, in {dtype_name(a.dtype)}"
    if by > 4 * torch.finfo(a.dtype).eps * largest:
        return words
    return f"{words}: only rounding. The order of the products, or of the roundings, is another"
