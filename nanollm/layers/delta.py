"""The gated delta rule: a state that is a linear map from keys to values, corrected by each token and slowly forgotten.

    S_t = α_t S_{t−1} (I − β_t k_t k_tᵀ) + β_t v_t k_tᵀ        Yang, Kautz & Hatamizadeh 2024 (arXiv 2412.06464), eq. 10
    o_t = S_t q_t

Multiplied out, a token writes only what the state does not yet answer to its key. With |k| = 1 and β = 1 the state then
answers with v exactly, and keys at right angles to k are left as they were:

    u_t = β_t (v_t − α_t S_{t−1} k_t)       S_t = α_t S_{t−1} + u_t k_tᵀ                         (1)

Shapes: B batch, T tokens, H heads, G key heads, N width of q and k, P width of v. Head h reads q and k of h // (H/G).
    q, k (B, T, G, N)    v, o (B, T, H, P)    log α (B, T, H), not above zero    β (B, T, H)    S (B, H, P, N) float32
Everything is computed in float32, o returns in the dtype of v.

Two forms with one meaning. The recurrence takes T steps. Or T is cut into chunks of Q tokens. If the u were known, (1)
would be the scan of ssd.py with u, k, q for Δx, B, C, which in a chunk that begins with S is

    S_t = Γ_t S + Σ_{s≤t} L_ts u_s k_sᵀ      L_ts = α_{s+1} ⋯ α_t for s ≤ t, else 0      Γ_t = α_1 ⋯ α_t        (2)

The u follow from it. With (2) for α_t S_{t−1} = S_t − u_t k_tᵀ, (1) says of each token

    u_t + β_t Σ_{s<t} L_ts (k_t · k_s) u_s = β_t v_t − β_t Γ_t S k_t

Row by row that is a triangular system with ones on its diagonal. It has a part that knows nothing of S, so one
solution for all chunks side by side will do (the WY representation; §3.3):

    (I + A) [W  Y] = [β v   β Γ k]      A_ts = β_t L_ts (k_t · k_s) for s < t, else 0      U = W − Y Sᵀ          (3)

and S goes from chunk to chunk in T/Q short steps, the one part that has to wait for itself (`delta_walk`):

    o = Γ q Sᵀ + ((q kᵀ) ∘ L) U              S ← Γ_Q S + Uᵀ (L_Q · k)                                              (4)

L comes from `segment_sums`, so a strong decay does not blur the tokens after it, and all its exponents are at most 0.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from nanollm.layers.ssd import segment_sums
from nanollm.ops import accelerated

CHUNKED_FROM = 16       # tokens on, products of chunks take less time than steps


def delta_rule(q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, beta: Tensor, S: Tensor,
               begins: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """o (B, T, H, P) in the dtype of v, and the last S (B, H, P, N).

    log α and β of 0 leave the state as it is. S is the state before the first token; begins (B, T) bool: forget it
    before this token.
    """
    form = delta_rule_chunked if v.shape[1] >= CHUNKED_FROM else delta_rule_sequential
    return form(q, k, v, log_alpha, beta, S, begins)


def delta_rule_sequential(q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, beta: Tensor, S: Tensor,
                          begins: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The recurrence, token by token, eq. (1); arguments and results are those of `delta_rule`."""
    dtype, v, beta, alpha = v.dtype, v.float(), beta.float(), torch.exp(log_alpha.float())
    q, k = (z.float().repeat_interleave(v.shape[2] // z.shape[2], 2) for z in (q, k))       # (B, T, H, N)
    if begins is not None:
        alpha = alpha.masked_fill(begins[..., None], 0)                                     # 0 forgets
    outputs = []
    for t in range(v.shape[1]):
        S = alpha[:, t, :, None, None] * S
        u = beta[:, t, :, None] * (v[:, t] - (S @ k[:, t, ..., None])[..., 0])              # (B, H, P)
        S = S + u[..., None] * k[:, t, :, None]
        outputs.append((S @ q[:, t, ..., None])[..., 0])
    return torch.stack(outputs, 1).to(dtype), S


def delta_rule_chunked(q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, beta: Tensor, S: Tensor,
                       begins: Tensor | None = None, chunk: int = 64) -> tuple[Tensor, Tensor]:
    """The same, chunk by chunk: c chunks of Q tokens, eq. (2) … (4)."""
    dtype, (batch, length, H, _) = v.dtype, v.shape
    if begins is None:
        begins = torch.zeros(batch, length, dtype=torch.bool, device=v.device)
    pad = -length % chunk

    def cut(z: Tensor) -> Tensor:       # log α = β = 0 leaves S as it is, so padding at the end changes nothing
        z = F.pad(z, (0, 0) * (z.ndim - 2) + (0, pad)).unflatten(1, (-1, chunk))            # (B, c, Q, …)
        return z if z.ndim == 3 else z.transpose(2, 3)                                      # (B, c, H, Q, …)

    q, k = (cut(z.float().repeat_interleave(H // z.shape[2], 2)) for z in (q, k))           # (B, c, H, Q, N)
    v, beta, a, starts = cut(v.float()), cut(beta.float())[..., None], cut(log_alpha.float()), cut(begins)

    L = torch.exp(segment_sums(a, starts[:, :, None]))                                      # (B, c, H, Q, Q)
    document = starts.cumsum(-1)[:, :, None]                                                # (B, c, 1, Q)
    gamma = torch.exp(a.cumsum(-1)).masked_fill(document > 0, 0)[..., None]                 # Γ, (B, c, H, Q, 1)

    A = beta * L * (k @ k.mT)                                                               # what is read is s < t
    right = torch.cat([beta * v, beta * gamma * k], -1)
    WY = torch.linalg.solve_triangular(A, right, upper=False, unitriangular=True)

    U, before, S = delta_walk(WY, L[..., -1, :, None] * k, gamma[..., -1, 0], S)
    o = gamma * q @ before.mT + (L * (q @ k.mT)) @ U
    return o.transpose(2, 3).flatten(1, 2)[:, :length].to(dtype), S


@accelerated
def delta_walk(WY: Tensor, K: Tensor, gamma: Tensor, S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (B, c, H, Q, P), the S before each chunk (B, c, H, P, N), and the last S (B, H, P, N): eq. (3) and (4).

    WY (B, c, H, Q, P + N) has W beside Y. K (B, c, H, Q, N) is L_Q · k, gamma (B, c, H) is Γ_Q.
    """
    W, Y = WY.split([S.shape[-2], S.shape[-1]], -1)
    corrections, before = [], []
    for c in range(WY.shape[1]):
        before.append(S)
        U = W[:, c] - Y[:, c] @ S.mT
        S = gamma[:, c, :, None, None] * S + U.mT @ K[:, c]
        corrections.append(U)
    return torch.stack(corrections, 1), torch.stack(before, 1), S
