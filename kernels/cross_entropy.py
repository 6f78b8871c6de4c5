"""The head of a decoder and its loss in one: logits exist for a few thousand rows at a time, and leave as gradients.

    logits  l = x Wᵀ,   soft-capped  l = c tanh(x Wᵀ / c)  where the config says so (Gemma-2, arXiv 2408.00118 §2)
    log Z = log Σ_v exp(l_v)        nats = log Z − l_y
    total = Σ_rows nats + z (log Z)²                               Chowdhery et al. 2022 (arXiv 2204.02311) §5

Shapes: n rows, D width, V vocabulary, C rows of a chunk.
    x (n, D), W (V, D), y (n,) int64 with −100 for none → three float32 sums.

Roofline, in bf16. Three products of 2nDV FLOPs each are nearly all of it; the kernel reads the logits twice and writes
them once.
    FLOPs      6·n·D·V with gradients, 2·n·D·V without            exp2    2·n·V
    bytes      6·n·V in the kernel, 6·n·V in the products (one write, two reads)
    n = 4096, D = 4096, V = 128256: 16.3 ms and 1.5 ms

        x ┌──── D ────┐              logits, one buffer for all chunks              one program = one row of the buffer
        C │  chunk 0  │    mm        ┌────────────── V ──────────────┐    pass 1    BLOCK → BLOCK    maximum and sum
          ├───────────┤  ─ · Wᵀ ─→ C │ l   l   l   l   l   l   l   l │    pass 2    BLOCK → BLOCK    l becomes ∂total/∂l
          │  chunk 1  │              └───────────────────────────────┘
          ├───────────┤                 │   · W          ─→ dx of the chunk         C, V → C, D
          │    …      │                 └─ᵀ · x of chunk ─→ dW, added up            V, C → V, D    in float32

Memory. Never more than C × V logits at once, in the working dtype, whatever n is; beside them dx, and dW in float32. In
16 bits a sum over chunks that is rounded at each would lose what is small against it, which is most of what a rare
token learns.

Gradient. With p = softmax(l), ∂nats/∂l = p − 1[v = y] and ∂log Z/∂l = p, so

    ∂total/∂l = p (1 + 2 z log Z) − 1[v = y],    times 1 − (l/c)² through the soft cap,    0 in rows without a target

computed in float32 and rounded once, where it is stored. The loss is a scalar, so all of this can be done in the
forward pass, while the logits are there: the backward only multiplies by the gradient that comes in. Where no gradient
is wanted pass 2 and two products are left out.

Logits are rounded to the working dtype, as PyTorch rounds them. A target that is no row of W gives NaN: to refuse it
one would have to wait for the device. The rows' nats and squares are added by torch, in float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.common import largest, operation, tuned, unlike

NONE = tl.constexpr(-100)                   # the target of a row that has none


@triton.jit
def capped(x, cap):
    """cap · tanh(x / cap), by tanh u = 2 σ(2u) − 1."""
    return cap * (2.0 * tl.sigmoid(2.0 * x / cap) - 1.0)


@triton.jit
def row_kernel(logits_ptr, targets_ptr, nats_ptr, squares_ptr, V, z, cap,
               CAP: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr):
    """−log p(y) and (log Z)² of one row; with GRADIENT its logits become their gradient."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    logits_ptr += row * V
    columns = tl.arange(0, BLOCK)

    top = -3.4e38                           # lower than any logit, and finite: −∞ less −∞ would be NaN
    total = 0.0
    for start in range(0, V, BLOCK):
        x = tl.load(logits_ptr + start + columns, start + columns < V, other=-float("inf")).to(tl.float32)
        if CAP:
            x = tl.where(start + columns < V, capped(x, cap), -float("inf"))
        above = tl.maximum(top, tl.max(x, 0))
        total = total * tl.exp(top - above) + tl.sum(tl.exp(x - above), 0)
        top = above
    log_z = top + tl.log(total)

    real = target != NONE
    said = tl.load(logits_ptr + target, real & (target >= 0) & (target < V), other=float("nan")).to(tl.float32)
    if CAP:
        said = capped(said, cap)
    tl.store(nats_ptr + row, tl.where(real, top - said + tl.log(total), 0.0))       # top first: of two large numbers
    tl.store(squares_ptr + row, tl.where(real, log_z * log_z, 0.0))

    if GRADIENT:
        tl.debug_barrier()                  # every thread has read the target's logit before any overwrites it
        weight = (1.0 + 2.0 * z * log_z) / total
        for start in range(0, V, BLOCK):
            x = tl.load(logits_ptr + start + columns, start + columns < V, other=0.0).to(tl.float32)
            if CAP:
                x = capped(x, cap)
            slope = tl.exp(x - top) * weight - tl.where(start + columns == target, 1.0, 0.0)
            if CAP:
                slope *= 1.0 - (x / cap) * (x / cap)
            slope = tl.where(real, slope, 0.0)
            tl.store(logits_ptr + start + columns, slope.to(logits_ptr.dtype.element_ty), start + columns < V)


# ---- the operation as torch sees it

