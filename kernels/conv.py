"""The short causal convolution of Mamba, one filter a channel, with the inputs that precede and the SiLU that follows.

    u_t = Σ_j w_j x_{t−j} + bias,   j = 0 … k−1        y_t = silu(u_t)        Gu & Dao 2023 (arXiv 2312.00752), Figure 3

where x_{−1}, x_{−2}, … are the inputs `before`. With positions (several documents in a row, padding) tap j counts only
at tokens that have so many predecessors of their own: position ≥ j.

Shapes: B batch, T tokens, I channels, k taps, at most 8.
        x, y (B, I, T)   weight (I, 1, k), back to front: w_j = weight[:, 0, k−1−j]
        bias (I,)   before (B, I, k−1)   positions (B, T), −1 padding.
x is read by its strides, and is in practice a transposed view: channels lie side by side. y lies like that too, so
transposing it back is free. Neighbouring threads read neighbouring channels: the two small inputs, weight and before,
are transposed before the launch.

Roofline. Bytes are all, in bf16: forward read x, write y: 4·BTI; backward read x, dy, write dx: 6·BTI.

    one program = a tile of TOKENS × CHANNELS; every tap is the same tile, j rows higher, out of the cache

               CHANNELS                          backward: rows s of x (of before, the first k−1); tap j reads row s at
        before ┌ ─ ─ ─ ─ ┐ ┐ w_2    w_1   w_0    token s + j
               ├─────────┤ │ ┐                       d_j = dy_{s+j} · silu′(u_{s+j})     u computed again
             t │ x x x x │ │ │ ┐                     dx_s = Σ_j w_j d_j
        TOKENS │ x x x x │ ┘ │ │                     dw_j = Σ_s x_s d_j                  the share of this tile
               │ x x x x │   ┘ │                     dbias = Σ_s d_0
               └─────────┘     ┘ → y

dw and dbias are sums over tokens and rows: each program writes its share, the shares are added afterwards. No atomics:
the same numbers every time. The backward computes u k times, which costs arithmetic and saves writing it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.activation import slope
from kernels.common import operation, tuned, unlike

TAPS_UP_TO = 8


@triton.jit
def tokens(x_ptr, before_ptr, t, i, mine, T, I, x_t, x_i, start, WIDTH: tl.constexpr):
    """x at tokens t (those before 0 from `before`) and channels i → float32, 0 where a token is not mine.

    start: whether t may reach below 0."""
    x_at = x_ptr + t[:, None] * x_t + i.to(tl.int64)[None, :] * x_i
    x = tl.load(x_at, (mine & (t >= 0) & (t < T))[:, None] & (i < I)[None, :], other=0.0).to(tl.float32)
    if WIDTH > 1:
        if start:
            earlier = mine & (t < 0) & (t > -WIDTH)
            before_at = before_ptr + (t + WIDTH - 1)[:, None] * I + i[None, :]
            x += tl.load(before_at, earlier[:, None] & (i < I)[None, :], other=0.0).to(tl.float32)
    return x


@triton.jit
def convolved(x_ptr, weight_ptr, bias_ptr, before_ptr, t, i, position, T, I, x_t, x_i, start,
              BIAS: tl.constexpr, WIDTH: tl.constexpr):
    """u at tokens t, of which `position` says how many predecessors they have."""
    u = tl.zeros((t.shape[0], i.shape[0]), tl.float32)
    if BIAS:
        u += tl.load(bias_ptr + i, i < I, other=0.0).to(tl.float32)[None, :]
    for j in tl.static_range(WIDTH):
        w = tl.load(weight_ptr + (WIDTH - 1 - j) * I + i, i < I, other=0.0).to(tl.float32)
        u += w[None, :] * tokens(x_ptr, before_ptr, t - j, i, position >= j, T, I, x_t, x_i, start, WIDTH)
    return u


@triton.jit
def forward_kernel(x_ptr, weight_ptr, bias_ptr, before_ptr, positions_ptr, y_ptr, T, I, x_b, x_i, x_t,
                   POSITIONS: tl.constexpr, BIAS: tl.constexpr, WIDTH: tl.constexpr,
                   TOKENS: tl.constexpr, CHANNELS: tl.constexpr):
    """One tile of y. x_b, x_i, x_t: strides of x, and so on."""
    blocks, tiles = tl.cdiv(I, CHANNELS), tl.cdiv(T, TOKENS)
    tile, b = (tl.program_id(0) // blocks % tiles).to(tl.int64), (tl.program_id(0) // blocks // tiles).to(tl.int64)
    i = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    t = tile * TOKENS + tl.arange(0, TOKENS)
    position = tl.full((TOKENS,), WIDTH, tl.int64)
    if POSITIONS:
        position = tl.load(positions_ptr + b * T + t, t < T, other=0)
    u = convolved(x_ptr + b * x_b, weight_ptr, bias_ptr, before_ptr + b * (WIDTH - 1) * I, t, i, position,
                  T, I, x_t, x_i, tile == 0, BIAS, WIDTH)
    y, y_at = u * tl.sigmoid(u), y_ptr + (b * T + t)[:, None] * I + i[None, :]
    tl.store(y_at, y.to(y_ptr.dtype.element_ty), (t < T)[:, None] & (i < I)[None, :])


@triton.jit
def backward_kernel(dy_ptr, x_ptr, weight_ptr, bias_ptr, before_ptr, positions_ptr,
                    dx_ptr, dweight_ptr, dbias_ptr, dbefore_ptr, T, I, dy_b, dy_i, dy_t, x_b, x_i, x_t,
                    POSITIONS: tl.constexpr, BIAS: tl.constexpr, WIDTH: tl.constexpr,
                    TOKENS: tl.constexpr, CHANNELS: tl.constexpr):
    """One tile of dx, whose first k−1 rows are those of `before`, and its share of dw and dbias."""
    tl.static_assert(TOKENS >= 2 * (WIDTH - 1))                 # no tile but the first reaches `before`, even by a tap
    blocks, tiles = tl.cdiv(I, CHANNELS), tl.cdiv(T + WIDTH - 1, TOKENS)
    tile, b = (tl.program_id(0) // blocks % tiles).to(tl.int64), (tl.program_id(0) // blocks // tiles).to(tl.int64)
    i = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    s = tile * TOKENS + tl.arange(0, TOKENS) - (WIDTH - 1)
    share = b * tiles + tile
    x_ptr += b * x_b
    before_ptr += b * (WIDTH - 1) * I
    x = tokens(x_ptr, before_ptr, s, i, s < T, T, I, x_t, x_i, tile == 0, WIDTH)
    dx = tl.zeros((TOKENS, CHANNELS), tl.float32)
    for j in tl.static_range(WIDTH):
        t = s + j
        live = (t >= 0) & (t < T)
        position = tl.full((TOKENS,), WIDTH, tl.int64)
        if POSITIONS:
            position = tl.load(positions_ptr + b * T + t, live, other=0)
        u = convolved(x_ptr, weight_ptr, bias_ptr, before_ptr, t, i, position, T, I, x_t, x_i, tile == 0, BIAS, WIDTH)
        dy_at = dy_ptr + b * dy_b + t[:, None] * dy_t + i.to(tl.int64)[None, :] * dy_i
        dy = tl.load(dy_at, live[:, None] & (i < I)[None, :], other=0.0).to(tl.float32)
        d = dy * slope(u, "silu")
        if BIAS and j == 0:
            tl.store(dbias_ptr + share * I + i, tl.sum(d, 0), i < I)
        d = tl.where((position >= j)[:, None], d, 0.0)
        w = tl.load(weight_ptr + (WIDTH - 1 - j) * I + i, i < I, other=0.0).to(tl.float32)
        dx += w[None, :] * d
        tl.store(dweight_ptr + (share * WIDTH + WIDTH - 1 - j) * I + i, tl.sum(x * d, 0), i < I)
    dx_at = dx_ptr + (b * T + s)[:, None] * I + i[None, :]
    tl.store(dx_at, dx.to(dx_ptr.dtype.element_ty), ((s >= 0) & (s < T))[:, None] & (i < I)[None, :])
    if tile == 0:
        rows = dbefore_ptr + (b * (WIDTH - 1) + s + WIDTH - 1)[:, None] * I
        tl.store(rows + i[None, :], dx.to(dbefore_ptr.dtype.element_ty), (s < 0)[:, None] & (i < I)[None, :])


# ---- the operation as torch sees it

@torch.library.custom_op("nanollm::conv", mutates_args=())
def conv_op(x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor, positions: Tensor | None) -> Tensor:
    """y (B, I, T), channels side by side."""
    batch, I, T = x.shape
    meta, width = tuned("conv", weight.shape[-1], x.device), weight.shape[-1]
    y = conv_fake(x, weight, bias, before, positions)
    with torch.cuda.device_of(x):
        forward_kernel[(batch * triton.cdiv(T, meta["TOKENS"]) * triton.cdiv(I, meta["CHANNELS"]),)](
            x, weight[:, 0].T.contiguous(), bias, before.transpose(1, 2).contiguous(), positions, y, T, I, *x.stride(),
            POSITIONS=positions is not None, BIAS=bias is not None, WIDTH=width, **meta)
    return y


@conv_op.register_fake
def conv_fake(x, weight, bias, before, positions):
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1]).transpose(1, 2)


@torch.library.custom_op("nanollm::conv_backward", mutates_args=())
def conv_backward_op(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor,
                     positions: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dweight, dbias (empty without a bias), dbefore."""
    batch, I, T = x.shape
    meta, width = tuned("conv_backward", weight.shape[-1], x.device), weight.shape[-1]
    tiles, blocks = triton.cdiv(T + width - 1, meta["TOKENS"]), triton.cdiv(I, meta["CHANNELS"])
    dx, *_, dbefore = conv_backward_fake(dy, x, weight, bias, before, positions)
    dweight = x.new_empty(batch * tiles * width, I, dtype=torch.float32)
    dbias = x.new_empty(batch * tiles if bias is not None else 0, I, dtype=torch.float32)
    with torch.cuda.device_of(x):
        backward_kernel[(batch * tiles * blocks,)](
            dy, x, weight[:, 0].T.contiguous(), bias, before.transpose(1, 2).contiguous(), positions,
            dx, dweight, dbias, dbefore, T, I, *dy.stride(), *x.stride(),
            POSITIONS=positions is not None, BIAS=bias is not None, WIDTH=width, **meta)
    summed = dweight.view(-1, width, I).sum(0).T[:, None]
    dweight = summed.to(weight.dtype, memory_format=torch.contiguous_format, copy=True)
    return dx, dweight, weight.new_empty(0) if bias is None else dbias.sum(0).to(bias.dtype), dbefore


