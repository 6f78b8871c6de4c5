"""The selective scan of Mamba with softplus and mask before it and the gate after it, in one pass over the tokens.

    Δ_t = softplus(δ_t + bias) · real_t                        Gu & Dao 2023 (arXiv 2312.00752), Algorithm 2
    h_t = exp(Δ_t A) ⊙ h_{t−1} + Δ_t x_t B_t                   eq. 2a; h_{t−1} = 0 where a document begins
    o_t = C_t · h_t + D x_t,      y_t = o_t · silu(z_t)        eq. 2b, and the gate of Figure 3

Shapes: B batch, T tokens, I channels, N state per channel.
    x, δ, z, y (B, T, I)   B, C (B, T, N)   bias, D (I,)   A (I, N) float32, below zero   h (B, I, N) float32
    begins, real (B, T) bool

Roofline. Bytes, in bf16: read x, δ, z and write y, 8·BTI. Arithmetic: the special function unit makes 16 results a
clock and multiprocessor, and each token and channel asks it for N exponentials and four more (softplus, silu):
BTI·(N + 4). With N = 16 on an H200 that takes 2.3 times as long as the bytes: the floor is the exponentials, and a
parallel scan, which needs more of them, is no help while there are channels enough to fill the device. One token
(T = 1): read and write h, 8·BIN bytes.

    one program = CHANNELS channels of one row, one warp; its states stay in registers while the tokens pass by

                   N
                 ┌────┐ ·exp2(Δ_t A′)  + Δ_t x_t B_t      A′ = A·log2(e), so that a power of two is all there is to do
        CHANNELS │ h  │────→────→────→────→────→────→     last h
                 └────┘ t=0   1    2    3     …  T−1      tl.range(num_stages) copies tokens t+1 … t+STAGES−1 to shared
                   │ C_t · h, gate                        memory while token t is computed
                   ↓
                   y_t

For the backward (scan_backward.py) the state before every CHUNK-th token is kept. T = 1 is the step of generation, and
the same kernel. Reading rows by their strides, the kernel takes the halves of in_proj's result and the parts of
x_proj's as they lie.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.common import largest, operation, tuned, unlike
from kernels.scan_backward import backward_kernel, row, softplus


@triton.jit
def forward_kernel(x_ptr, delta_ptr, bias_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, h_ptr, begins_ptr, real_ptr,
                   y_ptr, last_ptr, states_ptr,
                   T, I, N, x_b, x_t, delta_b, delta_t, B_b, B_t, C_b, C_t, z_b, z_t,
                   BEGINS: tl.constexpr, REAL: tl.constexpr, SAVE: tl.constexpr,
                   CHUNK: tl.constexpr, CHANNELS: tl.constexpr, STATES: tl.constexpr, STAGES: tl.constexpr):
    """All tokens of CHANNELS channels of row b. x_b, x_t: strides of x along batch and time, and so on.

    Channels and states lie side by side."""
    blocks = tl.cdiv(I, CHANNELS)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    n = tl.arange(0, STATES)
    inside = (i < I)[:, None] & (n < N)[None, :]
    tile = i[:, None] * N + n[None, :]                          # of A, and of h within its row
    x_ptr, delta_ptr, z_ptr = x_ptr + b * x_b, delta_ptr + b * delta_b, z_ptr + b * z_b
    B_ptr, C_ptr = B_ptr + b * B_b, C_ptr + b * C_b
    A = tl.load(A_ptr + tile, inside, other=0.0) * 1.4426950408889634
    h = tl.load(h_ptr + b * I * N + tile, inside, other=0.0)
    bias = tl.load(bias_ptr + i, i < I, other=0.0).to(tl.float32)
    D = tl.load(D_ptr + i, i < I, other=0.0).to(tl.float32)
    for step in tl.range(0, T, num_stages=STAGES):
        t = tl.cast(step, tl.int64)
        x = row(x_ptr, t, x_t, i, I).to(tl.float32)
        delta = softplus(row(delta_ptr, t, delta_t, i, I).to(tl.float32) + bias)
        B, C = row(B_ptr, t, B_t, n, N).to(tl.float32), row(C_ptr, t, C_t, n, N).to(tl.float32)
        z = row(z_ptr, t, z_t, i, I).to(tl.float32)
        if SAVE:
            if step % CHUNK == 0:
                tl.store(states_ptr + (b * tl.cdiv(T, CHUNK) + t // CHUNK) * I * N + tile, h, inside)
        if BEGINS:
            h = tl.where(tl.load(begins_ptr + b * T + t), 0.0, h)
        if REAL:
            delta = tl.where(tl.load(real_ptr + b * T + t), delta, 0.0)     # after softplus: Δ = 0 leaves h as it is
        h = tl.exp2(delta[:, None] * A) * h + (delta * x)[:, None] * B[None, :]
        y = (tl.sum(h * C[None, :], 1) + D * x) * z * tl.sigmoid(z)
        tl.store(y_ptr + (b * T + t) * I + i, y.to(y_ptr.dtype.element_ty), i < I)
    tl.store(last_ptr + b * I * N + tile, h, inside)


# ---- the operation as torch sees it

@torch.library.custom_op("nanollm::scan", mutates_args=())
def scan_op(x: Tensor, delta: Tensor, bias: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, h: Tensor,
            begins: Tensor | None, real: Tensor | None, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y, the last h, and the state before every CHUNK-th token (empty unless save)."""
    (batch, T, I), N = x.shape, A.shape[1]
    y, last, states = scan_fake(x, delta, bias, A, B, C, D, z, h, begins, real, save)
    meta = tuned("scan", N, x.device)
    strides = [stride for tensor in (x, delta, B, C, z) for stride in tensor.stride()[:2]]
    with torch.cuda.device_of(x):
        forward_kernel[(batch * triton.cdiv(I, meta["CHANNELS"]),)](
            x, delta, bias, A, B, C, D, z, h, begins, real, y, last, states, T, I, N, *strides,
            BEGINS=begins is not None, REAL=real is not None, SAVE=save, STATES=triton.next_power_of_2(N), **meta)
    return y, last, states


