"""Products of matrices where each expert has its own rows: the kernels of moe.py, which has equations and shapes.

    rows, sorted by expert            tiles of ROWS; the last of an expert is cut short, none has two experts

        ┌───────────────┐ 0           ┌───────────────┐
        │   expert 0    │             │  (0, row 0)   │        table[:, t] = expert, first row of tile t
        │               │             ├───────────────┤
        │               │             │  (0, row 4)   │        ROWS 4,  bounds 0 6 6 9:
        ├───────────────┤ 6           ├───────────────┤             expert   0  0  2  −1
        │   expert 2    │             │  (2, row 6)   │             row      0  4  6   ·
        └───────────────┘ 9           ├───────────────┤
                                      │  nobody's     │        expert 1 has no row and no tile
                                      └───────────────┘

How many tiles there are is known on the device only. The grid is as large as it can get, Σ_e ⌈n_e / ROWS⌉ ≤ ⌊R / ROWS⌋
+ min(E, R), and the programs of nobody's tiles leave at once: the host never waits, and a CUDA graph holds for every
routing.

float32 inputs are multiplied as float32 ("ieee"; no TF32), 16-bit inputs by the tensor cores. All sums are float32.
"""

import triton
import triton.language as tl

from kernels.activation import activated, slope


@triton.jit(do_not_specialize=["tiles", "E", "ROWS"])
def table_kernel(bounds_ptr, table_ptr, tiles, E, ROWS, BLOCK: tl.constexpr):
    """Program e lists the tiles of expert e, after those of all before it; program E marks the rest as nobody's."""
    e = tl.program_id(0)
    others = tl.arange(0, BLOCK)
    counts = tl.load(bounds_ptr + others + 1, others < e, other=0) - tl.load(bounds_ptr + others, others < e, other=0)
    behind = tl.sum(tl.cdiv(counts, ROWS), 0)
    first = tl.load(bounds_ptr + e)
    mine = tl.where(e < E, tl.cdiv(tl.load(bounds_ptr + e + 1, e < E, other=0) - first, ROWS), tiles - behind)
    for done in range(0, mine, BLOCK):
        tile = done + others
        tl.store(table_ptr + behind + tile, tl.where(e < E, e, -1), tile < mine)
        tl.store(table_ptr + tiles + behind + tile, first + tile * ROWS, tile < mine)


@triton.jit
def place(tiles, blocks, GROUP: tl.constexpr):
    """The tile and the block of columns of this program. Programs that run side by side take GROUP tiles by a few
    blocks, a near square, so that what one of them loads the others find in the cache."""
    group, within = tl.program_id(0) // (GROUP * blocks), tl.program_id(0) % (GROUP * blocks)
    size = tl.minimum(tiles - group * GROUP, GROUP)
    return group * GROUP + within % size, within // size


@triton.jit
def rows_of(tile, table_ptr, bounds_ptr, tiles, ROWS: tl.constexpr):
    """The expert of a tile, −1 for nobody's; its rows; which of them are that expert's."""
    e = tl.load(table_ptr + tile).to(tl.int64)
    rows = tl.load(table_ptr + tiles + tile).to(tl.int64) + tl.arange(0, ROWS)
    return e, rows, rows < tl.load(bounds_ptr + e + 1)


@triton.jit
def add_product(acc, a_at, w_at, size, w_step, row_inside, column_inside, DEPTH: tl.constexpr):
    """acc (ROWS, COLUMNS) + a·w over `size` steps.

    a_at (ROWS, 1) and w_at (1, COLUMNS): where the rows of a and the columns of w begin; their next elements lie 1 and
    w_step further."""
    depth = tl.arange(0, DEPTH)
    a_at, w_at = a_at + depth[None, :], w_at + depth[:, None].to(tl.int64) * w_step
    for done in range(0, size, DEPTH):
        within = done + depth < size
        a = tl.load(a_at + done, row_inside[:, None] & within[None, :], other=0.0)
        w = tl.load(w_at + tl.cast(done, tl.int64) * w_step, within[:, None] & column_inside[None, :], other=0.0)
        acc = tl.dot(a, w, acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["tiles"])
