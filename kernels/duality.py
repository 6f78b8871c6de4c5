"""The scan of Mamba-2 (state-space duality), forward and backward, as products of matrices that a tensor core takes.

    h_t = exp(Δ_t A) h_{t−1} + Δ_t x_t ⊗ B_t        y_t = h_t C_t + D x_t
    Dao & Gu 2024 (arXiv 2405.21060), §6, Algorithm 1

Shapes, as in nanollm/layers/ssd.py: B batch, T tokens, H heads, P channels of a head, G groups, N state; Q tokens a
chunk.
    x, y (B, T, H, P)   Δ (B, T, H)   A, D (H,)   B, C (B, T, G, N)   h (B, H, P, N) float32

Inside a chunk, with a_t = Δ_t A and c_t = a_1 + … + a_t, c_Q the last:

    L_ts = exp(c_t − c_s), s ≤ t       Y  = (C Bᵀ ∘ L) (Δ x) + e ∘ (C Sᵀ) + D x      from this chunk, and all before
    from the start   e_t = exp(c_t)    S′ = e_Q S + (r Δ x)ᵀ B                       the state that the next begins with
    to the end   r_s = exp(c_Q − c_s)

    walk      S ─→ x Δ B ─→ S ─→ x Δ B ─→ S ─→ …        a program a head and tile of S, chunk by chunk, S (P, N) in
              ↓             ↓             ↓             registers, in float32
    output    chunk 0       chunk 1       chunk 2       a program a chunk: no chunk waits for another; N in blocks

Where a document starts between s and t, L_ts is 0, and so are e and r across a start. A difference of running sums is
as exact as a sum of its own terms (nanollm/layers/ssd.py) only while the running sums are short: they begin anew with
each chunk, and a step that forgets all, a < −104, counts as −104: exp of it is 0 in float32 already. The exponent is
masked, not the exponential: s > t would overflow.

Roofline. Forward 2 B T H (Q N + Q P + 2 N P) FLOPs; bytes in bf16 B T (4 H P + 4 G N + 4 H), and twice 4 B H P N T/Q
for the states: with Q = 64 and N = 128 four times what x and y are, so bytes bound it, and of those the states. A
larger Q makes them fewer, and L larger.

Backward: the same walk from the last chunk to the first, with dS′ (P, N), the gradient of the state after a chunk,
dS = e_Q dS′ + (e ∘ dY)ᵀ C; then all chunks side by side. By the product rule, with M_ts = (dY_t · Δ_s x_s) L_ts:

    du = (C Bᵀ ∘ L)ᵀ dY + r ∘ (B dS′ᵀ)      dx = Δ du + D dY      dC = M B + e ∘ (dY S)      dB = Mᵀ C + r Δ ∘ (x dS′)

    dc_t = Σ_s K_ts − Σ_s K_st + ε_t − ρ_t          K = M ∘ C Bᵀ,  ε_t = e_t dY_t · (S C_t)
                                                    ρ_s = r_s Δ_s x_s · (dS′ B_s)
    dc_Q  also has  Σ ρ + e_Q ⟨S, dS′⟩               da_t = dc_t + … + dc_Q,  dΔ = A da + x · du,  dA = Σ Δ da

The heads of a group (and the blocks of P) each write their share of dB and dC in float32; torch adds them: no atomics.

Products: bfloat16 as it is; float32 exactly ("ieee"); float16 as TF32, which holds a float16 exactly and has the range
of float32 for the products between, which float16 has not. (Both need tiles of half the size: bfloat16 is what to train
in.)
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.common import largest, operation, tuned, unlike


@triton.jit
def product(a, b, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """a b, summed in float32."""
    return tl.dot(a.to(DOT), b.to(DOT), input_precision=PRECISION)


@triton.jit
def chunk_of(delta_ptr, begins_ptr, A, token, head, inside, H, BEGINS: tl.constexpr):
    """Δ (Q,) and the decays of a chunk: L (Q, Q), e (Q,), r (Q,), e_Q; and which steps remember.

    Past the end Δ is 0, which changes nothing."""
    order = tl.arange(0, inside.shape[0])
    delta = tl.load(delta_ptr + token * H + head + order * H, inside, other=0.0).to(tl.float32)
    a = tl.maximum(delta * A * 1.4426950408889634, -150.0)                 # times log₂ e, for exp2; 2⁻¹⁵⁰ is 0
    remembers = a > -150.0
    c = tl.cumsum(a, 0)
    whole = tl.sum(a, 0)
    since, until, gap = c, whole - c, c[:, None] - c[None, :]
    gap = tl.where(order[:, None] >= order[None, :], gap, float("-inf"))
    if BEGINS:
        starts = tl.load(begins_ptr + token + order, inside, other=0).to(tl.int32)
        remembers &= starts == 0
        document = tl.cumsum(starts, 0)
        last = tl.sum(starts, 0)
        gap = tl.where(document[:, None] == document[None, :], gap, float("-inf"))
        since = tl.where(document == 0, since, float("-inf"))
        until = tl.where(document == last, until, float("-inf"))
        whole = tl.where(last == 0, whole, float("-inf"))
    return delta, tl.exp2(gap), tl.exp2(since), tl.exp2(until), tl.exp2(whole), remembers


@triton.jit
def walk_kernel(x_ptr, delta_ptr, A_ptr, B_ptr, first_ptr, begins_ptr, states_ptr, last_ptr,
                T, H, P, N, heads_a_group, x_batch, x_token, B_batch, B_token,
                BEGINS: tl.constexpr, BACK: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
                Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr):
    """Program (head and block of P, block of N, batch): S before each chunk, and the last.

    BACK: dS′ after each, with dy for x, C for B."""
    blocks, chunks = tl.cdiv(P, BP), tl.cdiv(T, Q)
    head, batch = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(2).to(tl.int64)
    channels, columns = tl.program_id(0) % blocks * BP + tl.arange(0, BP), tl.program_id(1) * BN + tl.arange(0, BN)
    A = tl.load(A_ptr + head).to(tl.float32)
    at, inside_S = channels[:, None] * N + columns[None, :], (channels < P)[:, None] & (columns < N)[None, :]
    sequence, group = batch * H + head, head // heads_a_group
    S = tl.load(first_ptr + sequence * P * N + at, inside_S, other=0.0)
    order = tl.arange(0, Q)
    for step in range(chunks):
        chunk = tl.cast(chunks - 1 - step if BACK else step, tl.int64)
        tl.store(states_ptr + (sequence * chunks + chunk) * P * N + at, S, inside_S)
        start = chunk * Q                                   # 64 bits for where a chunk is, 32 for what is in it
        inside = order < T - start
        inside_x, inside_B = inside[:, None] & (channels < P)[None, :], inside[:, None] & (columns < N)[None, :]
        x_at = x_ptr + batch * x_batch + start * x_token + head * P
        B_at = B_ptr + batch * B_batch + start * B_token + group * N
        x = tl.load(x_at + order[:, None] * x_token + channels[None, :], inside_x, other=0.0)
        B = tl.load(B_at + order[:, None] * B_token + columns[None, :], inside_B, other=0.0)
        delta, _, since, until, whole, _ = chunk_of(delta_ptr, begins_ptr, A, batch * T + start, head, inside, H,
                                                    BEGINS)
        weight = since if BACK else until * delta
        S = S * whole + product(tl.trans((x.to(tl.float32) * weight[:, None]).to(DOT)), B, DOT, PRECISION)
    tl.store(last_ptr + sequence * P * N + at, S, inside_S)


@triton.jit
def output_kernel(x_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, begins_ptr, states_ptr, y_ptr,
                  T, H, P, N, heads_a_group, x_batch, x_token, B_batch, B_token, C_batch, C_token,
                  BEGINS: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
                  Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr):
    """Program (head and block of P, chunk, batch): y of a chunk."""
    blocks, chunk = tl.cdiv(P, BP), tl.program_id(1).to(tl.int64)
    head, batch = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(2).to(tl.int64)
    channels, order = tl.program_id(0) % blocks * BP + tl.arange(0, BP), tl.arange(0, Q)
    start, group = chunk * Q, head // heads_a_group
    inside = order < T - start
    inside_x = inside[:, None] & (channels < P)[None, :]
    B_at = B_ptr + batch * B_batch + start * B_token + group * N
    C_at = C_ptr + batch * C_batch + start * C_token + group * N
    S_at = states_ptr + ((batch * H + head) * tl.num_programs(1) + chunk) * P * N
    CB = tl.zeros((Q, Q), tl.float32)
    y = tl.zeros((Q, BP), tl.float32)
    for n in range(0, N, BN):
        columns = n + tl.arange(0, BN)
        inside_B = inside[:, None] & (columns < N)[None, :]
        B = tl.load(B_at + order[:, None] * B_token + columns[None, :], inside_B, other=0.0)
        C = tl.load(C_at + order[:, None] * C_token + columns[None, :], inside_B, other=0.0)
        S_tile = S_at + channels[:, None] * N + columns[None, :]
        S = tl.load(S_tile, (channels < P)[:, None] & (columns < N)[None, :], other=0.0)
        CB += product(C, tl.trans(B), DOT, PRECISION)
        y += product(C, tl.trans(S.to(DOT)), DOT, PRECISION)
    A, D = tl.load(A_ptr + head).to(tl.float32), tl.load(D_ptr + head).to(tl.float32)
    delta, L, since, _, _, _ = chunk_of(delta_ptr, begins_ptr, A, batch * T + start, head, inside, H, BEGINS)
    x_at = x_ptr + batch * x_batch + start * x_token + head * P
    x = tl.load(x_at + order[:, None] * x_token + channels[None, :], inside_x, other=0.0)
    y = y * since[:, None] + product(CB * L * delta[None, :], x, DOT, PRECISION) + D * x.to(tl.float32)
    y_at = y_ptr + ((batch * T + start) * H + head) * P
    tl.store(y_at + order[:, None] * H * P + channels[None, :], y.to(y_ptr.dtype.element_ty), inside_x)


@triton.jit
def gradient_kernel(dy_ptr, after_ptr, x_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, begins_ptr, states_ptr,
                    dx_ptr, ddelta_ptr, dA_ptr, dB_ptr, dC_ptr, dD_ptr,
                    T, H, P, N, heads_a_group, x_batch, x_token, B_batch, B_token, C_batch, C_token,
                    BEGINS: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
                    Q: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr):
    """Program (head and block of P, chunk, batch): all gradients of a chunk. Of dΔ, dA, dB, dC and dD its own share."""
    blocks, chunk = tl.cdiv(P, BP), tl.program_id(1).to(tl.int64)
    head, batch = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(2).to(tl.int64)
    channels, order = tl.program_id(0) % blocks * BP + tl.arange(0, BP), tl.arange(0, Q)
    start, group = chunk * Q, head // heads_a_group
    inside = order < T - start
    inside_x = inside[:, None] & (channels < P)[None, :]
    B_at = B_ptr + batch * B_batch + start * B_token + group * N
    C_at = C_ptr + batch * C_batch + start * C_token + group * N
    state = ((batch * H + head) * tl.num_programs(1) + chunk) * P * N
    x_at = x_ptr + batch * x_batch + start * x_token + head * P
    x = tl.load(x_at + order[:, None] * x_token + channels[None, :], inside_x, other=0.0)
    y_at = ((batch * T + start) * H + head) * P + order[:, None] * H * P + channels[None, :]
    dy = tl.load(dy_ptr + y_at, inside_x, other=0.0)

    CB = tl.zeros((Q, Q), tl.float32)
    CS = tl.zeros((Q, BP), tl.float32)
    BdS = tl.zeros((Q, BP), tl.float32)
    SdS = tl.zeros((BP,), tl.float32)
    for n in range(0, N, BN):
        columns = n + tl.arange(0, BN)
        inside_B, inside_S = inside[:, None] & (columns < N)[None, :], (channels < P)[:, None] & (columns < N)[None, :]
        B = tl.load(B_at + order[:, None] * B_token + columns[None, :], inside_B, other=0.0)
        C = tl.load(C_at + order[:, None] * C_token + columns[None, :], inside_B, other=0.0)
        S = tl.load(states_ptr + state + channels[:, None] * N + columns[None, :], inside_S, other=0.0)
        dS = tl.load(after_ptr + state + channels[:, None] * N + columns[None, :], inside_S, other=0.0)
        SdS += tl.sum(S * dS, 1)
        CB += product(C, tl.trans(B), DOT, PRECISION)
        CS += product(C, tl.trans(S.to(DOT)), DOT, PRECISION)
        BdS += product(B, tl.trans(dS.to(DOT)), DOT, PRECISION)

    A, D = tl.load(A_ptr + head).to(tl.float32), tl.load(D_ptr + head).to(tl.float32)
    delta, L, since, until, whole, remembers = chunk_of(delta_ptr, begins_ptr, A, batch * T + start, head, inside, H,
                                                        BEGINS)
    x32, dy32 = x.to(tl.float32), dy.to(tl.float32)
    M = product(dy, tl.trans(x), DOT, PRECISION) * L * delta[None, :]
    K = tl.where(order[:, None] > order[None, :], CB * M, 0.0)                         # the diagonal would cancel
    rho = tl.sum(x32 * BdS, 1) * until * delta
    dc = tl.sum(K, 1) - tl.sum(K, 0) + tl.sum(dy32 * CS, 1) * since - rho
    da = tl.cumsum(dc, 0, reverse=True) + tl.sum(rho, 0) + whole * tl.sum(SdS, 0)
    da *= remembers.to(tl.float32)                          # else terms that cancel up to rounding, times a huge Δ
    du = product(tl.trans((CB * L).to(DOT)), dy, DOT, PRECISION) + BdS * until[:, None]
    tl.store(dx_ptr + y_at, (du * delta[:, None] + D * dy32).to(dx_ptr.dtype.element_ty), inside_x)
    share = (batch * T + start + order) * H * blocks + tl.program_id(0)
    tl.store(ddelta_ptr + share, A * da + tl.sum(x32 * du, 1), inside)
    mine = (batch * tl.num_programs(1) + chunk) * H * blocks + tl.program_id(0)
    tl.store(dA_ptr + mine, tl.sum(delta * da, 0))
    tl.store(dD_ptr + mine, tl.sum(tl.sum(dy32 * x32, 1), 0))

    M = M.to(DOT)
    for n in range(0, N, BN):
        columns = n + tl.arange(0, BN)
        inside_B, inside_S = inside[:, None] & (columns < N)[None, :], (channels < P)[:, None] & (columns < N)[None, :]
        B = tl.load(B_at + order[:, None] * B_token + columns[None, :], inside_B, other=0.0)
        S = tl.load(states_ptr + state + channels[:, None] * N + columns[None, :], inside_S, other=0.0)
        dC = product(dy, S, DOT, PRECISION) * since[:, None] + product(M, B, DOT, PRECISION)
        tl.store(dC_ptr + share[:, None] * N + columns[None, :], dC, inside_B)
        C = tl.load(C_at + order[:, None] * C_token + columns[None, :], inside_B, other=0.0)
        dS = tl.load(after_ptr + state + channels[:, None] * N + columns[None, :], inside_S, other=0.0)
        dB = product(x, dS, DOT, PRECISION) * (until * delta)[:, None] + product(tl.trans(M), C, DOT, PRECISION)
        tl.store(dB_ptr + share[:, None] * N + columns[None, :], dB, inside_B)


# ---- the operations as torch sees them

def _constants(kernel: str, x: Tensor, B: Tensor) -> dict:
    """All kernels have the chunks of the walk; P and N are padded to what a product takes."""
    (P, N), kind = (x.shape[3], B.shape[3]), "" if x.dtype == torch.bfloat16 else "_float32"
    meta = tuned(kernel + kind, N, x.device) | {"Q": tuned("ssd_walk" + kind, N, x.device)["Q"]}
    meta |= {name: max(16, min(meta[name], triton.next_power_of_2(size))) for name, size in (("BP", P), ("BN", N))}
    meta["DOT"], meta["PRECISION"] = {
        torch.bfloat16: (tl.bfloat16, "ieee"), torch.float16: (tl.float32, "tf32"), torch.float32: (tl.float32, "ieee"),
    }[x.dtype]
    return meta


def _walk(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, first: Tensor, begins: Tensor | None,
          back: bool) -> tuple[Tensor, Tensor]:
    """The states between the chunks, (B, H, chunks, P, N), and the last."""
    (batch, T, H, P), (_, _, G, N), meta = x.shape, B.shape, _constants("ssd_walk", x, B)
    states, last = first.new_empty(batch, H, triton.cdiv(T, meta["Q"]), P, N), torch.empty_like(first)
    walk_kernel[(H * triton.cdiv(P, meta["BP"]), triton.cdiv(N, meta["BN"]), batch)](
        x, delta, A, B, first, begins, states, last, T, H, P, N, H // G, *x.stride()[:2], *B.stride()[:2],
        BEGINS=begins is not None, BACK=back, **meta)
    return states, last


@torch.library.custom_op("nanollm::ssd", mutates_args=())
def ssd_op(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, h: Tensor,
           begins: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """y, the last h, and the states before each chunk."""
    (batch, T, H, P), (_, _, G, N), meta = x.shape, B.shape, _constants("ssd_output", x, B)
    y, begins = x.new_empty(x.shape), None if begins is None else begins.view(torch.uint8)
    with torch.cuda.device_of(x):
        states, last = _walk(x, delta, A, B, h, begins, back=False)
        output_kernel[(H * triton.cdiv(P, meta["BP"]), states.shape[2], batch)](
            x, delta, A, B, C, D, begins, states, y, T, H, P, N, H // G,
            *x.stride()[:2], *B.stride()[:2], *C.stride()[:2], BEGINS=begins is not None, **meta)
    return y, last, states


@ssd_op.register_fake
def _(x, delta, A, B, C, D, h, begins):
    chunks = -(-x.shape[1] // _constants("ssd_walk", x, B)["Q"])
    return x.new_empty(x.shape), torch.empty_like(h), h.new_empty(*h.shape[:2], chunks, *h.shape[2:])


@torch.library.custom_op("nanollm::ssd_backward", mutates_args=())
def ssd_backward_op(dy: Tensor, dlast: Tensor, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor,
                    begins: Tensor | None, states: Tensor) -> list[Tensor]:
    """dx, dΔ, dA, dB, dC, dD, dh."""
    (batch, T, H, P), (_, _, G, N), meta = x.shape, B.shape, _constants("ssd_gradient", x, B)
    blocks, chunks = triton.cdiv(P, meta["BP"]), states.shape[2]
    dx, begins = x.new_empty(x.shape), None if begins is None else begins.view(torch.uint8)
    ddelta = states.new_empty(batch, T, H, blocks)
    dA, dD = states.new_empty(batch, chunks, H, blocks), states.new_empty(batch, chunks, H, blocks)
    dB, dC = states.new_empty(batch, T, G, H // G * blocks, N), states.new_empty(batch, T, G, H // G * blocks, N)
    with torch.cuda.device_of(x):
        after, dh = _walk(dy, delta, A, C, dlast, begins, back=True)
        gradient_kernel[(H * blocks, chunks, batch)](
            dy, after, x, delta, A, B, C, D, begins, states, dx, ddelta, dA, dB, dC, dD,
            T, H, P, N, H // G, *x.stride()[:2], *B.stride()[:2], *C.stride()[:2], BEGINS=begins is not None, **meta)
    return [dx, ddelta.sum(3).to(delta.dtype), dA.sum((0, 1, 3)).to(A.dtype), dB.sum(3).to(B.dtype),
            dC.sum(3).to(C.dtype), dD.sum((0, 1, 3)).to(D.dtype), dh]


@ssd_backward_op.register_fake
def _(dy, dlast, x, delta, A, B, C, D, begins, states):
    return [z.new_empty(z.shape) for z in (x, delta, A, B, C, D, dlast)]


def _save(ctx, inputs, output):
    x, delta, A, B, C, D, _, begins = inputs
    ctx.save_for_backward(x, delta, A, B, C, D, begins, output[2])
    ctx.set_materialize_grads(False)                            # the states between chunks have no gradient: no zeros


def _backward(ctx, dy, dlast, _):
    x, delta, A, B, C, D, begins, states = ctx.saved_tensors
    dy = torch.zeros_like(x, memory_format=torch.contiguous_format) if dy is None else dy.contiguous()
    dlast = torch.zeros_like(states[:, :, 0]) if dlast is None else dlast.contiguous()
    return *ssd_backward_op(dy, dlast, x, delta, A, B, C, D, begins, states), None


ssd_op.register_autograd(_backward, setup_context=_save)


def _refuses(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, h: Tensor,
             begins: Tensor | None = None) -> str | None:
    if x.ndim != 4 or B.ndim != 4 or 0 in x.shape or 0 in B.shape:
        return f"x and B need four dimensions with something in each, they are {tuple(x.shape)} and {tuple(B.shape)}"
    (batch, T, H, P), (_, _, G, N) = x.shape, B.shape
    expected = {"delta": (batch, T, H), "A": (H,), "B": (batch, T, G, N), "C": (batch, T, G, N), "D": (H,),
                "h": (batch, H, P, N), "begins": (batch, T)}
    given = {"delta": delta, "A": A, "B": B, "C": C, "D": D, "h": h, "begins": begins}
    for name, tensor in given.items():
        if tensor is not None and tensor.shape != expected[name]:
            return f"{name} has shape {tuple(tensor.shape)}, expected {expected[name]}"
    if H % G:
        return f"{H} heads cannot share {G} groups"
    if N > largest("ssd_walk") or batch > 65535 or T > 2**20:
        most = f"up to {largest('ssd_walk')}, 65535 and {2**20}"
        return f"a state of {N}, {batch} sequences of {T} tokens; supported are {most}"
    kind = torch.bool if begins is None else begins.dtype
    if B.dtype != x.dtype or C.dtype != x.dtype or h.dtype != torch.float32 or kind != torch.bool:
        found = f"{x.dtype}, {B.dtype}, {C.dtype}, {h.dtype} and {None if begins is None else kind}"
        return f"x, B and C must be alike, h float32, begins bool; they are {found}"
    for name, tensor, width in (("x", x, P), ("B", B, N), ("C", C, N)):
        if tensor.stride()[2:] != (width, 1) or tensor.stride(1) > 2**24:
            expected = f"the numbers of a token must follow one another in memory, up to {2**24} a token"
            return f"{expected}, those of {name} have strides {tensor.stride()}"
    for name, tensor in given.items():
        if name not in "BC" and tensor is not None and not tensor.is_contiguous():
            return f"{name} must be contiguous"
    return unlike(x, **given)


@operation(_refuses)
def ssd(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, h: Tensor,
        begins: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """y (B, T, H, P) in the dtype of x, and the last h (B, H, P, N). x, B and C may be parts of one row a token."""
    return ssd_op(x, delta, A, B, C, D, h, begins)[:2]
