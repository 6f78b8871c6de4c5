"""RMSNorm and LayerNorm over the last dimension, alone or fused with the addition that feeds them.

    RMSNorm      x̂ = r·x,              r = 1/sqrt(mean(x²) + ε)         y = (o + g)·x̂
    LayerNorm    x̂ = r·(x − mean x),   r = 1/sqrt(var(x) + ε)           y = g·x̂ + b
    fused        x = a + b is written out too: it is the residual stream, which the next block reads

Shapes: M rows (all dimensions but the last), D width.   x, y (M, D);   g, b (D,);   r (M,) float32.

Roofline. Nothing is computed that a GPU would notice: bytes are all. In bf16, a row of D is 2D bytes.
    forward    read x, write y                     4MD        fused: read a, b, write x, y                          8MD
    backward   read x, dy, write dx                6MD        fused: read also what flows back along the stream     8MD

    one program = ROWS rows; a row is one BLOCK ≥ D wide, kept in registers between the statistics and the result

        ┌──────── D ────────┐
        │ x x x x x x x x x │─┐  one read    mean(x²) ─→ r ─┐
        ├───────────────────┤ └─────────────────────────────┴─→ y   one write
        │                   │
        └───────────────────┘    narrow rows (per-head norms) share a program, so that each has work enough

Backward. With h = dy·(o + g), the chain rule through r gives   dx = r·(h − x̂·mean(h·x̂))   and for LayerNorm, whose
mean is taken out too, dx = r·(h − x̂·mean(h·x̂) − mean(h)).   dg = Σ_rows dy·x̂ is a sum over all rows: a fixed number
of programs walk down the rows, each keeps its own sum in registers and writes it once; the few sums are added after.
No atomics: the same numbers every time.

x̂ is rounded to the working dtype before the gain (Llama) or not (Gemma), see nanollm/layers/norm.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.common import largest, multiprocessors, operation, tuned, unlike

LAYER_NORM_UP_TO = 8192                     # wider, its two sums would spill registers


@triton.jit
def forward_kernel(a_ptr, b_ptr, gain_ptr, bias_ptr, x_ptr, y_ptr, mean_ptr, r_ptr, M, D, eps, offset,
                   ADD: tl.constexpr, CENTRE: tl.constexpr, ROUND: tl.constexpr, BIAS: tl.constexpr,
                   ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """ROWS rows of a (+ b). CENTRE: LayerNorm. ROUND: x̂ goes through the working dtype before the gain."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    inside = (rows < M)[:, None] & (columns < D)[None, :]
    at = rows[:, None] * D + columns[None, :]
    x = tl.load(a_ptr + at, inside, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(b_ptr + at, inside, other=0.0).to(tl.float32)
        x = x.to(x_ptr.dtype.element_ty)                        # the stream is what is stored: normalise that
        tl.store(x_ptr + at, x, inside)
        x = x.to(tl.float32)
    if CENTRE:
        mean = tl.sum(x, 1) / D
        tl.store(mean_ptr + rows, mean, rows < M)
        x = tl.where(inside, x - mean[:, None], 0.0)
    r = tl.rsqrt(tl.sum(x * x, 1) / D + eps)
    tl.store(r_ptr + rows, r, rows < M)
    x_hat = x * r[:, None]
    if ROUND:
        x_hat = x_hat.to(y_ptr.dtype.element_ty).to(tl.float32)
    gain = tl.load(gain_ptr + columns, columns < D, other=0.0).to(tl.float32) + offset
    y = x_hat * gain[None, :]
    if BIAS:
        y += tl.load(bias_ptr + columns, columns < D, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), inside)


@triton.jit
def backward_kernel(dy_ptr, stream_ptr, x_ptr, gain_ptr, mean_ptr, r_ptr, dx_ptr, dgain_ptr, dbias_ptr, M, D, offset,
                    ADD: tl.constexpr, CENTRE: tl.constexpr, BIAS: tl.constexpr,
                    ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """dx of every rows-of-ROWS that is this program's, and its share of dg and db.

    ADD: the gradient that comes along the residual stream joins dx."""
    columns = tl.arange(0, BLOCK)
    dgain = tl.zeros((BLOCK,), tl.float32)
    dbias = tl.zeros((BLOCK,), tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(M, ROWS), tl.num_programs(0)):
        rows = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        inside = (rows < M)[:, None] & (columns < D)[None, :]
        at = rows[:, None] * D + columns[None, :]
        x = tl.load(x_ptr + at, inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + at, inside, other=0.0).to(tl.float32)
        gain = tl.load(gain_ptr + columns, columns < D, other=0.0).to(tl.float32) + offset
        r = tl.load(r_ptr + rows, rows < M, other=0.0)
        if CENTRE:
            x = tl.where(inside, x - tl.load(mean_ptr + rows, rows < M, other=0.0)[:, None], 0.0)
        x_hat, h = x * r[:, None], dy * gain[None, :]
        dgain += tl.sum(dy * x_hat, 0)
        if BIAS:
            dbias += tl.sum(dy, 0)
        c = tl.sum(h * x_hat, 1) / D
        if BLOCK > 8192:                        # no registers to hold x̂ beside h and dg: x again, from the cache
            x_hat = tl.load(x_ptr + at, inside, other=0.0, eviction_policy="evict_first").to(tl.float32) * r[:, None]
        dx = h - x_hat * c[:, None]
        if CENTRE:
            dx -= (tl.sum(h, 1) / D)[:, None]
        dx *= r[:, None]
        if ADD:
            dx += tl.load(stream_ptr + at, inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), inside)
    mine = tl.program_id(0).to(tl.int64) * D + columns
    tl.store(dgain_ptr + mine, dgain, columns < D)
    if BIAS:
        tl.store(dbias_ptr + mine, dbias, columns < D)


