"""The selective scan, backward: the tokens again, from the last to the first. Equations, shapes and sizes: scan.py.

Write a = exp(ΔA), h′ for the state before a token (h_{t−1}, or 0 where a document begins), and g for the gradient of
h_t. The tokens behind t send g_{t+1} a_{t+1} back (0 where t + 1 begins a document), and token t adds its own:

    do = dy · silu(z)               dz = dy · o · silu′(z)                   the gate
    g  = do C + g_{t+1} a_{t+1}     dC = Σ_channels do h_t       dD += do x
    dx = do D + Δ Σ_n g B           dB = Σ_channels g Δ x        dA += g a h′ Δ
    dΔ = Σ_n g (A a h′ + B x)       dδ = dΔ · softplus′ where real,  softplus′ = σ;      dbias += dδ

h′ is wanted in reverse and cannot be had by running the recurrence backward: where a is small that divides by nothing.
So each chunk of CHUNK tokens, the last one first, is walked twice, there from the state that the forward kept, and
back:

        kept states      0           1           2                     there: h′ of each token → scratch, CHUNK tiles a
                         │···········│···········│···········                 program, again for every chunk: in L2
                                                  ── there ─→           back:  h′ of each token ← scratch, and the
                                                                               equations above
                                                  ←─ back ───
                                      ── there ─→
                                      ←─ back ───                       g, dA, dD and dbias stay in registers throughout

dB and dC are sums over all channels: each program writes its share, the shares are added afterwards. No atomics: the
same numbers every time. What a walk needs first (x and δ there, z and dy back) it reads one token ahead: rows of 32
channels in 16 bits are too narrow for the copies to shared memory that num_stages asks for.

Roofline. 14·BTI bytes in bf16 (x, δ, z, dy; dx, dδ, dz) and 2N + 9 special functions a token and channel. The kept
states, written and read once, are 8N/CHUNK bytes more, the scratch is 8N bytes of cache traffic.
"""

import triton
import triton.language as tl


@triton.jit
def softplus(s):
    """log(1 + e^s) = max(s, 0) + log(1 + e), e = e^−|s|, right to the last digits where Δ is small.

    What 1 + e loses of e by rounding, the factor e / ((1 + e) − 1) puts back (Kahan); 1e−7 keeps that finite. Above 20
    it is s itself, as PyTorch's."""
    e = tl.exp2(-1.4426950408889634 * tl.abs(s))
    u = 1.0 + e
    return tl.maximum(s, 0.0) + tl.where(u == 1.0, e, tl.log(u) * (e / tl.maximum(u - 1.0, 1e-7)))


@triton.jit
def row(ptr, t, stride, i, count):
    """The channels (or states) i of token t, 0 for those that are not below count; in the dtype that they have."""
    return tl.load(ptr + t * stride + i, i < count, other=0.0)


