"""What attention forward, backward and decode share: a tile of queries, a tile of keys, and the mask as two numbers.

A query sees one run of keys, first … last, both included. Nothing else is known of masks in these kernels:

    causal              0 … i                    window W           max(0, i − W + 1) … i
    packed documents    own start … i            cached prefix      0 … filled + i      padding    last < first: nothing

A tile of queries walks from the least `first` to the largest `last` among them, in blocks. Two queries with W = 6,
blocks of 3 keys:

    k     0   1 2 3   4 5 6   7 8 9
    q 6     │ x x x │ x x x │ · · · │       x  seen      ·  computed, then masked
      7     │ · x x │ x x x │ x · · │       key 0 is in no block, keys 8 and 9 are not read
              left     full   right
              edge            edge         only the edges compute a mask

ALiBi charges slope · (last − key): `last` is the query's own place among the keys.
"""

import triton
import triton.language as tl
from torch import Tensor

from kernels.common import tuned

LOG2E = tl.constexpr(1.4426950408889634)        # exp2 is what the hardware has: scores carry this factor from the start
LOWEST = tl.constexpr(-(2.0**127))              # where a running maximum starts: finite, or −inf − (−inf) would be NaN


def padded(d: int) -> int:
    """The width of a tile: a power of two, and no less than a tensor core multiplies."""
    return max(16, triton.next_power_of_2(d))


def tile_of(name: str, q: Tensor) -> dict[str, int]:
    """What the kernel is tuned to for this head width. float32, multiplied without tensor cores, has its own tiles."""
    return tuned(name if q.itemsize == 2 else name + "_float32", padded(q.shape[-1]), q.device)


def constants(scale: float, softcap: float | None) -> tuple[float, float]:
    """scale and cap of the kernels: log2 p = scale · q kᵀ, or scale · tanh(cap · q kᵀ)."""
    return (scale * LOG2E.value, 0.0) if softcap is None else (softcap * LOG2E.value, scale / softcap)


@triton.jit
def load_rows(base, rows, stride, end, WIDTH: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """(rows, BLOCK) of a matrix whose rows are WIDTH ≤ BLOCK wide; the rest is 0. MASKED: rows from `end` on are 0."""
    columns = tl.arange(0, BLOCK)
    at = base + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    if MASKED:
        tile = tl.load(at, (rows < end)[:, None] & (columns < WIDTH)[None, :], other=0.0)
    elif WIDTH < BLOCK:
        tile = tl.load(at, (columns < WIDTH)[None, :], other=0.0)
    else:
        tile = tl.load(at)
    return tile


@triton.jit
def store_rows(base, rows, stride, inside, tile, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The inverse for the rows that are `inside`, in the dtype of what is written to."""
    columns = tl.arange(0, BLOCK)
    at = base + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    tl.store(at, tile.to(base.dtype.element_ty), inside[:, None] & (columns < WIDTH)[None, :])


@triton.jit
def blocks(low, high, full_low, full_high, BLOCK: tl.constexpr):
    """Cut low … high − 1 into blocks: how many, and left, right.

    Blocks left … right − 1 lie wholly inside full_low … full_high − 1, where all is seen, and need no mask."""
    count = tl.cdiv(tl.maximum(high - low, 0), BLOCK)
    left = tl.minimum(tl.cdiv(tl.maximum(full_low - low, 0), BLOCK), count)
    return count, left, tl.minimum(tl.maximum((full_high - low) // BLOCK, left), count)


@triton.jit
def tanh(x):
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
def absorb(o, l, m, q, k_base, v_base, start, high, first, last, slope, scale, cap, k_stride, v_stride,
           WIDTH: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr,
           SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, MASKED: tl.constexpr):
    """The online softmax takes in the keys from `start` on.

    o, l: Σ p·v and Σ p so far, relative to 2^m, m the largest score so far."""
    keys = start + tl.arange(0, KEYS)
    k = load_rows(k_base, keys, k_stride, high, WIDTH, BLOCK, MASKED)
    s = tl.dot(q, tl.trans(k), input_precision="ieee")
    if SOFTCAP:
        s = tanh(s * cap)
    factor = scale
    if ALIBI:
        s = s * scale + slope * (keys[None, :] - last[:, None]).to(tl.float32)
        factor = 1.0
    if MASKED:
        s = tl.where((first[:, None] <= keys[None, :]) & (keys[None, :] <= last[:, None]), s, -float("inf"))
    m_new = tl.maximum(m, tl.max(s, 1) * factor)        # scale is positive, so it can wait until after the maximum,
    p = tl.exp2(s * factor - m_new[:, None])            # and be one instruction with the subtraction here
    shrink = tl.exp2(m - m_new)
    v = load_rows(v_base, keys, v_stride, high, WIDTH, BLOCK, MASKED)
    o = tl.dot(p.to(v.dtype), v, o * shrink[:, None], input_precision="ieee")
    return o, l * shrink + tl.sum(p, 1), m_new