def up_kernel(x_ptr, gate_ptr, up_ptr, order_ptr, bounds_ptr, table_ptr, h_ptr, g_ptr, u_ptr, tiles, D, F,
              K: tl.constexpr, ACT: tl.constexpr, SAVE: tl.constexpr,
              ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr):
    """h[row] = act(g) ⊙ u with g = gate_e x[token], u = up_e x[token]. x is read in place. SAVE: g and u are kept."""
    tile, block = place(tiles, tl.cdiv(F, COLUMNS), GROUP)
    e, rows, row_inside = rows_of(tile, table_ptr, bounds_ptr, tiles, ROWS)
    if e < 0:
        return
    token = tl.load(order_ptr + rows, row_inside, other=0) // K
    f = block.to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    x_at, w_at = (token * D)[:, None] + depth[None, :], e * F * D + (f * D)[None, :] + depth[:, None]
    g, u = tl.zeros((ROWS, COLUMNS), tl.float32), tl.zeros((ROWS, COLUMNS), tl.float32)
    for d in range(0, D, DEPTH):
        x_inside, w_inside = row_inside[:, None] & (d + depth < D)[None, :], (d + depth < D)[:, None] & (f < F)[None, :]
        x = tl.load(x_ptr + d + x_at, x_inside, other=0.0)          # one x for two products
        g = tl.dot(x, tl.load(gate_ptr + d + w_at, w_inside, other=0.0), g, input_precision="ieee")
        u = tl.dot(x, tl.load(up_ptr + d + w_at, w_inside, other=0.0), u, input_precision="ieee")
    at, inside = (rows * F)[:, None] + f[None, :], row_inside[:, None] & (f < F)[None, :]
    g, u = g.to(h_ptr.dtype.element_ty), u.to(h_ptr.dtype.element_ty)      # the backward makes h again from these
    if SAVE:
        tl.store(g_ptr + at, g, inside)
        tl.store(u_ptr + at, u, inside)
    h = activated(g.to(tl.float32), ACT) * u.to(tl.float32)
    tl.store(h_ptr + at, h.to(h_ptr.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["tiles"])
def back_kernel(a_ptr, w_ptr, b_ptr, v_ptr, out_ptr, order_ptr, bounds_ptr, table_ptr, tiles, D, F, PAIR: tl.constexpr,
                ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr):
    """Back to width D, and back to the order of the tokens: out[order[row]] = w_e a[row] with w (E, D, F), which is
    down; or where PAIR w_eᵀ a[row] + v_eᵀ b[row] with w and v (E, F, D), which are gate and up."""
    tile, block = place(tiles, tl.cdiv(D, COLUMNS), GROUP)
    e, rows, row_inside = rows_of(tile, table_ptr, bounds_ptr, tiles, ROWS)
    if e < 0:
        return
    d = block.to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    acc, a_at = tl.zeros((ROWS, COLUMNS), tl.float32), (rows * F)[:, None]
    if PAIR:
        w_at = e * F * D + d[None, :]
        acc = add_product(acc, a_ptr + a_at, w_ptr + w_at, F, D, row_inside, d < D, DEPTH)
        acc = add_product(acc, b_ptr + a_at, v_ptr + w_at, F, D, row_inside, d < D, DEPTH)
    else:
        acc = add_product(acc, a_ptr + a_at, w_ptr + e * D * F + (d * F)[None, :], F, 1, row_inside, d < D, DEPTH)
    pair = tl.load(order_ptr + rows, row_inside, other=0)
    out_at = out_ptr + (pair * D)[:, None] + d[None, :]
    tl.store(out_at, acc.to(out_ptr.dtype.element_ty), row_inside[:, None] & (d < D)[None, :])


@triton.jit
def combine_kernel(rows_ptr, weights_ptr, y_ptr, D, K: tl.constexpr, WEIGHTED: tl.constexpr, COLUMNS: tl.constexpr):
    """y[n] = Σ_j rows[n, j], each times its weight where WEIGHTED: one token, COLUMNS of D. In the order of j."""
    n = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    y = tl.zeros((COLUMNS,), tl.float32)
    for j in tl.static_range(K):
        row = tl.load(rows_ptr + (n * K + j) * D + d, d < D, other=0.0).to(tl.float32)
        if WEIGHTED:
            row *= tl.load(weights_ptr + n * K + j)
        y += row
    tl.store(y_ptr + n * D + d, y.to(y_ptr.dtype.element_ty), d < D)


@triton.jit
def through_gates(s, w, rows, f, row_inside, g_ptr, u_ptr, dg_ptr, du_ptr, wh_ptr, F, ACT: tl.constexpr):
    """From s of some columns f: stores dg, du and w·h, returns the share of these columns in dw = ⟨h, s⟩."""
    at, inside = (rows * F)[:, None] + f[None, :], row_inside[:, None] & (f < F)[None, :]
    g, u = tl.load(g_ptr + at, inside, other=0.0).to(tl.float32), tl.load(u_ptr + at, inside, other=0.0).to(tl.float32)
    a, dh = activated(g, ACT), s * w[:, None]
    tl.store(dg_ptr + at, (dh * u * slope(g, ACT)).to(dg_ptr.dtype.element_ty), inside)
    tl.store(du_ptr + at, (dh * a).to(du_ptr.dtype.element_ty), inside)
    tl.store(wh_ptr + at, (w[:, None] * a * u).to(wh_ptr.dtype.element_ty), inside)
    return tl.sum(a * u * s, 1)


@triton.jit(do_not_specialize=["tiles"])
def gates_backward_kernel(dy_ptr, down_ptr, weights_ptr, g_ptr, u_ptr, order_ptr, bounds_ptr, table_ptr,
                          dg_ptr, du_ptr, wh_ptr, dw_ptr, tiles, D, F, K: tl.constexpr, ACT: tl.constexpr,
                          ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr):
    """s = down_eᵀ dY[token], and what follows from it row by row. dw (R, blocks): a share for each block of columns."""
    blocks = tl.cdiv(F, COLUMNS)
    tile, block = place(tiles, blocks, GROUP)
    e, rows, row_inside = rows_of(tile, table_ptr, bounds_ptr, tiles, ROWS)
    if e < 0:
        return
    pair = tl.load(order_ptr + rows, row_inside, other=0)
    f = block.to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    s, dy_at = tl.zeros((ROWS, COLUMNS), tl.float32), (pair // K * D)[:, None]
    s = add_product(s, dy_ptr + dy_at, down_ptr + e * D * F + f[None, :], D, F, row_inside, f < F, DEPTH)
    w = tl.load(weights_ptr + pair, row_inside, other=0.0)
    # one half after the other: both at once spill registers
    left, right = tl.split(tl.permute(tl.reshape(s, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))
    f = block.to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS // 2)
    dw = through_gates(left, w, rows, f, row_inside, g_ptr, u_ptr, dg_ptr, du_ptr, wh_ptr, F, ACT)
    dw += through_gates(right, w, rows, f + COLUMNS // 2, row_inside, g_ptr, u_ptr, dg_ptr, du_ptr, wh_ptr, F, ACT)
    tl.store(dw_ptr + pair * blocks + block, dw, row_inside)


@triton.jit
def outer_kernel(a_ptr, b_ptr, out_ptr, order_ptr, bounds_ptr, D, F, K: tl.constexpr, TRANSPOSE: tl.constexpr,
                 F_BLOCK: tl.constexpr, D_BLOCK: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr):
    """out_e (F, D), or (D, F) where TRANSPOSE, = Σ a[row] ⊗ b[token] over the rows of expert e; 0 where it has none."""
    f_block, d_block = place(tl.cdiv(F, F_BLOCK), tl.cdiv(D, D_BLOCK), GROUP)
    e = tl.program_id(1).to(tl.int64)
    f = f_block.to(tl.int64) * F_BLOCK + tl.arange(0, F_BLOCK)
    d = d_block.to(tl.int64) * D_BLOCK + tl.arange(0, D_BLOCK)
    depth, last = tl.arange(0, DEPTH), tl.load(bounds_ptr + e + 1)
    acc = tl.zeros((F_BLOCK, D_BLOCK), tl.float32)
    for first in range(tl.load(bounds_ptr + e), last, DEPTH):
        rows = tl.cast(first, tl.int64) + depth
        a = tl.load(a_ptr + (rows * F)[None, :] + f[:, None], (f < F)[:, None] & (rows < last)[None, :], other=0.0)
        token = tl.load(order_ptr + rows, rows < last, other=0) // K
        b = tl.load(b_ptr + (token * D)[:, None] + d[None, :], (rows < last)[:, None] & (d < D)[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    at = f[:, None] + (d * F)[None, :] if TRANSPOSE else (f * D)[:, None] + d[None, :]
    tl.store(out_ptr + e * D * F + at, acc.to(out_ptr.dtype.element_ty), (f < F)[:, None] & (d < D)[None, :])
