"""Attention without the scores: the (T, S) matrix is computed tile by tile and never stored.

    s = scale · q kᵀ,    s = c·tanh(s/c) where there is a soft cap,    s −= slope · distance with ALiBi
    o = Σ p·v / Σ p,     p = exp(s) over the keys that the query sees                   lse = log2 Σ exp(s)

FlashAttention: Dao et al. 2022 (arXiv 2205.14135), in the order of loops of Dao 2023 (arXiv 2307.08691). H query heads
share K key/value heads, G = H/K; head h reads h // G. The mask is two numbers a query, see attention_tile.py. A query
that sees nothing gives o = 0, lse = −∞.

Shapes: B batch, T queries, S keys, d head width.
    q (B, H, T, d);   k, v (B, K, S, d);   first, last (B or 1, T) int32;   slopes (H,) float32
→ o (B, T, H, d), as the projection after it wants it;   lse (B, H, T) float32.

Roofline. pairs = Σ (last − first + 1), causal T(T+1)/2, window W about T·W. In 16 bit:
    matmul  4·B·H·d·pairs FLOPs        exp2  B·H·pairs        bytes  4·B·T·(H + K)·d, negligible from T = 100s on
On an H200 (790 TFLOP/s, 4.2e12 exp2/s) exp2 takes 37 % as long as the matmuls at d = 128, 74 % at d = 64: what does not
overlap, adds up.

    one program = QUERIES of one head; q stays on chip, blocks of KEYS pass by

             ┌── keys from the least `first` to the largest `last` of the tile ──┐
             │ left edge │      interior: seen by every query      │ right edge │
       q  ─→ │  masked   │            no mask is computed          │   masked   │ ─→  o / l,  m + log2 l
             └───────────┴─────────────────────────────────────────┴────────────┘
                  second loop             first loop                second loop

The running maximum m makes exp2 safe: o and l are relative to 2^m, and are scaled down when it grows. The last queries
see the most keys under a causal mask, and start first. float32 inputs are multiplied in exact float32, not TF32.

The backward is in attention_backward.py, a single query in decode.py.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention_backward import attention_backward_op
from kernels.attention_tile import LOG2E, LOWEST, absorb, blocks, constants, load_rows, padded, store_rows, tile_of
from kernels.common import NEVER, largest, operation, unlike
from kernels.decode import ROWS, decode_op


@triton.jit(do_not_specialize=["T", "row_stride"])
def forward_kernel(q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, first_ptr, last_ptr, slopes_ptr,
                   q_b, q_h, q_t, k_b, k_h, k_s, v_b, v_h, v_s, row_stride, G, T, scale, cap,
                   WIDTH: tl.constexpr, BLOCK: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
                   QUERIES: tl.constexpr, KEYS: tl.constexpr):
    """scale, cap: `constants`. row_stride: from row to row of first and last, 0 if all rows are alike."""
    tile = tl.cdiv(T, QUERIES) - 1 - tl.program_id(0)
    h, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    heads = tl.num_programs(1)
    rows = tile * QUERIES + tl.arange(0, QUERIES)
    mine = tl.minimum(rows, T - 1)                              # past the end: the last query again, never stored
    first = tl.load(first_ptr + b * row_stride + mine)
    last = tl.load(last_ptr + b * row_stride + mine)
    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes_ptr + h) * LOG2E
    q = load_rows(q_ptr + b * q_b + h * q_h, mine, q_t, T, WIDTH, BLOCK, False)
    k_base, v_base = k_ptr + b * k_b + h // G * k_h, v_ptr + b * v_b + h // G * v_h
    o = tl.zeros((QUERIES, BLOCK), tl.float32)
    l = tl.zeros((QUERIES,), tl.float32)
    m = tl.full((QUERIES,), LOWEST, tl.float32)
    low, high = tl.min(first, 0), tl.max(last, 0) + 1
    count, left, right = blocks(low, high, tl.max(first, 0), tl.min(last, 0) + 1, KEYS)
    for i in range(left, right):
        o, l, m = absorb(o, l, m, q, k_base, v_base, low + i * KEYS, high, first, last, slope, scale, cap, k_s, v_s,
                         WIDTH, BLOCK, KEYS, SOFTCAP, ALIBI, False)
    for j in range(count - (right - left)):
        i = tl.where(j < left, j, j + right - left)
        o, l, m = absorb(o, l, m, q, k_base, v_base, low + i * KEYS, high, first, last, slope, scale, cap, k_s, v_s,
                         WIDTH, BLOCK, KEYS, SOFTCAP, ALIBI, True)
    o = o / tl.where(l == 0.0, 1.0, l)[:, None]
    store_rows(o_ptr + (b * T * heads + h) * WIDTH, rows, heads * WIDTH, rows < T, o, WIDTH, BLOCK)
    tl.store(lse_ptr + (b * heads + h) * T + rows, m + tl.log2(l), rows < T)


# ---- the operation as torch sees it

@torch.library.custom_op("nanollm::attention", mutates_args=())
def attention_op(q: Tensor, k: Tensor, v: Tensor, first: Tensor, last: Tensor, slopes: Tensor | None, scale: float,
                 softcap: float | None) -> tuple[Tensor, Tensor]:
    """o (B, T, H, d) and lse (B, H, T), a logarithm to base 2."""
    B, H, T, d = q.shape
    o, lse = attention_fake(q, k, v, first, last, slopes, scale, softcap)
    meta = tile_of("attention", q)
    row_stride = T if len(first) > 1 else 0
    with torch.cuda.device_of(q):
        forward_kernel[(triton.cdiv(T, meta["QUERIES"]), H, B)](
            q, k, v, o, lse, first, last, slopes, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            row_stride, H // k.shape[1], T, *constants(scale, softcap), WIDTH=d, BLOCK=padded(d),
            SOFTCAP=softcap is not None, ALIBI=slopes is not None, **meta)
    return o, lse


@attention_op.register_fake
def attention_fake(q, k, v, first, last, slopes, scale, softcap):
    B, H, T, d = q.shape
    return q.new_empty(B, T, H, d), q.new_empty(B, H, T, dtype=torch.float32)


def _save(ctx, inputs, output):
    q, k, v, first, last, slopes, ctx.scale, ctx.softcap = inputs
    ctx.save_for_backward(q, k, v, *output, first, last, slopes)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, do, _):
    need_q, need_k, need_v, *_ = ctx.needs_input_grad
    dq, dk, dv = attention_backward_op(do.contiguous(), *ctx.saved_tensors, ctx.scale, ctx.softcap,
                                       need_q, need_k or need_v)
    return dq if need_q else None, dk if need_k else None, dv if need_v else None, None, None, None, None, None


attention_op.register_autograd(_backward, setup_context=_save)


def _refuses(q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float, softcap: float | None = None) -> str | None:
    first, last, slopes = mask.first, mask.last, mask.slopes
    if first is None or last is None:
        return "what a query sees is not one run of keys"
    four = q.dim() == 4 and k.dim() == 4 and k.shape == v.shape
    if not four or len(k) != len(q) or k.shape[3] != q.shape[3] or k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        return f"{shapes}; expected (B, H, T, d) and twice (B, K, S, d), K a divisor of H"
    B, H, T, d = q.shape
    if q.numel() == 0 or k.numel() == 0:
        return "there is nothing in q or in k"
    if q.dtype != k.dtype or q.dtype != v.dtype:
        return f"q, k and v must have one dtype, they have {q.dtype}, {k.dtype} and {v.dtype}"
    if d > largest("attention"):
        return f"heads of {d}, supported are up to {largest('attention')}"
    if max(B, H) >= 2**16 or max(T, k.shape[2]) >= NEVER // 2:
        return f"q {tuple(q.shape)}, k {tuple(k.shape)}: supported are 65535 rows and heads, and 2³⁰ tokens"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.stride(3) != 1:
            return f"a head's numbers must lie side by side, those of {name} are {x.stride(3)} apart"
    for name, x in (("first", first), ("last", last)):
        if x.dtype != torch.int32 or tuple(x.shape) not in ((B, T), (1, T)):
            return f"mask.{name} is {str(x.dtype)[6:]} {tuple(x.shape)}, expected int32 {(B, T)} or {(1, T)}"
    if first.shape != last.shape:
        return f"mask.first has shape {tuple(first.shape)}, mask.last {tuple(last.shape)}"
    if slopes is not None and (slopes.dtype != torch.float32 or slopes.shape != (H,) or not slopes.is_contiguous()):
        found = f"{str(slopes.dtype)[6:]} {tuple(slopes.shape)}"
        return f"mask.slopes is {found}, expected float32 {(H,)}, one after another"
    if scale <= 0 or (softcap is not None and softcap <= 0):
        return f"scale {scale} and softcap {softcap} must be positive"
    return unlike(q, k=k, v=v, first=first, last=last, slopes=slopes)


@operation(_refuses)
def attend(q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float, softcap: float | None = None) -> Tensor:
    """q (B, H, T, d), k and v (B, K, S, d), any strides → (B, H, T, d).

    The result lies in memory as (B, T, H, d), so transpose(1, 2).flatten(-2) is free. mask: first and last (B or 1, T)
    int32, the keys that each query sees, and slopes (H,) float32 or None. Their values are not looked at.
    """
    first, last = mask.first.contiguous(), mask.last.contiguous()
    learns = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    few = q.shape[2] == 1 or q.shape[2] * q.shape[1] // k.shape[1] <= ROWS
    if few and not learns:
        return decode_op(q, k, v, first, last, mask.slopes, scale, softcap).transpose(1, 2)
    return attention_op(q, k, v, first, last, mask.slopes, scale, softcap)[0].transpose(1, 2)
