"""The selective scan: a linear recurrence whose coefficients each token chooses.

    h_t = exp(Δ_t A) ⊙ h_{t−1} + (Δ_t B_t) x_t          Gu & Dao 2023 (arXiv 2312.00752), eq. 2a with the
    y_t = C_t · h_t + D x_t                             discretisation of §3.6 (Ā = exp(ΔA), B̄ ≈ ΔB), Algorithm 2

Shapes: B batch, T tokens, I channels, N state per channel.
    x, Δ (B, T, I)    A (I, N), below zero    B, C (B, T, N)    D (I,)    h (B, I, N)    y (B, T, I)
Everything here is float32: exp(ΔA) in bfloat16 forgets within a few dozen tokens.

Two forms with one meaning. The definition takes T steps. The chunked form cuts T into chunks and runs all chunks side
by side, so Python takes about 2c + T/c steps instead of T:

    chunk        0 0 0 0 | 1 1 1 1 | 2 2 2 2
    pass 1       each chunk from h = 0:    what it adds (its last h), and by how much it decays what came before
    carry        h of chunk 0 → 1 → 2      T/c short steps
    pass 2       each chunk again, now from the h it really starts with

Mamba calls `mamba_scan`: the scan, with the softplus that makes Δ before it and the gate z after it.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from nanollm.ops import accelerated

# The chunked scan does twice the work in far fewer steps. It pays (benchmarks/scan.md: up to six times) from this many
CHUNKED_FROM = 32       # tokens on, while a step touches at most this many
CHUNKED_UP_TO = 32768   # numbers, B · I · N: beyond, the work itself is what takes the time


def step(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, h: Tensor) -> Tensor:
    """One token: x, Δ (B, I), B (B, N), h (B, I, N) → the next h."""
    return torch.exp(delta[..., None] * A) * h + (delta[..., None] * B[:, None]) * x[..., None]


def selective_scan(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, h: Tensor,
                   begins: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The definition. h is the state before the first token; begins (B, T) bool: forget it before this token.

    Returns y (B, T, I) and the last h.
    """
    outputs = []
    for t in range(x.shape[1]):
        if begins is not None:
            h = h * ~begins[:, t, None, None]
        h = step(x[:, t], delta[:, t], A, B[:, t], h)
        outputs.append((h @ C[:, t, :, None]).squeeze(-1))
    return torch.stack(outputs, 1) + x * D, h


def selective_scan_chunked(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, h: Tensor,
                           begins: Tensor | None = None, chunk: int = 16) -> tuple[Tensor, Tensor]:
    """The same, chunk by chunk. Signature and result of `selective_scan`, up to the order of sums."""
    batch, length, _ = x.shape
    pad = -length % chunk
    if begins is None:
        begins = torch.zeros(batch, length, dtype=torch.bool, device=x.device)

    def cut(z: Tensor) -> Tensor:       # Δ = 0 leaves h as it is, so padding at the end changes nothing
        return F.pad(z, (0, 0, 0, pad)).reshape(batch * (length + pad) // chunk, chunk, -1)

    xs, deltas, Bs, Cs, starts = cut(x), cut(delta), cut(B), cut(C), cut(begins[..., None])[..., 0]

    added = x.new_zeros(len(xs), *A.shape)
    for t in range(chunk):                                                              # pass 1
        added = step(xs[:, t], deltas[:, t], A, Bs[:, t], added * ~starts[:, t, None, None])
    decay = torch.exp(deltas.sum(1)[..., None] * A) * ~starts.any(1)[:, None, None]

    added, decay = added.unflatten(0, (batch, -1)), decay.unflatten(0, (batch, -1))     # (B, c, I, N)
    before = []
    for c in range(added.shape[1]):                                                     # carry
        before.append(h)
        h = decay[:, c] * h + added[:, c]

    y, _ = selective_scan(xs, deltas, A, Bs, Cs, D, torch.stack(before, 1).flatten(0, 1), starts)              # pass 2
    return y.reshape(batch, length + pad, -1)[:, :length], h


@accelerated
def mamba_scan(x: Tensor, delta: Tensor, bias: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, h: Tensor,
               begins: Tensor | None = None, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The middle of Mamba: Δ = softplus(delta + bias), the scan, and its result times silu(z), rounded once.

    z (B, T, I), bias (I,); x, delta, z, B, C in the working dtype, A and h float32.
    real (B, T) bool: False is padding, which leaves h as it is.
    """
    delta = F.softplus(delta.float() + bias.float())
    if real is not None:
        delta = delta * real[..., None]                                                 # Δ = 0: the state stays
    chunked = x.shape[1] >= CHUNKED_FROM and h.numel() <= CHUNKED_UP_TO
    scan = selective_scan_chunked if chunked else selective_scan
    y, h = scan(x.float(), delta, A, B.float(), C.float(), D.float(), h, begins)
    return (y * F.silu(z.float())).to(x.dtype), h
