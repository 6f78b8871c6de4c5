"""A few rows times a weight in 8 or 4 bits: what one step of generation spends its time on.

    y = x Wᵀ + b        W = s (q − z)        the format is that of nanollm/inference/quantize.py

Shapes: M rows of x (all dimensions but the last, at most 16), K inputs, N outputs, G groups along K.
    x (M, K), y (M, N)
    4 bits: packed (N, K/8) int32, s and z (N, G)        8 bits: packed (N, K) int8, s (N, 1), z is 0

Roofline. Every weight is read once for 2M operations, so bytes are all: N K ½ + 5 N G in 4 bits, N K in 8. An H200
hands each multiprocessor 33 four-bit weights a clock and that can issue 128 operations a clock, so a weight may cost
four, no more. Integer to float alone would be one of the slow ones: instead q is put into the mantissa of 2²³, and with
one subtraction is q − z, exactly:

    bits   0x4B000000 | q   =  the float32 2²³ + q            (2²³ + q) − (2²³ + z)  =  q − z

    16 bytes, what a thread reads at once, are 4 words of 8 (or 4) codes: one block of 32 (or 16) inputs of one group

                     K ────────────────────────────→
        program 0    ▓▓▓▓ ▓▓▓▓ ▓▓▓▓ │░░░░ ░░░░ ░░░░     BN outputs; BLOCKS blocks of each at a time. Few outputs leave
        program 1    ▓▓▓▓ ▓▓▓▓ ▓▓▓▓ │░░░░ ░░░░ ░░░░     the device idle, so then K is split (▓, ░): each program writes
        …                program 0,0 │ program 0,1      partial sums, and a second kernel adds them, in a fixed order

One row: multiply and add in float32, s once a block, sum over the blocks at the end. 2 to 16 rows: the tile of W is
rounded to the dtype of x, as in the definition, and goes through the tensor cores; x is padded to 16 rows. More rows
are work for a dense product. float32 stays exact: each row by itself, the weight coming from the cache.

Backward: none. A quantised weight is not trained.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.common import multiprocessors, operation, tuned, unlike

ROWS = 16                                   # of x at most: one step of a tensor core


@triton.jit
def weights(packed_ptr, scale_ptr, zero_ptr, outputs, blocks, N, L, BITS: tl.constexpr, BLOCKS_A_GROUP: tl.constexpr):
    """Of some outputs (BN,) and blocks (BLOCKS,): q − z (BN, BLOCKS, codes of a block), and s (BN, BLOCKS), float32.

    s is 1 for 8 bits; q is z where there is nothing."""
    inside = (outputs < N)[:, None] & (blocks < L)[None, :]
    word = (outputs[:, None, None] * L + blocks[None, :, None]) * 4 + tl.arange(0, 4)[None, None, :]
    words = tl.load(packed_ptr + word, inside[:, :, None], other=0)
    if BITS == 4:
        group = outputs[:, None] * (L // BLOCKS_A_GROUP) + (blocks // BLOCKS_A_GROUP)[None, :]
        scale = tl.load(scale_ptr + group, inside, other=0.0)
        zero = tl.load(zero_ptr + group, inside, other=0).to(tl.float32)
    else:
        words = words ^ -2139062144                             # 0x80808080: −128 … 127 becomes 0 … 255
        scale = tl.full(inside.shape, 1.0, tl.float32)
        zero = tl.full(inside.shape, 128.0, tl.float32)
    shifts = BITS * tl.arange(0, 32 // BITS)                    # >> is signed: mask after
    codes = (words[:, :, :, None] >> shifts[None, None, None, :]) & ((1 << BITS) - 1)
    codes = (codes | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + zero)[:, :, None, None]
    return tl.reshape(codes, (codes.shape[0], codes.shape[1], 128 // BITS)), scale


@triton.jit
def finish(y, out_ptr, bias_ptr, scale_ptr, at, outputs, inside, BITS: tl.constexpr, BIAS: tl.constexpr):
    """What is left to do for y (…, BN) once all its blocks are added."""
    if BITS == 8:
        y *= tl.load(scale_ptr + outputs, inside, other=0.0)
    if BIAS:
        y += tl.load(bias_ptr + outputs, inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), inside)


@triton.jit
def row_kernel(x_ptr, packed_ptr, scale_ptr, zero_ptr, bias_ptr, out_ptr, M, N, L,
               BITS: tl.constexpr, BLOCKS_A_GROUP: tl.constexpr, BIAS: tl.constexpr,
               BN: tl.constexpr, BLOCKS: tl.constexpr, STAGES: tl.constexpr):
    """Program (i, j, m): outputs of tile i, every so many blocks from the j-th on, row m.

    L blocks of 16 bytes make a row of W."""
    outputs = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    row = tl.program_id(2).to(tl.int64)
    inputs = tl.arange(0, 128 // BITS)
    sums = tl.zeros((BN, BLOCKS), tl.float32)
    for tile in tl.range(tl.program_id(1), tl.cdiv(L, BLOCKS), tl.num_programs(1), num_stages=STAGES):
        blocks = tl.cast(tile, tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
        x_at = x_ptr + (row * L + blocks[:, None]) * (128 // BITS) + inputs[None, :]
        x = tl.load(x_at, (blocks < L)[:, None], other=0.0).to(tl.float32)
        codes, scale = weights(packed_ptr, scale_ptr, zero_ptr, outputs, blocks, N, L, BITS, BLOCKS_A_GROUP)
        sums += scale * tl.sum(codes * x[None, :, :], 2)
    at = (tl.program_id(1) * M + row) * N + outputs
    finish(tl.sum(sums, 1), out_ptr, bias_ptr, scale_ptr, at, outputs, outputs < N, BITS, BIAS)


@triton.jit
def rows_kernel(x_ptr, packed_ptr, scale_ptr, zero_ptr, bias_ptr, out_ptr, M, N, L,
                BITS: tl.constexpr, BLOCKS_A_GROUP: tl.constexpr, BIAS: tl.constexpr,
                ROWS: tl.constexpr, BN: tl.constexpr, BLOCKS: tl.constexpr):
    """Program (i, j): outputs of tile i, every so many blocks from the j-th on, all rows."""
    K: tl.constexpr = BLOCKS * (128 // BITS)
    outputs = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    rows = tl.arange(0, ROWS)
    y = tl.zeros((BN, ROWS), tl.float32)
    for tile in range(tl.program_id(1), tl.cdiv(L, BLOCKS), tl.num_programs(1)):
        blocks = tl.cast(tile, tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
        inputs = tl.cast(tile, tl.int64) * K + tl.arange(0, K)
        x_at = x_ptr + rows[:, None] * L * (128 // BITS) + inputs[None, :]
        x = tl.load(x_at, (rows < M)[:, None] & (inputs < L * (128 // BITS))[None, :], other=0.0)
        codes, scale = weights(packed_ptr, scale_ptr, zero_ptr, outputs, blocks, N, L, BITS, BLOCKS_A_GROUP)
        if BITS == 4:
            codes *= scale[:, :, None]                          # 8 bits need none yet: q is exact in 16 bits
        y = tl.dot(tl.reshape(codes.to(x.dtype), (BN, K)), tl.trans(x), y)
    at = (tl.program_id(1).to(tl.int64) * M + rows[None, :]) * N + outputs[:, None]
    inside = (outputs < N)[:, None] & (rows < M)[None, :]
    finish(y, out_ptr, bias_ptr, scale_ptr, at, outputs[:, None], inside, BITS, BIAS)


@triton.jit
def sum_kernel(partial_ptr, bias_ptr, y_ptr, SPLITS, N, BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """y of one row: the partial sums of all splits, (SPLITS, M, N), first to last."""
    row = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    y = tl.zeros((BLOCK,), tl.float32)
    for split in range(SPLITS):
        part = partial_ptr + (tl.cast(split, tl.int64) * tl.num_programs(1) + row) * N
        y += tl.load(part + columns, columns < N, other=0.0)
    if BIAS:
        y += tl.load(bias_ptr + columns, columns < N, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * N + columns, y.to(y_ptr.dtype.element_ty), columns < N)


# ---- the operation as torch sees it

@torch.library.custom_op("nanollm::quantized_linear", mutates_args=())
def quantized_linear_op(x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None) -> Tensor:
    """y in the dtype of x."""
    bits = 4 if packed.dtype == torch.int32 else 8
    M, N, K = x.numel() // x.shape[-1], *_size(packed)
    L = K * bits // 128
    y = quantized_linear_fake(x, packed, scale, zero, bias)
    by_row = M == 1 or x.dtype == torch.float32
    meta = tuned("quantized_row" if by_row else "quantized_rows", bits, x.device)
    programs, tiles = triton.cdiv(N, meta["BN"]), triton.cdiv(L, meta["BLOCKS"])
    # two tiles at least, or there is more to add than to read
    splits = max(1, min(4 * multiprocessors(x.device) // programs, tiles // 2))
    out, last = (y, bias) if splits == 1 else (x.new_empty(splits, M, N, dtype=torch.float32), None)
    constants = dict(BITS=bits, BLOCKS_A_GROUP=L // scale.shape[1] if bits == 4 else 1, BIAS=last is not None, **meta)
    words = packed.view(torch.int32)
    with torch.cuda.device_of(x):
        if by_row:
            row_kernel[(programs, splits, M)](x, words, scale, zero, last, out, M, N, L, **constants)
        else:
            rows_kernel[(programs, splits)](x, words, scale, zero, last, out, M, N, L, ROWS=ROWS, **constants)
        if splits > 1:
            sum_kernel[(triton.cdiv(N, 512), M)](out, bias, y, splits, N, BIAS=bias is not None, BLOCK=512)
    return y


@quantized_linear_op.register_fake
def quantized_linear_fake(x, packed, scale, zero, bias):
    return x.new_empty(*x.shape[:-1], packed.shape[0])


def _size(packed: Tensor) -> tuple[int, int]:
    """N and K."""
    return packed.shape[0], packed.shape[1] * (8 if packed.dtype == torch.int32 else 1)


def _refuses(x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None) -> str | None:
    if packed.dtype not in (torch.int8, torch.int32) or packed.ndim != 2:
        return f"packed is {str(packed.dtype)[6:]} of {packed.ndim} dimensions, supported are int8 and int32 of 2"
    N, K = _size(packed)
    if x.shape[-1:] != (K,):
        return f"x has shape {tuple(x.shape)}, packed holds {K} inputs"
    if x.numel() == 0 or N == 0:
        return "there is nothing in x or packed"
    if x.numel() // K > ROWS:
        return f"x has {x.numel() // K} rows, supported are up to {ROWS}: a dense product is faster"
    if packed.dtype == torch.int8:
        if zero is not None or scale.shape != (N, 1) or K % 16:
            found = f"scale has {tuple(scale.shape)}, inputs are {K}"
            return f"8 bits need a scale of shape ({N}, 1), no zero and a multiple of 16 inputs; {found}"
    elif scale.shape not in [(N, K // group) for group in (32, 64, 128) if K % group == 0]:
        return f"scale has shape {tuple(scale.shape)}, expected {N} rows of groups of 32, 64 or 128 in {K}"
    elif zero is None or zero.shape != scale.shape or zero.dtype != torch.int8:
        return f"zero must be int8 of shape {tuple(scale.shape)}"
    if scale.dtype != torch.float32:
        return f"scale is {str(scale.dtype)[6:]}, expected float32"
    if bias is not None and bias.shape != (N,):
        return f"bias has shape {tuple(bias.shape)}, expected ({N},)"
    if not all(t.is_contiguous() for t in (x, packed, scale, zero, bias) if t is not None):
        return "rows must follow one another in memory"
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, scale, bias) if t is not None):
        return "there is no backward: a gradient is asked for"
    return unlike(x, packed=packed, scale=scale, zero=zero, bias=bias)


@operation(_refuses)
def quantized_linear(x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None) -> Tensor:
    """x (…, K), up to 16 rows → x Wᵀ + b (…, N) in the dtype of x."""
    return quantized_linear_op(x, packed, scale, zero, bias)