def add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total += a @ b, total float32, a and b in the working dtype. first: total is not read, and may hold anything."""
    if a.is_cuda:
        torch.addmm(total, a, b, out_dtype=torch.float32, beta=0 if first else 1, out=total)
    else:
        total.addmm_(a.float(), b.float(), beta=0 if first else 1)


@torch.library.custom_op("nanollm::linear_cross_entropy", mutates_args=())
def linear_cross_entropy_op(hidden: Tensor, weight: Tensor, targets: Tensor, z: float, softcap: float | None,
                            needs_dx: bool, needs_dw: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The sums of total, nats and squares; dx and dW (float32) of the first, empty where they are not needed."""
    n, V = len(hidden), len(weight)
    meta = dict(tuned("cross_entropy", V, hidden.device))
    chunk = min(n, meta.pop("ROWS"))
    buffer, targets = hidden.new_empty(chunk, V), targets.contiguous()
    nats, squares = hidden.new_empty(n, dtype=torch.float32), hidden.new_empty(n, dtype=torch.float32)
    _, dx, dw = linear_cross_entropy_fake(hidden, weight, targets, z, softcap, needs_dx, needs_dw)
    for start in range(0, n, chunk):
        rows = slice(start, min(n, start + chunk))
        x = hidden[rows]
        logits = torch.mm(x, weight.T, out=buffer[:len(x)])
        with torch.cuda.device_of(hidden):
            row_kernel[(len(x),)](logits, targets[rows], nats[rows], squares[rows], V, z, softcap or 1.0,
                                  CAP=softcap is not None, GRADIENT=needs_dx or needs_dw, **meta)
        if needs_dx:
            torch.mm(logits, weight, out=dx[rows])
        if needs_dw:
            add_product(dw, logits.T, x, first=start == 0)
    nats, squares = nats.sum(), squares.sum()
    return torch.stack([nats + z * squares, nats, squares]), dx, dw


@linear_cross_entropy_op.register_fake
def linear_cross_entropy_fake(hidden, weight, targets, z, softcap, needs_dx, needs_dw):
    dx = hidden.new_empty(hidden.shape if needs_dx else (0,))
    dw = weight.new_empty(weight.shape if needs_dw else (0,), dtype=torch.float32)
    return hidden.new_empty(3, dtype=torch.float32), dx, dw


@torch.library.custom_op("nanollm::linear_cross_entropy_backward", mutates_args=())
def linear_cross_entropy_backward_op(dtotal: Tensor, dx: Tensor, dw: Tensor) -> tuple[Tensor, Tensor]:
    """Both times dtotal, in the dtype of dx; in float32: 1 / tokens may not fit float16. No second derivative."""
    ddw = torch.mul(dw, dtotal, out=dx.new_empty(dw.shape))         # dW is large: no copy on the way
    return (dx.float() * dtotal).to(dx.dtype), ddw


@linear_cross_entropy_backward_op.register_fake
def _(dtotal, dx, dw):
    return dx.new_empty(dx.shape), dx.new_empty(dw.shape)


def _save(ctx, inputs, output):
    *_, ctx.needs_dx, ctx.needs_dw = inputs
    _, dx, dw = output
    ctx.save_for_backward(dx, dw)
    ctx.mark_non_differentiable(dx, dw)
    ctx.set_materialize_grads(False)            # else autograd would hand in zeros as large as dx and dW


def _backward(ctx, dsums, *_):
    dx, dw = linear_cross_entropy_backward_op(dsums[0], *ctx.saved_tensors)
    return dx if ctx.needs_dx else None, dw if ctx.needs_dw else None, None, None, None, None, None


linear_cross_entropy_op.register_autograd(_backward, setup_context=_save)


def _refuses(hidden: Tensor, weight: Tensor, targets: Tensor, z: float = 0.0,
             softcap: float | None = None) -> str | None:
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or 0 in (*hidden.shape, len(weight)):
        shapes = f"{tuple(hidden.shape)} and {tuple(weight.shape)}"
        return f"hidden and weight have shapes {shapes}, expected (n, D) and (V, D), at least one of each"
    if len(weight) > largest("cross_entropy"):
        return f"weight has {len(weight)} rows, supported are up to {largest('cross_entropy')}"
    if hidden.dtype != weight.dtype:
        return f"hidden and weight must be of one dtype, they are {hidden.dtype} and {weight.dtype}"
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        return f"targets are {tuple(targets.shape)} {targets.dtype}, expected ({len(hidden)},) torch.int64"
    if softcap is not None and softcap <= 0:
        return f"softcap is {softcap}, expected a positive number or None"
    return unlike(hidden, weight=weight, targets=targets)


@operation(_refuses)
def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, z: float = 0.0,
                         softcap: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """hidden (n, D), weight (V, D), targets (n,) int64 with −100 for none → three float32 sums over the targets:
    −log p(y) + z (log Z)², to be differentiated, and −log p(y) and (log Z)² by themselves, to be read."""
    wanted = torch.is_grad_enabled()
    needs_dx, needs_dw = wanted and hidden.requires_grad, wanted and weight.requires_grad
    sums, *_ = linear_cross_entropy_op(hidden, weight, targets, z, softcap, needs_dx, needs_dw)
    return sums[0], sums[1].detach(), sums[2].detach()
