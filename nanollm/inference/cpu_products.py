"""Products with 8- and 4-bit weights on a CPU, through torch's own packed kernels: they read the few bytes there are.

    8 bits    _weight_int8pack_mm(x, q, s)                           takes q (N, K) int8 as it is, s (N,)
    4 bits    _weight_int4pack_mm_for_cpu(x, P, group, t)            P (N, K/2) uint8: the codes in an order of torch's
                                                                     own; t (G, N, 2): s, and s (8 − z)

In 4 bits torch writes a weight as s (q − 8) + t₁, which is our s (q − z) for t₁ = s (8 − z).

The operations are private to torch, so nothing relies on them: each is tried once a process on a small product, and
where it is missing, fails or differs, or a shape is none of its own, the definition in quantize.py runs.

Shapes: M rows of x, N outputs, K inputs, G groups of K/G inputs.
"""

import functools
import math

import torch
from torch import Tensor
from torch.nn import functional as F


def fits(bits: int, N: int, K: int, group: int) -> bool:
    """Whether torch has a kernel for a weight of this shape. 8 bits with K that is no multiple of 16 read past the end
    of a row (torch 2.13, bfloat16)."""
    if bits == 8:
        return K % 16 == 0 and has(8)
    return N % 16 == 0 and group in (32, 64, 128) and has(4)


@functools.cache
def few(dtype: torch.dtype) -> float:
    """Up to so many rows a packed kernel is faster than a product in float32 with the weight made anew. Measured on a
    CPU without products in 16 bits, 8 bits, (1536, 576): 512 rows of float32 560 ms against 14, of bfloat16 17 against
    9, 32 rows of it 1.0 against 1.5. With such products all rows go to `rows8` and `rows4`."""
    if dtype == torch.float32:
        return 2
    return math.inf if multiplies16() else 96


@functools.cache
def multiplies16() -> bool:
    """Whether the processor multiplies bfloat16."""
    able = torch.cpu.get_capabilities()
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


def rows8(x: Tensor, packed: Tensor, scales: Tensor, scale: Tensor) -> Tensor:
    """x (M, K), q (N, K) int8, s (N,) in the dtype of x, and (N, 1) float32 → (M, N). It reads no strides: all are
    contiguous.

    Of many rows in bfloat16, which holds a code exactly, the codes are the weight of an ordinary product: 256 rows
    through (3072, 576) take 0.8 ms in place of 5.7 (AVX-512, AMX), 16 rows as long either way."""
    if x.shape[0] > 16 and x.dtype == torch.bfloat16 and multiplies16():
        return (F.linear(x, packed.to(x.dtype)) * scale.T).to(x.dtype)
    return torch.ops.aten._weight_int8pack_mm(x, packed, scales)


def scales8(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """s (…, N, 1) → s (…, N); in front the experts, if there are any."""
    return scale.squeeze(-1).to(dtype).contiguous()


def rows4(x: Tensor, packed: Tensor, group: int, scales: Tensor) -> Tensor:
    """x (M, K), P (N, K/2), t (G, N, 2) in the dtype of x → (M, N)."""
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, group, scales)


def order4(codes: Tensor) -> Tensor:
    """Codes 0 … 15 (N, K) → P (N, K/2)."""
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 1)


def codes4(packed: Tensor, group: int) -> Tensor:
    """The inverse of `order4`: with s = 1 and z = 8, the product with the unit matrix is q − 8."""
    N, K = packed.shape[0], 2 * packed.shape[1]
    plain = torch.stack([torch.ones(K // group, N), torch.zeros(K // group, N)], -1)
    return (rows4(torch.eye(K), packed, group, plain).T + 8).round().to(torch.int32)


def scales4(scale: Tensor, zero: Tensor, dtype: torch.dtype) -> Tensor:
    """s and z (…, N, G) → t (…, G, N, 2); in front the experts, if there are any."""
    return torch.stack([scale, scale * (8 - zero)], -1).transpose(-3, -2).to(dtype).contiguous()


@functools.cache
def has(bits: int) -> bool:
    """Whether torch's kernel is here and gives what the definition gives, tried once on a product of 3 rows."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(3, 64, generator=draw)
    codes = torch.randint(0, 16, (32, 64), generator=draw)
    scale = torch.rand(32, 2, generator=draw) + 0.5
    zero = torch.randint(0, 16, (32, 2), generator=draw)
    try:
        if bits == 8:
            found = rows8(x, codes.to(torch.int8), scales8(scale[:, :1], torch.float32), scale[:, :1])
            expected = x @ (codes * scale[:, :1]).T
        else:
            packed = order4(codes)
            found = rows4(x, packed, 32, scales4(scale, zero, torch.float32))
            weight = ((codes.unflatten(1, (2, 32)) - zero[..., None]) * scale[..., None]).flatten(1)
            expected = x @ weight.T
            if not torch.equal(codes4(packed, 32), codes.int()):
                return False
    except (AttributeError, RuntimeError, NotImplementedError, TypeError):
        return False
    return bool((found - expected).abs().max() < 1e-3 * expected.abs().max())
