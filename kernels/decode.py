"""Attention of one new token (or a few) over a long cache: split among programs along the keys, merged afterwards.

    slice i of a query's keys gives    oᵢ = Σ p·v / Σ p,   lseᵢ = log2 Σ exp(s)           (attention.py, on a part)
    and together they are              o = Σ 2^lseᵢ · oᵢ / Σ 2^lseᵢ

Flash-Decoding: Dao, Haziza, Massa & Sizov 2023 (https://pytorch.org/blog/flash-decoding). Shapes and names as in
attention.py; N splits.

Roofline. Each key and value is read once and used for 4·G·d FLOPs: bytes are all, in 16 bit 4·B·K·(last − first + 1)·d.

    one program = ROWS rows of q, all of one key/value head, × one slice of the keys

              keys   first ├── 0 ──┼── 1 ──┼── … ──┼─ N−1 ─┤ last            the G heads that share a key/value head
       q of G heads ──────→│ o lse │ o lse │       │ o lse │                 are the rows of one matrix product:
                           └───────┴───┬───┴───────┴───────┘                 the cache is read once, not G times
                                     merge ──→ o

The number of slices comes from the shapes, their bounds from first and last, on the device: nothing waits for the GPU,
a CUDA graph can hold it, and a cache that grows by a token compiles nothing. A slice may be empty: its lse is −∞, its o
0. With one slice there is no merge.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention_tile import LOG2E, LOWEST, absorb, constants, load_rows, padded, store_rows, tile_of
from kernels.common import multiprocessors

ROWS = 16                                       # the fewest that a tensor core multiplies
MERGED = 16                                     # slices that the merge takes in at a time


@triton.jit(do_not_specialize=["T", "row_stride"])
def decode_kernel(q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, first_ptr, last_ptr, slopes_ptr,
                  q_b, q_h, q_t, k_b, k_h, k_s, v_b, v_h, v_s, row_stride, K, G, T, scale, cap,
                  WIDTH: tl.constexpr, BLOCK: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
                  ROWS: tl.constexpr, KEYS: tl.constexpr):
    """Slice program_id(1) of num_programs(1). Row r of a key/value head is query r % T of its head r // T.

    Without lse_ptr, o is the result."""
    b, kv = (tl.program_id(0) // K).to(tl.int64), (tl.program_id(0) % K).to(tl.int64)
    split = tl.program_id(1).to(tl.int64)
    r = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    mine = tl.minimum(r, G * T - 1)
    h, t = kv * G + mine // T, mine % T
    first = tl.load(first_ptr + b * row_stride + t)
    last = tl.load(last_ptr + b * row_stride + t)
    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes_ptr + h)[:, None] * LOG2E
    q = load_rows(q_ptr + b * q_b, h * q_h + t * q_t, 1, 0, WIDTH, BLOCK, False)
    k_base, v_base = k_ptr + b * k_b + kv * k_h, v_ptr + b * v_b + kv * v_h
    o = tl.zeros((ROWS, BLOCK), tl.float32)
    l = tl.zeros((ROWS,), tl.float32)
    m = tl.full((ROWS,), LOWEST, tl.float32)
    low, high = tl.min(first, 0), tl.max(last, 0) + 1
    share = tl.cdiv(tl.cdiv(tl.maximum(high - low, 0), tl.num_programs(1)), KEYS) * KEYS
    low += tl.program_id(1) * share
    high = tl.minimum(low + share, high)
    for start in range(low, high, KEYS):
        o, l, m = absorb(o, l, m, q, k_base, v_base, start, high, first, last, slope, scale, cap, k_s, v_s,
                         WIDTH, BLOCK, KEYS, SOFTCAP, ALIBI, True)
    o = o / tl.where(l == 0.0, 1.0, l)[:, None]
    row = ((split * (tl.num_programs(0) // K) + b) * T + t) * (K * G) + h
    store_rows(o_ptr, row, WIDTH, r < G * T, o, WIDTH, BLOCK)
    if lse_ptr is not None:
        tl.store(lse_ptr + row, m + tl.log2(l), r < G * T)


@triton.jit(do_not_specialize=["N"])
def merge_kernel(parts_ptr, lse_ptr, o_ptr, N, WIDTH: tl.constexpr, BLOCK: tl.constexpr, MERGED: tl.constexpr):
    """One row of o from its N parts."""
    row, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    columns = tl.arange(0, BLOCK)
    o = tl.zeros((BLOCK,), tl.float32)
    l, m = tl.zeros((1,), tl.float32), tl.full((1,), LOWEST, tl.float32)
    for start in range(0, N, MERGED):
        i = start + tl.arange(0, MERGED)
        lse = tl.load(lse_ptr + i.to(tl.int64) * rows + row, i < N, other=-float("inf"))
        part = load_rows(parts_ptr + row * WIDTH, i, rows * WIDTH, N, WIDTH, BLOCK, True)
        m_new = tl.maximum(m, tl.max(lse, 0))
        p, shrink = tl.exp2(lse - m_new), tl.exp2(m - m_new)
        o = o * shrink + tl.sum(part * p[:, None], 0)
        l, m = l * shrink + tl.sum(p, 0), m_new
    o = o / tl.where(l == 0.0, 1.0, l)
    tl.store(o_ptr + row * WIDTH + columns, o.to(o_ptr.dtype.element_ty), columns < WIDTH)


# ---- the operation as torch sees it

def splits(programs: int, S: int, KEYS: int, device: torch.device) -> int:
    """How many slices give the device four programs a multiprocessor, each with a block of keys at least."""
    return max(1, min(4 * multiprocessors(device) // programs, triton.cdiv(S, KEYS)))


@torch.library.custom_op("nanollm::decode", mutates_args=())
def decode_op(q: Tensor, k: Tensor, v: Tensor, first: Tensor, last: Tensor, slopes: Tensor | None, scale: float,
              softcap: float | None) -> Tensor:
    """o (B, T, H, d). No gradient."""
    (B, H, T, d), K, S = q.shape, k.shape[1], k.shape[2]
    meta = tile_of("decode", q)
    chunks = triton.cdiv(H // K * T, ROWS)
    N = splits(B * K * chunks, S, meta["KEYS"], q.device)
    o = decode_fake(q, k, v, first, last, slopes, scale, softcap)
    parts = o if N == 1 else q.new_empty(N, B, T, H, d, dtype=torch.float32)
    lse = None if N == 1 else q.new_empty(N, B, T, H, dtype=torch.float32)
    row_stride = T if len(first) > 1 else 0
    with torch.cuda.device_of(q):
        decode_kernel[(B * K, N, chunks)](
            q, k, v, parts, lse, first, last, slopes, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            row_stride, K, H // K, T, *constants(scale, softcap), WIDTH=d, BLOCK=padded(d),
            SOFTCAP=softcap is not None, ALIBI=slopes is not None, ROWS=ROWS, **meta)
        if N > 1:
            merge_kernel[(B * T * H,)](parts, lse, o, N, WIDTH=d, BLOCK=padded(d), MERGED=MERGED, num_warps=1)
    return o


@decode_op.register_fake
def decode_fake(q, k, v, first, last, slopes, scale, softcap):
    B, H, T, d = q.shape
    return q.new_empty(B, T, H, d)