@conv_backward_op.register_fake
def conv_backward_fake(dy, x, weight, bias, before, positions):
    dx, dbefore = (like.new_empty(like.shape[0], like.shape[2], like.shape[1]).transpose(1, 2) for like in (x, before))
    dbias = weight.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return dx, weight.new_empty(weight.shape), dbias, dbefore


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, dy):
    bias = ctx.saved_tensors[2]
    dx, dweight, dbias, dbefore = conv_backward_op(dy, *ctx.saved_tensors)
    return dx, dweight, None if bias is None else dbias, dbefore, None


conv_op.register_autograd(_backward, setup_context=_save)


def _refuses(x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor, positions: Tensor | None) -> str | None:
    if x.ndim != 3 or x.numel() == 0 or weight.ndim != 3:
        shapes = f"{tuple(x.shape)} and {tuple(weight.shape)}"
        return f"x and weight have shapes {shapes}, expected (B, I, T) and (I, 1, k), none of them 0"
    (batch, I, T), width = x.shape, weight.shape[-1]
    expected = {"weight": (weight, (I, 1, width)), "bias": (bias, (I,)), "before": (before, (batch, I, width - 1)),
                "positions": (positions, (batch, T))}
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tensor.shape != shape:
            return f"{name} has shape {tuple(tensor.shape)}, expected {shape}"
    if not 1 <= width <= TAPS_UP_TO:
        return f"{width} taps, supported are 1 to {TAPS_UP_TO}"
    if before.dtype != x.dtype:
        return f"before is {str(before.dtype)[6:]}, expected {str(x.dtype)[6:]} as x"
    if positions is not None and positions.dtype != torch.int64:
        return f"positions are {str(positions.dtype)[6:]}, expected int64"
    return unlike(x, weight=weight, bias=bias, before=before, positions=positions)


@operation(_refuses)
def causal_conv(x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor, positions: Tensor | None) -> Tensor:
    """x (B, I, T) → y (B, I, T) in the dtype of x; shapes at the head of the file."""
    bias = None if bias is None else bias.contiguous()
    return conv_op(x, weight, bias, before, None if positions is None else positions.contiguous())