@triton.jit
def backward_kernel(dy_ptr, dlast_ptr, x_ptr, delta_ptr, bias_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, begins_ptr,
                    real_ptr, states_ptr, scratch_ptr,
                    dx_ptr, ddelta_ptr, dbias_ptr, dA_ptr, dB_ptr, dC_ptr, dD_ptr, dz_ptr, dh_ptr,
                    T, I, N, x_b, x_t, delta_b, delta_t, B_b, B_t, C_b, C_t, z_b, z_t,
                    BEGINS: tl.constexpr, REAL: tl.constexpr, LAST: tl.constexpr,
                    CHUNK: tl.constexpr, CHANNELS: tl.constexpr, STATES: tl.constexpr, STAGES: tl.constexpr):
    """All tokens of CHANNELS channels of row b, as in the forward."""
    blocks = tl.cdiv(I, CHANNELS)
    b, block = (tl.program_id(0) // blocks).to(tl.int64), (tl.program_id(0) % blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    n = tl.arange(0, STATES)
    inside = (i < I)[:, None] & (n < N)[None, :]
    tile = i[:, None] * N + n[None, :]
    scratch = scratch_ptr + tl.program_id(0).to(tl.int64) * CHUNK * CHANNELS * STATES
    scratch = scratch + tl.arange(0, CHANNELS)[:, None] * STATES + n[None, :]
    x_ptr, delta_ptr, z_ptr, dy_ptr = x_ptr + b * x_b, delta_ptr + b * delta_b, z_ptr + b * z_b, dy_ptr + b * T * I
    B_ptr, C_ptr = B_ptr + b * B_b, C_ptr + b * C_b
    A = tl.load(A_ptr + tile, inside, other=0.0) * 1.4426950408889634
    bias = tl.load(bias_ptr + i, i < I, other=0.0).to(tl.float32)
    D = tl.load(D_ptr + i, i < I, other=0.0).to(tl.float32)
    g = tl.zeros((CHANNELS, STATES), tl.float32)                # what the tokens behind send back
    if LAST:
        g = tl.load(dlast_ptr + b * I * N + tile, inside, other=0.0)
    dA = tl.zeros((CHANNELS, STATES), tl.float32)
    dD = tl.zeros((CHANNELS,), tl.float32)
    dbias = tl.zeros((CHANNELS,), tl.float32)
    chunks = tl.cdiv(T, CHUNK)
    for behind in range(chunks):
        chunk = tl.cast(chunks - 1 - behind, tl.int64)
        first = chunk * CHUNK
        tokens = tl.minimum(T - first, CHUNK).to(tl.int32)
        h = tl.load(states_ptr + (b * chunks + chunk) * I * N + tile, inside, other=0.0)
        x_ahead, delta_ahead = row(x_ptr, first, x_t, i, I), row(delta_ptr, first, delta_t, i, I)
        for step in tl.range(0, tokens, num_stages=STAGES):     # there
            t = first + step
            more = tl.where(t + 1 < first + tokens, I, 0)      # the row after the last is not read
            x, delta = x_ahead.to(tl.float32), softplus(delta_ahead.to(tl.float32) + bias)
            x_ahead, delta_ahead = row(x_ptr, t + 1, x_t, i, more), row(delta_ptr, t + 1, delta_t, i, more)
            B = row(B_ptr, t, B_t, n, N).to(tl.float32)
            if BEGINS:
                h = tl.where(tl.load(begins_ptr + b * T + t), 0.0, h)
            if REAL:
                delta = tl.where(tl.load(real_ptr + b * T + t), delta, 0.0)
            tl.store(scratch + step * (CHANNELS * STATES), h)
            h = tl.exp2(delta[:, None] * A) * h + (delta * x)[:, None] * B[None, :]
        tl.debug_barrier()                                      # one thread writes the scratch, another reads it
        z_ahead, dy_ahead = row(z_ptr, first + tokens - 1, z_t, i, I), row(dy_ptr, first + tokens - 1, I, i, I)
        for step in tl.range(0, tokens, num_stages=STAGES):     # and back; x and Δ are in the cache by now
            t = first + tokens - 1 - step
            more = tl.where(t > first, I, 0)
            z, dy = z_ahead.to(tl.float32), dy_ahead.to(tl.float32)
            z_ahead, dy_ahead = row(z_ptr, t - 1, z_t, i, more), row(dy_ptr, t - 1, I, i, more)
            x, s = row(x_ptr, t, x_t, i, I).to(tl.float32), row(delta_ptr, t, delta_t, i, I).to(tl.float32) + bias
            B, C = row(B_ptr, t, B_t, n, N).to(tl.float32), row(C_ptr, t, C_t, n, N).to(tl.float32)
            h = tl.load(scratch + (tokens - 1 - step) * (CHANNELS * STATES))
            delta, slope = softplus(s), tl.sigmoid(s)
            if REAL:
                real = tl.load(real_ptr + b * T + t)
                delta, slope = tl.where(real, delta, 0.0), tl.where(real, slope, 0.0)
            a = tl.exp2(delta[:, None] * A)
            decayed = a * h
            h = decayed + (delta * x)[:, None] * B[None, :]
            gate = tl.sigmoid(z)
            do = dy * z * gate
            dz = dy * (tl.sum(h * C[None, :], 1) + D * x) * (gate + z * gate * (1.0 - gate))
            g += do[:, None] * C[None, :]
            gB = tl.sum(g * B[None, :], 1)
            dx = do * D + delta * gB
            ddelta = (tl.sum(g * decayed * A, 1) * 0.6931471805599453 + x * gB) * slope      # A is times log2(e) here
            at, share = (b * T + t) * I + i, (block * (tl.num_programs(0) // blocks) + b) * T * N + t * N + n
            tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), i < I)
            tl.store(ddelta_ptr + at, ddelta.to(ddelta_ptr.dtype.element_ty), i < I)
            tl.store(dz_ptr + at, dz.to(dz_ptr.dtype.element_ty), i < I)
            tl.store(dB_ptr + share, tl.sum(g * (delta * x)[:, None], 0), n < N)
            tl.store(dC_ptr + share, tl.sum(do[:, None] * h, 0), n < N)
            dA += g * decayed * delta[:, None]
            dD += do * x
            dbias += ddelta
            g *= a
            if BEGINS:
                g = tl.where(tl.load(begins_ptr + b * T + t), 0.0, g)
        tl.debug_barrier()                                      # and is written again
    tl.store(dh_ptr + b * I * N + tile, g, inside)
    tl.store(dA_ptr + b * I * N + tile, dA, inside)
    tl.store(dD_ptr + b * I + i, dD, i < I)
    tl.store(dbias_ptr + b * I + i, dbias, i < I)
