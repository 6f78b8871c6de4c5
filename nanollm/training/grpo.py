"""GRPO: several answers to one prompt are rewarded, and each is learnt by how much it is better than its group.

    A_i  = (R_i − mean R) / (std R + 1e-4)                    over the G answers to one prompt: no value model
    w_t  = π(y_t) / π_old(y_t)                                what the sampler had, and what the model has now
    L_t  = −min(w_t A, clip(w_t, 1 − ε_low, 1 + ε_high) A) + β k_t                 for every token of an answer
    k_t  = exp(d) − d − 1,   d = log π_ref(y_t) − log π(y_t)                       ≥ 0, and KL(π ‖ π_ref) on average

Shao et al. 2024 (arXiv 2402.03300) eq. 3-4, §4.1. How the L_t of B answers become one number is where methods differ,
and decides whether long answers count for more:

    grpo       1/B Σ_i 1/|y_i| Σ_t L_t                        every answer alike: a long wrong one costs little a token
    dr_grpo    1/(B·T_max) Σ_i Σ_t L_t,  and A not over std   Liu et al. 2025 (arXiv 2503.20783) §3
    dapo       1/Σ|y_i| Σ_i Σ_t L_t                           every token alike, and ε_high above ε_low: 0.28 and 0.2
                                                              Yu et al. 2025 (arXiv 2503.14476) eq. 8

In the first step after sampling w_t is 1 and Σ A of a group 0, so the *value* of the loss says nothing; its gradient
does. The std has the divisor G − 1, as in trl; a group whose rewards are all the same has A = 0 and teaches nothing.

Shapes: P prompts, G answers to each, B = P·G, T tokens of the longest answer.
"""

import torch
from torch import Tensor

NORMALISERS = ("grpo", "dr_grpo", "dapo")


def advantages(rewards: Tensor, scale: bool = True) -> Tensor:
    """R (P, G) → A (P, G). scale: over the standard deviation; not so in dr_grpo."""
    centred = rewards - rewards.mean(1, keepdim=True)
    return centred / (rewards.std(1, keepdim=True) + 1e-4) if scale else centred


def clipped(log_p: Tensor, old: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    """log π, log π_old (B, T), A (B, 1) or (B, T) → the first term of L (B, T). The gradient goes through log π.

    Also PPO's (Schulman et al. 2017, arXiv 1707.06347, eq. 7), there with low = high."""
    ratio = torch.exp(log_p - old)
    return -torch.min(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def k3(log_p: Tensor, reference: Tensor) -> Tensor:
    """log π, log π_ref (B, T) → k (B, T): an estimate of the KL that is never below 0 (Schulman 2020)."""
    d = reference - log_p
    return torch.exp(d) - d - 1


def grpo(log_p: Tensor, old: Tensor, mask: Tensor, advantage: Tensor, low: float = 0.2, high: float = 0.2,
         beta: float = 0.0, reference: Tensor | None = None) -> Tensor:
    """L (B, T), 0 where mask (B, T) is: behind an answer. advantage: A (B,)."""
    loss = clipped(log_p, old, advantage[:, None], low, high)
    if reference is not None and beta:
        loss = loss + beta * k3(log_p, reference)
    return loss * mask


def normalised(loss: Tensor, mask: Tensor, how: str, longest: int) -> Tensor:
    """L, mask (B, T) → one number. longest: T_max, the most tokens that an answer may have."""
    match how:
        case "grpo":
            return (loss.sum(1) / mask.sum(1).clamp(min=1)).mean()
        case "dr_grpo":
            return loss.sum() / (len(loss) * longest)
        case "dapo":
            return loss.sum() / mask.sum().clamp(min=1)
    raise ValueError(f"normaliser {how!r}; expected one of {', '.join(NORMALISERS)}")
