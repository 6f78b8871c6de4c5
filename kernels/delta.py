"""The part of the gated delta rule that is no product of independent matrices: the state, from chunk to chunk.

    U_c = W_c − Y_c S_cᵀ        S_{c+1} = γ_c S_c + U_cᵀ K_c          nanollm/layers/delta.py, eq. (3) and (4)

Shapes: B batch, c chunks of Q tokens, H heads, P width of a value, N width of a key; all float32.
    WY (B, c, H, Q, P + N), W beside Y    K (B, c, H, Q, N)    γ (B, c, H)    U (B, c, H, Q, P)    S (B, H, P, N)

Everything else of the chunked form (A, the triangular system, L, the outputs) knows no other chunk, and is a product of
many matrices at once, which torch's libraries do. In torch this part is some five launches a chunk, one behind another.

    chunk c     U = W − Y Sᵀ, N in blocks       S′ = γ S + Uᵀ K, N in blocks        a program a head and block of rows
                        ↑                               ↓                           of S; no row of S needs another row
    states      S of chunk c            →       S of chunk c + 1

A row of S is as long as a key, and so are the rows of Y and K that it is multiplied with: in registers they would
spill. So S goes from chunk to chunk through the memory that has to hold it anyway, for the outputs and for the
backward; what a program reads there it has just written, so it comes from the L2 cache.

Roofline. 4 B c H Q N P FLOPs. Bytes: 4 B c H (2 Q P + 2 Q N + P N), of which the states are P N. In float32 without
tensor cores the FLOPs bound it: with Q = 64, N = P = 128 there are 21 FLOPs a byte.

Backward. With dU and dS_c the gradients that come from outside, and G_c that of the state after chunk c:

    V_c = dU_c + K_c G_cᵀ       G_{c−1} = γ_c G_c − V_cᵀ Y_c + dS_c

That is the same walk from the last chunk to the first, with K and Y in each other's place and another sign. What is
left is again products of single chunks, which torch does:

    dW = V      dY = −V S      dK = U G      dγ = ⟨S, G⟩      dS = the last G
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.common import largest, operation, tuned, unlike


@triton.jit
def walk_kernel(add_ptr, read_ptr, write_ptr, gamma_ptr, more_ptr, u_ptr, states_ptr, last_ptr,
                chunks, H, P, N, add_row, read_row, write_row, BACK: tl.constexpr, Q: tl.constexpr, BP: tl.constexpr,
                BN: tl.constexpr):
    """Program (block of P, head, batch): U of each chunk, S before it, and the last S. The first S stands in states.

    add is W, read is Y, write is K. BACK, from the last chunk on: add is dU, read is K, write is Y, more is dS."""
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    rows, order = tl.program_id(0) * BP + tl.arange(0, BP), tl.arange(0, Q)
    channels = (rows < P)[None, :]
    chunk = (batch * chunks + (chunks - 1 if BACK else 0)) * H + head
    for step in range(chunks):
        token, following = chunk * Q, chunk - H if BACK else chunk + H
        S_at, next_at = states_ptr + chunk * P * N, states_ptr + following * P * N
        if step == chunks - 1:
            next_at = last_ptr + (batch * H + head) * P * N
        gamma = tl.load(gamma_ptr + chunk)
        u = tl.load(add_ptr + token * add_row + order[:, None] * add_row + rows[None, :], channels, other=0.0)
        for n in range(0, N, BN):
            columns = n + tl.arange(0, BN)
            inside = (rows < P)[:, None] & (columns < N)[None, :]
            S = tl.load(S_at + rows[:, None] * N + columns[None, :], inside, other=0.0)
            read = tl.load(read_ptr + token * read_row + order[:, None] * read_row + columns[None, :],
                           (columns < N)[None, :], other=0.0)
            seen = tl.dot(read, tl.trans(S), input_precision="ieee")                     # (Q, BP)
            u = u + seen if BACK else u - seen
        tl.store(u_ptr + token * P + order[:, None] * P + rows[None, :], u, channels)
        for n in range(0, N, BN):
            columns = n + tl.arange(0, BN)
            inside = (rows < P)[:, None] & (columns < N)[None, :]
            S = gamma * tl.load(S_at + rows[:, None] * N + columns[None, :], inside, other=0.0)
            write = tl.load(write_ptr + token * write_row + order[:, None] * write_row + columns[None, :],
                            (columns < N)[None, :], other=0.0)
            written = tl.dot(tl.trans(u), write, input_precision="ieee")                 # (BP, BN)
            if BACK:
                more = tl.load(more_ptr + chunk * P * N + rows[:, None] * N + columns[None, :], inside, other=0.0)
                S = S - written + more
            else:
                S = S + written
            tl.store(next_at + rows[:, None] * N + columns[None, :], S, inside)
        tl.debug_barrier()                                  # what is read next was stored by other threads
        chunk = following


def _walk(add: Tensor, read: Tensor, write: Tensor, gamma: Tensor, more: Tensor | None,
          first: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, the states and the last one. Rows of add, read and write may lie further apart than they are long."""
    (batch, chunks, H, Q), (P, N) = add.shape[:4], first.shape[2:]
    meta = tuned("delta_walk", N, first.device)
    meta |= {name: max(16, min(meta[name], triton.next_power_of_2(size))) for name, size in (("BP", P), ("BN", N))}
    U, states = first.new_empty(batch, chunks, H, Q, P), first.new_empty(batch, chunks, H, P, N)
    states[:, 0 if more is None else -1], last = first, torch.empty_like(first)
    with torch.cuda.device_of(first):
        walk_kernel[(triton.cdiv(P, meta["BP"]), H, batch)](
            add, read, write, gamma, more, U, states, last, chunks, H, P, N,
            add.stride(3), read.stride(3), write.stride(3), BACK=more is not None, Q=Q, **meta)
    return U, states, last


