"""Rotary position embedding of queries or keys, forward and backward with one kernel.

    pair j, channels a and b      y_a = x_a·cos_a + x_b·sin_a
                                  y_b = x_b·cos_b + x_a·sin_b         y = x·cos + swap(x)·sin
    Su et al. 2021 (arXiv 2104.09864) eq. 34

    half          a = j, b = j + r/2          the tables carry the sign: sin_a = −sin θ, sin_b = sin θ
    interleaved   a = 2j, b = 2j + 1          (nanollm/layers/rope.py says who uses which)

Shapes: B batch, T tokens, H heads, d head width, r rotated channels (the first r of d; the others pass).
        x, y (B, H, T, d), as a rule a view of (B, T, H, d) in memory;   cos, sin (B or 1, 1, T, r).

Roofline. Bytes are all: 4 FLOPs a channel are nothing. In bf16
    forward, backward    read x, write y, the tables once        4·B·T·H·d + 4·T·r

    one program = TOKENS tokens × HEADS heads, about TILE channels; a token's row of the tables is read once for all

                   ┌──── a ────┬──── b ────┬ past r ┐       half: two loads, a and b, each of r/2 channels side by side
        token 0 h0 │ 0 1 2 3   │ 4 5 6 7   │        │
                h1 │           │           │        │       interleaved: one load of all r channels, then parted,
        token 1 h0 │           │           │        │       a b a b a b → a a a, b b b, since a load of every second
                h1 │           │           │        │       channel would move 2 bytes at a time instead of 16
                   └─────┬─────┴─────┬─────┴────────┘
                      cos_a, sin_a  cos_b, sin_b

x is read where it lies, through its strides; y, and the gradient of x whatever that of y is, lie as x does, tokens or
heads outermost: nothing is ever copied to bring heads before tokens or back.
Computed in float32 and rounded once, where PyTorch rounds both products and their sum.

Backward. For a pair, y = [cos_a sin_a; sin_b cos_b]·x, so dx is the transposed matrix times dy: the sines swap.

    dx_a = dy_a·cos_a + dy_b·sin_b          dx = dy·cos + swap(dy·sin) = dy·cos + swap(dy)·swap(sin)
    dx_b = dy_b·cos_b + dy_a·sin_a

That is the transpose whatever the tables hold; with theirs, sin_b = −sin_a, it is the rotation by −θ. Nothing is saved
but the tables, which get no gradient.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.common import largest, operation, tuned, unlike


@triton.jit
def load_pairs(ptr, at, column, inside, R: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """a and b of each pair, float32 (…, HALF). at: offsets of rows (…, 1); column (1 …, HALF); inside: rows (…, 1)."""
    if INTERLEAVED:
        both = tl.arange(0, 2 * HALF)[None, None, :]
        x = tl.load(ptr + at + both, inside & (both < R), other=0.0).to(tl.float32)
        a, b = tl.split(x.reshape(x.shape[0], x.shape[1], HALF, 2))
    else:
        a = tl.load(ptr + at + column, inside & (column < R // 2), other=0.0).to(tl.float32)
        b = tl.load(ptr + at + column + R // 2, inside & (column < R // 2), other=0.0).to(tl.float32)
    return a, b


@triton.jit(do_not_specialize=["T"])
def rotate_kernel(x_ptr, cos_ptr, sin_ptr, y_ptr, H, T, x_batch, x_head, x_token, y_batch, y_head, y_token,
                  table_batch, table_token,
                  D: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr, TRANSPOSED: tl.constexpr,
                  TOKENS: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr):
    """TOKENS tokens × HEADS heads of one row of the batch. x_batch … are strides. TRANSPOSED: the backward."""
    block = tl.program_id(0)
    head = (block % tl.cdiv(H, HEADS)).to(tl.int64) * HEADS + tl.arange(0, HEADS)[None, :, None]
    block = block // tl.cdiv(H, HEADS)
    token = (block % tl.cdiv(T, TOKENS)).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[:, None, None]
    batch = (block // tl.cdiv(T, TOKENS)).to(tl.int64)
    column = tl.arange(0, HALF)[None, None, :]
    inside = (token < T) & (head < H)                                       # (TOKENS, HEADS, 1)
    x_at = batch * x_batch + token * x_token + head * x_head
    y_at = batch * y_batch + token * y_token + head * y_head
    table_at = batch * table_batch + token * table_token                    # (TOKENS, 1, 1)

    cos_a, cos_b = load_pairs(cos_ptr, table_at, column, token < T, R, HALF, INTERLEAVED)
    sin_a, sin_b = load_pairs(sin_ptr, table_at, column, token < T, R, HALF, INTERLEAVED)
    if TRANSPOSED:
        sin_a, sin_b = sin_b, sin_a
    a, b = load_pairs(x_ptr, x_at, column, inside, R, HALF, INTERLEAVED)
    y_a, y_b = a * cos_a + b * sin_a, b * cos_b + a * sin_b
    if INTERLEAVED:
        both = tl.arange(0, 2 * HALF)[None, None, :]
        y = tl.join(y_a, y_b).reshape(TOKENS, HEADS, 2 * HALF)
        tl.store(y_ptr + y_at + both, y.to(y_ptr.dtype.element_ty), inside & (both < R))
    else:
        tl.store(y_ptr + y_at + column, y_a.to(y_ptr.dtype.element_ty), inside & (column < R // 2))
        tl.store(y_ptr + y_at + column + R // 2, y_b.to(y_ptr.dtype.element_ty), inside & (column < R // 2))
    if R < D:
        past = R + tl.arange(0, REST)[None, None, :]
        kept = tl.load(x_ptr + x_at + past, inside & (past < D))
        tl.store(y_ptr + y_at + past, kept, inside & (past < D))


# ---- the operation as torch sees it

@torch.library.custom_op("nanollm::rotate", mutates_args=())
def rotate_op(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, transposed: bool, tokens_first: bool) -> Tensor:
    """y. transposed: the gradient of x for that of y. tokens_first: y is (B, T, H, d) in memory, not (B, H, T, d)."""
    (B, H, T, D), R = x.shape, cos.shape[-1]
    y = rotate_fake(x, cos, sin, interleaved, transposed, tokens_first)
    meta = dict(tuned("rotate", D, x.device))
    rows = meta.pop("TILE") // triton.next_power_of_2(max(R, D - R))        # heads of tokens in a program
    heads = min(triton.next_power_of_2(H), rows)
    tokens = rows // heads
    with torch.cuda.device_of(x):
        rotate_kernel[(B * triton.cdiv(T, tokens) * triton.cdiv(H, heads),)](
            x, cos, sin, y, H, T, *x.stride()[:3], *y.stride()[:3], cos.stride(0) if len(cos) > 1 else 0, cos.stride(2),
            D=D, R=R, INTERLEAVED=interleaved, TRANSPOSED=transposed, TOKENS=tokens, HEADS=heads,
            HALF=triton.next_power_of_2(R // 2), REST=triton.next_power_of_2(max(1, D - R)), **meta)
    return y


@rotate_op.register_fake
def rotate_fake(x, cos, sin, interleaved, transposed, tokens_first):
    B, H, T, D = x.shape
    return x.new_empty(B, T, H, D).transpose(1, 2) if tokens_first else x.new_empty(B, H, T, D)


def _save(ctx, inputs, output):
    _, cos, sin, *ctx.how = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx, dy):
    interleaved, transposed, tokens_first = ctx.how
    dy = dy if dy.stride(-1) == 1 else dy.contiguous()
    return rotate_op(dy, *ctx.saved_tensors, interleaved, not transposed, tokens_first), None, None, None, None, None


rotate_op.register_autograd(_backward, setup_context=_save)


def _refuses(x: Tensor, cos: Tensor, sin: Tensor, layout: str) -> str | None:
    if layout not in ("half", "interleaved"):
        return f"layout is {layout!r}, expected 'half' or 'interleaved'"
    if x.ndim != 4 or x.numel() == 0:
        return f"x has shape {tuple(x.shape)}, expected (B, H, T, d) with at least one of each"
    (B, _, T, d), r = x.shape, cos.shape[-1]
    if cos.ndim != 4 or cos.shape[0] not in (1, B) or cos.shape[1:3] != (1, T) or sin.shape != cos.shape:
        return f"cos and sin have shapes {tuple(cos.shape)} and {tuple(sin.shape)}, expected both ({B} or 1, 1, {T}, r)"
    if r < 2 or r % 2 or r > d or d > largest("rotate"):
        return f"{r} of {d} channels are rotated, supported is an even number of up to {largest('rotate')}"
    if cos.dtype != x.dtype or sin.dtype != x.dtype:
        return f"x, cos and sin must be of one dtype, they are {x.dtype}, {cos.dtype} and {sin.dtype}"
    if x.stride(-1) != 1 or cos.stride(-1) != 1 or sin.stride() != cos.stride():
        return "channels must follow one another in memory, and sin must lie as cos does"
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        return "cos and sin require a gradient, which only x gets"
    return unlike(x, cos=cos, sin=sin)


@operation(_refuses)
def rotate(x: Tensor, cos: Tensor, sin: Tensor, layout: str) -> Tensor:
    """x (B, H, T, d); cos, sin (B or 1, 1, T, r) → (B, H, T, d), channels past r unchanged."""
    return rotate_op(x, cos, sin, layout == "interleaved", False, x.stride(2) >= x.stride(1))
