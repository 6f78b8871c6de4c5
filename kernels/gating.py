"""The middle of a gated feed-forward: one half decides how much of the other passes.

    y = act(g) ⊙ u          SwiGLU with act = silu, GeGLU with gelu; Shazeer 2020 (arXiv 2002.05202)

Shapes: g = gate x and u = up x, alike and of any shape, n numbers each;   y as they are.   act: activation.py.

Roofline. A few FLOPs and at most two exp2 a number: bytes are all. In bf16
    forward    read g, u, write y              6n
    backward   read dy, g, u, write dg, du    10n        act(g) is computed again, which is cheaper than to keep it

    one program = BLOCK numbers, wherever they stand

        g  ┌─────────┬─────────┬─────────┬──  rows have no meaning here: one flat grid over contiguous memory is never
        u  │ BLOCK   │ BLOCK   │ BLOCK   │    at odds with a width, and each thread moves 16 bytes at a time
        y  └─────────┴─────────┴─────────┴──

Backward.   dg = dy · u · act′(g)        du = dy · act(g)        both in one pass, as new tensors: g and u stay.

Computed in float32 and rounded once, where PyTorch rounds act(g) too.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.activation import ACTIVATIONS, activated, slope
from kernels.common import operation, tuned, unlike


@triton.jit
def forward_kernel(gate_ptr, up_ptr, y_ptr, n, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK of the n numbers."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_ptr + at, at < n, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, at < n, other=0.0).to(tl.float32)
    y = activated(gate, ACTIVATION) * up
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), at < n)


@triton.jit
def backward_kernel(dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, n, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """Both gradients of BLOCK of the n numbers."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    dy = tl.load(dy_ptr + at, at < n, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + at, at < n, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, at < n, other=0.0).to(tl.float32)
    dgate = dy * up * slope(gate, ACTIVATION)
    dup = dy * activated(gate, ACTIVATION)
    tl.store(dgate_ptr + at, dgate.to(dgate_ptr.dtype.element_ty), at < n)
    tl.store(dup_ptr + at, dup.to(dup_ptr.dtype.element_ty), at < n)


# ---- the operation as torch sees it

@torch.library.custom_op("nanollm::gated", mutates_args=())
def gated_op(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """y. Tuned by the bytes of a number: programs move about as many, whatever the dtype."""
    y, n, meta = gate.new_empty(gate.shape), gate.numel(), tuned("gated", gate.itemsize, gate.device)
    with torch.cuda.device_of(gate):
        forward_kernel[(triton.cdiv(n, meta["BLOCK"]),)](gate, up, y, n, ACTIVATION=activation, **meta)
    return y


@gated_op.register_fake
def _(gate, up, activation):
    return gate.new_empty(gate.shape)


@torch.library.custom_op("nanollm::gated_backward", mutates_args=())
def gated_backward_op(dy: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """dg, du."""
    dgate, dup, n = gate.new_empty(gate.shape), up.new_empty(up.shape), gate.numel()
    meta = tuned("gated", gate.itemsize, gate.device)
    with torch.cuda.device_of(gate):
        backward_kernel[(triton.cdiv(n, meta["BLOCK"]),)](dy, gate, up, dgate, dup, n, ACTIVATION=activation, **meta)
    return dgate, dup


@gated_backward_op.register_fake
def _(dy, gate, up, activation):
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _save(ctx, inputs, output):
    gate, up, ctx.activation = inputs
    ctx.save_for_backward(gate, up)


def _backward(ctx, dy):
    return *gated_backward_op(dy.contiguous(), *ctx.saved_tensors, ctx.activation), None


gated_op.register_autograd(_backward, setup_context=_save)


def _refuses(gate: Tensor, up: Tensor, activation: str) -> str | None:
    if activation not in ACTIVATIONS:
        return f"activation is {activation!r}, expected one of {', '.join(ACTIVATIONS)}"
    if gate.shape != up.shape or gate.dtype != up.dtype:
        return f"gate and up must be alike, they are {tuple(gate.shape)} {gate.dtype} and {tuple(up.shape)} {up.dtype}"
    if gate.numel() == 0:
        return "there is nothing in gate"
    if not gate.is_contiguous() or not up.is_contiguous():
        return "gate and up must be contiguous"
    return unlike(gate, up=up)


@operation(_refuses)
def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """act(gate) ⊙ up, gate and up of any one shape, in their dtype."""
    return gated_op(gate, up, activation)
