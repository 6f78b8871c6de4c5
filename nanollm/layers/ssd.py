"""State-space duality: a scan whose decay is one number a head, and which is therefore also a masked matrix product.

    h_t = exp(Δ_t A) h_{t−1} + Δ_t x_t ⊗ B_t            Dao & Gu 2024 (arXiv 2405.21060), eq. 2 with A a scalar times
    y_t = h_t C_t + D x_t                               the identity (§2.4), discretised as in Mamba (exp(ΔA), ΔB)

    y = ((C Bᵀ) ∘ L) (Δ x) + D x                        §3.2, eq. 16: the same with all h written out
    L_ts = exp(Δ_{s+1} A + … + Δ_t A) for s ≤ t, else 0

Shapes: B batch, T tokens, H heads, P channels of a head, G groups, N state. Head h reads B and C of group h // (H/G).
    x, y (B, T, H, P)    Δ (B, T, H), not below zero    A (H,), below zero    B, C (B, T, G, N)    D (H,)
    h (B, H, P, N) float32
Everything is computed in float32, y returns in the dtype of x.

Two forms with one meaning. The recurrence takes T steps. The chunked form (§6, listing 1) cuts T into chunks of Q and
takes Q × Q products:

             s →  chunk 0   chunk 1   chunk 2
    t  chunk 0    L
    ↓  chunk 1    ▒         L                       L   inside a chunk: the matrix form
       chunk 2    ▒         ▒         L             ▒   across chunks: through the state h between them, T/Q short steps

L is the exponential of the sum of Δ A from s to t. The difference of two running sums from the start would be that sum
too, but with the rounding error of the long sums: so `segment_sums` adds for each pair just the terms between (listing
1).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from nanollm.ops import accelerated

CHUNKED_FROM = 32       # tokens on, products of chunks take less time than steps


def ssd_sequential(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, h: Tensor,
                   begins: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The recurrence, token by token; arguments and results are those of `ssd`."""
    dtype, x = x.dtype, x.float()
    B, C = (z.float().repeat_interleave(x.shape[2] // z.shape[2], 2) for z in (B, C))      # (B, T, H, N)
    decay = torch.exp(delta.float() * A.float())                                            # (B, T, H)
    if begins is not None:
        decay = decay.masked_fill(begins[..., None], 0)                                     # 0 forgets
    outputs = []
    for t in range(x.shape[1]):
        h = decay[:, t, :, None, None] * h + (delta[:, t, :, None].float() * x[:, t])[..., None] * B[:, t, :, None]
        outputs.append((h @ C[:, t, ..., None])[..., 0])
    return (torch.stack(outputs, 1) + D.float()[:, None] * x).to(dtype), h


def segment_sums(a: Tensor, starts: Tensor) -> Tensor:
    """a (…, Q) → (…, Q, Q): a_{s+1} + … + a_t at [t, s]; −∞ where s > t or where a document starts after s, up to t.

    starts (…, Q) bool. Each sum has only its own terms, so a step that forgets all does not blur the steps after it.
    """
    Q = a.shape[-1]
    later = torch.ones(Q, Q, dtype=torch.bool, device=a.device).tril(-1)                    # [k, s]: k after s
    sums = (a[..., :, None] * later).cumsum(-2)
    document = starts.cumsum(-1)
    return sums.masked_fill((document[..., :, None] != document[..., None, :]) | later.T, -torch.inf)


def ssd_chunked(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, h: Tensor,
                begins: Tensor | None = None, chunk: int = 64) -> tuple[Tensor, Tensor]:
    """The same, chunk by chunk: c chunks of Q tokens. Arguments and results are those of `ssd`."""
    dtype, (batch, length, H, _), x = x.dtype, x.shape, x.float()
    if begins is None:
        begins = torch.zeros(batch, length, dtype=torch.bool, device=x.device)
    pad, per_group = -length % chunk, H // B.shape[2]

    def cut(z: Tensor) -> Tensor:       # Δ = 0 leaves h as it is, so padding at the end changes nothing
        return F.pad(z, (0, 0) * (z.ndim - 2) + (0, pad)).unflatten(1, (-1, chunk))         # (B, c, Q, …)

    xs, deltas, starts = cut(x), cut(delta.float()), cut(begins)
    Bs, Cs = (cut(z.float()).repeat_interleave(per_group, 3) for z in (B, C))               # (B, c, Q, H, N)
    u = deltas[..., None] * xs                                                              # Δ x

    a = (deltas * A.float()).transpose(2, 3)                                                # (B, c, H, Q)
    L = torch.exp(segment_sums(a, starts[:, :, None]))                                      # (B, c, H, Q, Q)
    inside = torch.einsum("bcthn,bcshn,bchts,bcshp->bcthp", Cs, Bs, L, u)

    document = starts.cumsum(-1)[:, :, None]                                                # (B, c, 1, Q)
    from_start = torch.exp(a.cumsum(-1)).masked_fill(document > 0, 0)                       # of h, up to each token
    to_end = L[..., -1, :]                                                                  # from each token on
    added = torch.einsum("bchs,bcshp,bcshn->bchpn", to_end, u, Bs)
    before = []
    for c in range(added.shape[1]):
        before.append(h)
        h = from_start[:, c, :, -1, None, None] * h + added[:, c]
    across = torch.einsum("bcthn,bchpn,bcht->bcthp", Cs, torch.stack(before, 1), from_start)
    y = (inside + across).flatten(1, 2)[:, :length] + D.float()[:, None] * x
    return y.to(dtype), h


@accelerated
def ssd(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, h: Tensor,
        begins: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """y (B, T, H, P) in the dtype of x, and the last h (B, H, P, N).

    delta comes after the softplus; 0 leaves the state as it is. h is the state before the first token; begins (B, T)
    bool: forget it before this token.
    """
    form = ssd_chunked if x.shape[1] >= CHUNKED_FROM else ssd_sequential
    return form(x, delta, A, B, C, D, h, begins)