@scan_op.register_fake
def scan_fake(x, delta, bias, A, B, C, D, z, h, begins, real, save):
    (batch, T, _), chunk = x.shape, tuned("scan", int(A.shape[1]), x.device)["CHUNK"]
    kept = (batch, (T + chunk - 1) // chunk, *A.shape) if save else (0,)
    return x.new_empty(x.shape), h.new_empty(h.shape), h.new_empty(kept)


@torch.library.custom_op("nanollm::scan_backward", mutates_args=())
def scan_backward_op(
    dy: Tensor, dlast: Tensor | None, x: Tensor, delta: Tensor, bias: Tensor, A: Tensor, B: Tensor, C: Tensor,
    D: Tensor, z: Tensor, begins: Tensor | None, real: Tensor | None, states: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, δ, bias, A, B, C, D, z and h. dlast: that of the last h, None for zero."""
    (batch, T, I), N = x.shape, A.shape[1]
    meta, chunk = tuned("scan_backward", N, x.device), tuned("scan", N, x.device)["CHUNK"]
    blocks = triton.cdiv(I, meta["CHANNELS"])
    dx, ddelta, dz = (x.new_empty(x.shape) for _ in range(3))
    dA, dh = (A.new_empty(batch, I, N) for _ in range(2))
    dbias, dD = (A.new_empty(batch, I) for _ in range(2))
    dB, dC = (A.new_empty(blocks, batch, T, N) for _ in range(2))
    scratch = A.new_empty(batch * blocks, chunk, meta["CHANNELS"], triton.next_power_of_2(N))
    strides = [stride for tensor in (x, delta, B, C, z) for stride in tensor.stride()[:2]]
    with torch.cuda.device_of(x):
        backward_kernel[(batch * blocks,)](
            dy, dlast, x, delta, bias, A, B, C, D, z, begins, real, states, scratch,
            dx, ddelta, dbias, dA, dB, dC, dD, dz, dh, T, I, N, *strides,
            BEGINS=begins is not None, REAL=real is not None, LAST=dlast is not None, CHUNK=chunk,
            STATES=triton.next_power_of_2(N), **meta)
    return (dx, ddelta, dbias.sum(0).to(bias.dtype), dA.sum(0), dB.sum(0).to(B.dtype), dC.sum(0).to(C.dtype),
            dD.sum(0).to(D.dtype), dz, dh)


@scan_backward_op.register_fake
def _(dy, dlast, x, delta, bias, A, B, C, D, z, begins, real, states):
    dh = A.new_empty(x.shape[0], *A.shape)
    return *(like.new_empty(like.shape) for like in (x, delta, bias, A, B, C, D, z)), dh


def _save(ctx, inputs, output):
    x, delta, bias, A, B, C, D, z, _, begins, real, _ = inputs
    ctx.save_for_backward(x, delta, bias, A, B, C, D, z, begins, real, output[2])
    ctx.set_materialize_grads(False)                            # the kept states have no gradient: no zeros for them


def _backward(ctx, dy, dlast, _):
    x, *rest = ctx.saved_tensors
    dy = torch.zeros_like(x, memory_format=torch.contiguous_format) if dy is None else dy.contiguous()
    return *scan_backward_op(dy, None if dlast is None else dlast.contiguous(), x, *rest), None, None, None


scan_op.register_autograd(_backward, setup_context=_save)


def _refuses(x: Tensor, delta: Tensor, bias: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, h: Tensor,
             begins: Tensor | None = None, real: Tensor | None = None) -> str | None:
    if x.ndim != 3 or x.numel() == 0 or A.ndim != 2:
        shapes = f"{tuple(x.shape)} and {tuple(A.shape)}"
        return f"x and A have shapes {shapes}, expected (B, T, I) and (I, N), none of them 0"
    (batch, T, I), N = x.shape, A.shape[1]
    tokens, parts = (batch, T, I), (batch, T, N)
    expected = {"delta": (delta, tokens), "bias": (bias, (I,)), "A": (A, (I, N)), "B": (B, parts), "C": (C, parts),
                "D": (D, (I,)), "z": (z, tokens), "h": (h, (batch, I, N)), "begins": (begins, (batch, T)),
                "real": (real, (batch, T))}
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tensor.shape != shape:
            return f"{name} has shape {tuple(tensor.shape)}, expected {shape}"
    for name, tensor in (("delta", delta), ("z", z)):
        if tensor.dtype != x.dtype:
            return f"{name} is {str(tensor.dtype)[6:]}, expected {str(x.dtype)[6:]} as x"
    for name, tensor in (("A", A), ("h", h)):
        if tensor.dtype != torch.float32:
            return f"{name} is {str(tensor.dtype)[6:]}, expected float32"
    for name, mask in (("begins", begins), ("real", real)):
        if mask is not None and mask.dtype != torch.bool:
            return f"{name} is {str(mask.dtype)[6:]}, expected bool"
    if N > largest("scan") or N == 0:
        return f"{N} states a channel, supported are 1 to {largest('scan')}"
    return unlike(x, delta=delta, bias=bias, A=A, B=B, C=C, D=D, z=z, h=h, begins=begins, real=real)


@operation(_refuses)
def mamba_scan(x: Tensor, delta: Tensor, bias: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, h: Tensor,
               begins: Tensor | None = None, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Shapes at the head of the file; δ before bias and softplus → y in the dtype of x, and the last h."""
    rows = [tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (x, delta, B, C, z)]
    x, delta, B, C, z = rows
    bias, A, D, h = (tensor.contiguous() for tensor in (bias, A, D, h))
    begins, real = (None if mask is None else mask.contiguous() for mask in (begins, real))
    save = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*rows, bias, A, D, h))
    return scan_op(x, delta, bias, A, B, C, D, z, h, begins, real, save)[:2]