@torch.library.custom_op("nanollm::delta_walk", mutates_args=())
def delta_walk_op(WY: Tensor, K: Tensor, gamma: Tensor, S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, the S before each chunk, the last S."""
    W, Y = WY.split([*S.shape[2:]], -1)
    return _walk(W, Y, K, gamma, None, S)


@delta_walk_op.register_fake
def _(WY, K, gamma, S):
    (P, N), rows = S.shape[2:], K.shape[:-1]
    return WY.new_empty(*rows, P), WY.new_empty(*rows[:3], P, N), torch.empty_like(S)


@torch.library.custom_op("nanollm::delta_walk_backward", mutates_args=())
def delta_walk_backward_op(dU: Tensor, dbefore: Tensor, dlast: Tensor, WY: Tensor, K: Tensor, gamma: Tensor, U: Tensor,
                           before: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dWY, dK, dγ, dS."""
    Y = WY[..., U.shape[-1]:]
    V, G, dS = _walk(dU, K, Y, gamma, dbefore, dlast)
    return torch.cat([V, -(V @ before)], -1), U @ G, (before * G).sum((-2, -1)), dS


@delta_walk_backward_op.register_fake
def _(dU, dbefore, dlast, WY, K, gamma, U, before):
    return torch.empty_like(WY), torch.empty_like(K), torch.empty_like(gamma), torch.empty_like(dlast)


def _save(ctx, inputs, output):
    WY, K, gamma, _ = inputs
    ctx.save_for_backward(WY, K, gamma, *output[:2])


def _backward(ctx, dU, dbefore, dlast):
    return delta_walk_backward_op(dU.contiguous(), dbefore.contiguous(), dlast.contiguous(), *ctx.saved_tensors)


delta_walk_op.register_autograd(_backward, setup_context=_save)


def _refuses(WY: Tensor, K: Tensor, gamma: Tensor, S: Tensor) -> str | None:
    if S.ndim != 4 or K.ndim != 5 or 0 in S.shape or 0 in K.shape:
        found = f"{tuple(S.shape)} and {tuple(K.shape)}"
        return f"S needs four dimensions and K five, with something in each, they are {found}"
    (batch, chunks, H, Q, N), P = K.shape, S.shape[2]
    expected = {"WY": (batch, chunks, H, Q, P + N), "gamma": (batch, chunks, H), "S": (batch, H, P, N)}
    given = {"WY": WY, "gamma": gamma, "S": S, "K": K}
    for name, shape in expected.items():
        if given[name].shape != shape:
            return f"{name} has shape {tuple(given[name].shape)}, expected {shape}"
    if Q not in (16, 32, 64) or N > largest("delta_walk") or batch > 65535 or H > 65535:
        most = f"16, 32 or 64, and up to {largest('delta_walk')}, 65535 and 65535"
        return f"chunks of {Q}, keys of {N}, {batch} sequences of {H} heads; supported are {most}"
    for name, tensor in given.items():
        if tensor.dtype != torch.float32:
            return f"{name} must be float32, it is {str(tensor.dtype)[6:]}"
    return unlike(WY, K=K, gamma=gamma, S=S)


@operation(_refuses)
def delta_walk(WY: Tensor, K: Tensor, gamma: Tensor, S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (B, c, H, Q, P), the S before each chunk (B, c, H, P, N), and the last S (B, H, P, N)."""
    return delta_walk_op(*(x.contiguous() for x in (WY, K, gamma, S)))      # a triangular solver leaves columns