# ---- the operations as torch sees them

@torch.library.custom_op("nanollm::norm", mutates_args=())
def norm_op(a: Tensor, b: Tensor | None, gain: Tensor, bias: Tensor | None, eps: float, offset: float, centre: bool,
            rounded: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, x = a + b (empty where b is None), mean (empty unless centre) and r."""
    M, D = a.numel() // a.shape[-1], a.shape[-1]
    y, x, mean, r = norm_fake(a, b, gain, bias, eps, offset, centre, rounded)
    meta = tuned("norm", D, a.device)
    with torch.cuda.device_of(a):
        forward_kernel[(triton.cdiv(M, meta["ROWS"]),)](
            a, b, gain, bias, x, y, mean, r, M, D, eps, offset,
            ADD=b is not None, CENTRE=centre, ROUND=rounded, BIAS=bias is not None,
            BLOCK=triton.next_power_of_2(D), **meta)
    return y, x, mean, r


@norm_op.register_fake
def norm_fake(a, b, gain, bias, eps, offset, centre, rounded):
    M = a.numel() // a.shape[-1]
    x = a.new_empty(a.shape if b is not None else (0,))
    mean, r = a.new_empty(M if centre else 0, dtype=torch.float32), a.new_empty(M, dtype=torch.float32)
    return a.new_empty(a.shape), x, mean, r


@torch.library.custom_op("nanollm::norm_backward", mutates_args=())
def norm_backward_op(dy: Tensor, stream: Tensor | None, x: Tensor, gain: Tensor, mean: Tensor, r: Tensor,
                     offset: float, centre: bool, bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dg, db (empty without a bias). stream: the gradient of a + b itself."""
    M, D = x.numel() // x.shape[-1], x.shape[-1]
    meta = tuned("norm_backward", D, x.device)
    programs = min(triton.cdiv(M, meta["ROWS"]), 4 * multiprocessors(x.device))
    dx, dgain = x.new_empty(x.shape), x.new_empty(programs, D, dtype=torch.float32)
    dbias = x.new_empty(programs if bias else 0, D, dtype=torch.float32)
    with torch.cuda.device_of(x):
        backward_kernel[(programs,)](
            dy, stream, x, gain, mean, r, dx, dgain, dbias, M, D, offset,
            ADD=stream is not None, CENTRE=centre, BIAS=bias, BLOCK=triton.next_power_of_2(D), **meta)
    return dx, dgain.sum(0).to(gain.dtype), dbias.sum(0).to(gain.dtype) if bias else gain.new_empty(0)


@norm_backward_op.register_fake
def _(dy, stream, x, gain, mean, r, offset, centre, bias):
    return x.new_empty(x.shape), gain.new_empty(gain.shape), gain.new_empty(gain.shape if bias else (0,))


def _save(ctx, inputs, output):
    a, b, gain, bias, _, ctx.offset, ctx.centre, _ = inputs
    _, x, mean, r = output
    ctx.save_for_backward(a if b is None else x, gain, mean, r)
    ctx.fused, ctx.bias = b is not None, bias is not None


def _backward(ctx, dy, stream, *_):
    x, gain, mean, r = ctx.saved_tensors
    stream = stream.contiguous() if ctx.fused else None
    dx, dgain, dbias = norm_backward_op(dy.contiguous(), stream, x, gain, mean, r, ctx.offset, ctx.centre, ctx.bias)
    return dx, dx if ctx.fused else None, dgain, dbias if ctx.bias else None, None, None, None, None


norm_op.register_autograd(_backward, setup_context=_save)


def _refuses(x: Tensor, gain: Tensor, bias: Tensor | None = None, y: Tensor | None = None,
             most: int = largest("norm")) -> str | None:
    D = x.shape[-1]
    for name, vector in (("gain", gain), ("bias", bias)):
        if vector is not None and vector.shape != (D,):
            return f"{name} has shape {tuple(vector.shape)}, expected ({D},)"
    if y is not None and (y.shape != x.shape or y.dtype != x.dtype):
        return f"x and y must be alike, they are {tuple(x.shape)} {x.dtype} and {tuple(y.shape)} {y.dtype}"
    if not x.is_contiguous() or (y is not None and not y.is_contiguous()):
        return "rows must follow one another in memory"
    if D > most or x.numel() == 0:
        return f"rows of {D}, supported are up to {most}" if D else "there is nothing in x"
    return unlike(x, gain=gain, bias=bias, y=y)


@operation(lambda x, gain, *_: _refuses(x, gain))
def rms_norm(x: Tensor, gain: Tensor, eps: float, offset: float = 0.0, cast_after_gain: bool = False) -> Tensor:
    """x (…, D), gain (D,) → (…, D) in the dtype of x."""
    return norm_op(x, None, gain, None, eps, offset, False, not cast_after_gain)[0]


@operation(lambda x, y, gain, *_: _refuses(x, gain, None, y))
def add_rms_norm(x: Tensor, y: Tensor, gain: Tensor, eps: float, offset: float = 0.0,
                 cast_after_gain: bool = False) -> tuple[Tensor, Tensor]:
    """x, y (…, D), gain (D,) → x + y and its norm."""
    normed, total, *_ = norm_op(x, y, gain, None, eps, offset, False, not cast_after_gain)
    return total, normed


@operation(lambda x, gain, bias, *_: _refuses(x, gain, bias, most=LAYER_NORM_UP_TO))
def layer_norm(x: Tensor, gain: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """x (…, D), gain and bias (D,) → (…, D) in the dtype of x."""
    return norm_op(x, None, gain, bias, eps, 0.0, True, False)[0]
