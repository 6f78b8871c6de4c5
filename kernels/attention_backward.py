"""The gradients of attention. Symbols, shapes and tiles as in attention.py and attention_tile.py.

With P = exp(s − lse), which the forward kept no more of than lse, and do the gradient of o = P v:

    dv = Pᵀ do        dP = do vᵀ        ds = P ∘ (dP − δ),   δ = Σ_j P_j dP_j = Σ_d o ∘ do       (softmax's Jacobian:
                                                                                                  diag P − P Pᵀ)
    dq = scale · ds k        dk = scale · dsᵀ q        soft cap s = c·tanh(u/c):  ds gains a factor 1 − tanh²

FlashAttention-2 (arXiv 2307.08691) algorithm 2, but in two kernels without atomics, so that the same numbers come out
every time: one walks along the queries of a tile of keys, one along the keys of a tile of queries. P is computed in
both.

Roofline. Of the forward's 4·B·H·d·pairs FLOPs, 2.5 times as many (five products for two); the two kernels do 3.5 times
as many.

    dk, dv       one program = KEYS of one key/value head              dq      one program = QUERIES of one head,
                                                                               as in the forward

                       ┌─ KEYS ─┐                                              ┌── first … last of the tile ──┐
        queries   from │ masked │  some see some of the keys            q do ─→│ masked │ interior │  masked  │─→ dq
            │        a ├────────┤                                              └────────┴──────────┴──────────┘
            │          │interior│  all see all of them
            ↓        b ├────────┤      … once more for each of the G heads that share the key head:
                    to │ masked │      dk and dv are summed in registers
                       └────────┘

`spans` has which queries see a tile of keys (from, to, a, b). A small kernel finds them by looking at all first and
last (T·S/KEYS comparisons), so nothing is assumed of their order. Queries a … b − 1 see all of the keys; where those
are not one run, every block is masked.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention_tile import LOG2E, blocks, constants, load_rows, padded, store_rows, tanh, tile_of


@triton.jit(do_not_specialize=["T"])
def delta_kernel(o_ptr, do_ptr, delta_ptr, H, T, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """δ (B, H, T) of ROWS queries of a head."""
    h, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    rows, base = tl.program_id(0) * ROWS + tl.arange(0, ROWS), (b * T * H + h) * WIDTH
    o = load_rows(o_ptr + base, rows, H * WIDTH, T, WIDTH, BLOCK, True).to(tl.float32)
    do = load_rows(do_ptr + base, rows, H * WIDTH, T, WIDTH, BLOCK, True).to(tl.float32)
    tl.store(delta_ptr + (b * H + h) * T + rows, tl.sum(o * do, 1), rows < T)


@triton.jit(do_not_specialize=["T", "S", "size"])
def spans_kernel(first_ptr, last_ptr, spans_ptr, T, S, size, AT_ONCE: tl.constexpr):
    """spans (B or 1, tiles of `size` keys, 4): from, to, a, b."""
    tile, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    low_key, high_key = tile * size, tl.minimum(tile * size + size, S) - 1
    least, most = tl.zeros((AT_ONCE,), tl.int32) + T, tl.zeros((AT_ONCE,), tl.int32)
    full_least, full_most, full_count = least, most, most
    for start in range(0, T, AT_ONCE):
        t = start + tl.arange(0, AT_ONCE)
        first = tl.load(first_ptr + b * T + t, t < T, other=S)
        last = tl.load(last_ptr + b * T + t, t < T, other=-1)
        some = (first <= high_key) & (last >= low_key) & (first <= last)
        every = (first <= low_key) & (last >= high_key)
        least, most = tl.minimum(least, tl.where(some, t, T)), tl.maximum(most, tl.where(some, t + 1, 0))
        full_least = tl.minimum(full_least, tl.where(every, t, T))
        full_most = tl.maximum(full_most, tl.where(every, t + 1, 0))
        full_count += every.to(tl.int32)
    a, z = tl.min(full_least, 0), tl.max(full_most, 0)
    at = spans_ptr + (b * tl.num_programs(0) + tile) * 4
    tl.store(at, tl.min(least, 0))
    tl.store(at + 1, tl.max(most, 0))
    tl.store(at + 2, a)
    tl.store(at + 3, tl.where(tl.sum(full_count, 0) == z - a, z, a))


@triton.jit
def weights(x, lse, keys, first, last, slope, scale, cap,
            SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, MASKED: tl.constexpr):
    """P from the products x = q kᵀ, and the factor that the soft cap puts on ds. All but x are broadcast to it."""
    gain = 1.0
    if SOFTCAP:
        x = tanh(x * cap)
        gain = 1.0 - x * x
    s = x * scale
    if ALIBI:
        s += slope * (keys - last).to(tl.float32)
    p = tl.exp2(s - lse)
    if MASKED:                                  # after exp2: where a query sees nothing lse is −∞ and p is NaN
        p = tl.where((first <= keys) & (keys <= last), p, 0.0)
    return p, gain


@triton.jit
def absorb_queries(dk, dv, k, v, q_base, do_base, lse_base, delta_base, first_base, last_base, keys, start, end,
                   slope, scale, cap, q_t, do_t, WIDTH: tl.constexpr, BLOCK: tl.constexpr, QUERIES: tl.constexpr,
                   SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, MASKED: tl.constexpr):
    """What the queries from `start` on of one head give to dk and dv. All matrices are transposed: (KEYS, QUERIES)."""
    rows = start + tl.arange(0, QUERIES)
    inside = rows < end
    first, last = tl.zeros((QUERIES,), tl.int32), tl.zeros((QUERIES,), tl.int32)
    if MASKED:
        first = tl.load(first_base + rows, inside, other=0)
    if MASKED or ALIBI:
        last = tl.load(last_base + rows, inside, other=-1)
    lse, delta = tl.load(lse_base + rows, inside, other=0.0), tl.load(delta_base + rows, inside, other=0.0)
    q = load_rows(q_base, rows, q_t, end, WIDTH, BLOCK, MASKED)
    x = tl.dot(k, tl.trans(q), input_precision="ieee")
    p, gain = weights(x, lse[None, :], keys[:, None], first[None, :], last[None, :], slope, scale, cap,
                      SOFTCAP, ALIBI, MASKED)
    do = load_rows(do_base, rows, do_t, end, WIDTH, BLOCK, MASKED)
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
    ds = p * (tl.dot(v, tl.trans(do), input_precision="ieee") - delta[None, :]) * gain
    return tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee"), dv


@triton.jit(do_not_specialize=["T", "S", "row_stride"])
def keys_kernel(q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, first_ptr, last_ptr, slopes_ptr, spans_ptr,
                dk_ptr, dv_ptr, q_b, q_h, q_t, k_b, k_h, k_s, v_b, v_h, v_s, row_stride, G, T, S, scale, cap, factor,
                WIDTH: tl.constexpr, BLOCK: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
                QUERIES: tl.constexpr, KEYS: tl.constexpr):
    """dk and dv (B, S, K, d) of KEYS of a key/value head. factor: of ds, what is not in scale."""
    kv, b, K = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64), tl.num_programs(1)
    H = K * G
    keys = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    mine = tl.minimum(keys, S - 1)
    k = load_rows(k_ptr + b * k_b + kv * k_h, mine, k_s, S, WIDTH, BLOCK, False)
    v = load_rows(v_ptr + b * v_b + kv * v_h, mine, v_s, S, WIDTH, BLOCK, False)
    dk, dv = tl.zeros((KEYS, BLOCK), tl.float32), tl.zeros((KEYS, BLOCK), tl.float32)
    at = spans_ptr + (tl.where(row_stride == 0, 0, b) * tl.num_programs(0) + tl.program_id(0)) * 4
    low, high = tl.load(at), tl.load(at + 1)
    count, left, right = blocks(low, high, tl.load(at + 2), tl.load(at + 3), QUERIES)
    first_base, last_base, slope = first_ptr + b * row_stride, last_ptr + b * row_stride, 0.0
    full, edges = right - left, count - (right - left)
    for i in range(G * full):
        h = kv * G + i // full
        if ALIBI:
            slope = tl.load(slopes_ptr + h) * LOG2E
        dk, dv = absorb_queries(dk, dv, k, v, q_ptr + b * q_b + h * q_h, do_ptr + (b * T * H + h) * WIDTH,
                                lse_ptr + (b * H + h) * T, delta_ptr + (b * H + h) * T, first_base, last_base, keys,
                                low + (left + i % full) * QUERIES, high, slope, scale, cap, q_t, H * WIDTH,
                                WIDTH, BLOCK, QUERIES, SOFTCAP, ALIBI, False)
    for i in range(G * edges):
        h = kv * G + i // edges
        block = i % edges + tl.where(i % edges < left, 0, full)
        if ALIBI:
            slope = tl.load(slopes_ptr + h) * LOG2E
        dk, dv = absorb_queries(dk, dv, k, v, q_ptr + b * q_b + h * q_h, do_ptr + (b * T * H + h) * WIDTH,
                                lse_ptr + (b * H + h) * T, delta_ptr + (b * H + h) * T, first_base, last_base, keys,
                                low + block * QUERIES, high, slope, scale, cap, q_t, H * WIDTH,
                                WIDTH, BLOCK, QUERIES, SOFTCAP, ALIBI, True)
    out = (b * S * K + kv) * WIDTH
    store_rows(dk_ptr + out, keys, K * WIDTH, keys < S, dk * factor, WIDTH, BLOCK)
    store_rows(dv_ptr + out, keys, K * WIDTH, keys < S, dv, WIDTH, BLOCK)


@triton.jit
def absorb_keys(dq, q, do, k_base, v_base, lse, delta, start, high, first, last, slope, scale, cap, k_stride, v_stride,
                WIDTH: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr,
                SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, MASKED: tl.constexpr):
    """What the keys from `start` on give to dq."""
    keys = start + tl.arange(0, KEYS)
    k = load_rows(k_base, keys, k_stride, high, WIDTH, BLOCK, MASKED)
    v = load_rows(v_base, keys, v_stride, high, WIDTH, BLOCK, MASKED)
    x = tl.dot(q, tl.trans(k), input_precision="ieee")
    p, gain = weights(x, lse[:, None], keys[None, :], first[:, None], last[:, None], slope, scale, cap,
                      SOFTCAP, ALIBI, MASKED)
    ds = p * (tl.dot(do, tl.trans(v), input_precision="ieee") - delta[:, None]) * gain
    return tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")


@triton.jit(do_not_specialize=["T", "row_stride"])
def queries_kernel(q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, first_ptr, last_ptr, slopes_ptr, dq_ptr,
                   q_b, q_h, q_t, k_b, k_h, k_s, v_b, v_h, v_s, row_stride, G, T, scale, cap, factor,
                   WIDTH: tl.constexpr, BLOCK: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
                   QUERIES: tl.constexpr, KEYS: tl.constexpr):
    """dq (B, T, H, d) of QUERIES of a head."""
    tile = tl.cdiv(T, QUERIES) - 1 - tl.program_id(0)
    h, b, H = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64), tl.num_programs(1)
    rows = tile * QUERIES + tl.arange(0, QUERIES)
    mine = tl.minimum(rows, T - 1)
    first, last = tl.load(first_ptr + b * row_stride + mine), tl.load(last_ptr + b * row_stride + mine)
    lse, delta = tl.load(lse_ptr + (b * H + h) * T + mine), tl.load(delta_ptr + (b * H + h) * T + mine)
    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes_ptr + h) * LOG2E
    q = load_rows(q_ptr + b * q_b + h * q_h, mine, q_t, T, WIDTH, BLOCK, False)
    do = load_rows(do_ptr + (b * T * H + h) * WIDTH, mine, H * WIDTH, T, WIDTH, BLOCK, False)
    k_base, v_base = k_ptr + b * k_b + h // G * k_h, v_ptr + b * v_b + h // G * v_h
    dq = tl.zeros((QUERIES, BLOCK), tl.float32)
    low, high = tl.min(first, 0), tl.max(last, 0) + 1
    count, left, right = blocks(low, high, tl.max(first, 0), tl.min(last, 0) + 1, KEYS)
    for i in range(left, right):
        dq = absorb_keys(dq, q, do, k_base, v_base, lse, delta, low + i * KEYS, high, first, last, slope, scale, cap,
                         k_s, v_s, WIDTH, BLOCK, KEYS, SOFTCAP, ALIBI, False)
    for j in range(count - (right - left)):
        i = tl.where(j < left, j, j + right - left)
        dq = absorb_keys(dq, q, do, k_base, v_base, lse, delta, low + i * KEYS, high, first, last, slope, scale, cap,
                         k_s, v_s, WIDTH, BLOCK, KEYS, SOFTCAP, ALIBI, True)
    store_rows(dq_ptr + (b * T * H + h) * WIDTH, rows, H * WIDTH, rows < T, dq * factor, WIDTH, BLOCK)


# ---- the operation as torch sees it

@torch.library.custom_op("nanollm::attention_backward", mutates_args=())
def attention_backward_op(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, first: Tensor, last: Tensor,
    slopes: Tensor | None, scale: float, softcap: float | None, need_q: bool, need_kv: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq (B, H, T, d), dk and dv (B, K, S, d), in memory as (B, T or S, heads, d); empty where not needed.

    do and o (B, T, H, d)."""
    (B, H, T, d), K, S = q.shape, k.shape[1], k.shape[2]
    dq, dk, dv = attention_backward_fake(do, q, k, v, o, lse, first, last, slopes, scale, softcap, need_q, need_kv)
    delta = torch.empty_like(lse)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], T if len(first) > 1 else 0, H // K)
    numbers = (*constants(scale, softcap), scale)
    options = dict(WIDTH=d, BLOCK=padded(d), SOFTCAP=softcap is not None, ALIBI=slopes is not None)
    with torch.cuda.device_of(q):
        delta_kernel[(triton.cdiv(T, 8), H, B)](o, do, delta, H, T, WIDTH=d, BLOCK=padded(d), ROWS=8, num_warps=4)
        if need_q:
            meta = tile_of("attention_queries", q)
            queries_kernel[(triton.cdiv(T, meta["QUERIES"]), H, B)](
                q, k, v, do, lse, delta, first, last, slopes, dq, *strides, T, *numbers, **options, **meta)
        if need_kv:
            meta = tile_of("attention_keys", q)
            tiles = triton.cdiv(S, meta["KEYS"])
            spans = first.new_empty(len(first), tiles, 4)
            spans_kernel[(tiles, len(first))](first, last, spans, T, S, meta["KEYS"], AT_ONCE=1024, num_warps=4)
            keys_kernel[(tiles, K, B)](
                q, k, v, do, lse, delta, first, last, slopes, spans, dk, dv, *strides, T, S, *numbers,
                **options, **meta)
    return dq, dk, dv


@attention_backward_op.register_fake
def attention_backward_fake(do, q, k, v, o, lse, first, last, slopes, scale, softcap, need_q, need_kv):
    (B, H, T, d), K, S = q.shape, k.shape[1], k.shape[2]
    dq = q.new_empty(B, T, H, d).transpose(1, 2) if need_q else q.new_empty(0)
    dk, dv = (k.new_empty(B, S, K, d).transpose(1, 2) if need_kv else k.new_empty(0) for _ in range(2))
    return dq, dk, dv
