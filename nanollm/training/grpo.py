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

The trainer divides sums of all micro-batches and ranks, so each is Σ w L over a count: w = 1/|y|, 1/T_max, 1 and the
count B, B, Σ|y|. In the first step after sampling w_t is 1 and Σ A of a group 0, so the *value* of the loss says
nothing; its gradient does. The std has the divisor G − 1, as in trl; a group whose rewards are all the same has A = 0
and teaches nothing.

Shapes: P prompts, G answers to each, B = P·G, T tokens of the longest answer.
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from nanollm.model import Decoder
from nanollm.training.rollouts import Samples, by_tokens, look

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
    count = mask.sum().clamp(min=1) if how == "dapo" else len(mask)
    return (weights(mask, how, longest) * loss).sum() / count


def weights(mask: Tensor, how: str, longest: int) -> Tensor:
    """mask (B, T) → w (B, T) of the head of the file."""
    match how:
        case "grpo":
            return mask / mask.sum(1, keepdim=True).clamp(min=1)
        case "dr_grpo":
            return mask / longest
        case "dapo":
            return mask
    raise ValueError(f"normaliser {how!r}; expected one of {', '.join(NORMALISERS)}")


# ---- as a method of the trainer: see rollouts.py

def judge(samples: Samples, rewards: Tensor, total: Callable[..., list[float]],
          options: argparse.Namespace) -> Samples:
    """Samples with the advantage of each answer at all of its tokens. rewards (N,), groups of --group."""
    found = advantages(rewards.view(-1, options.group), scale=options.normaliser != "dr_grpo").flatten()
    return samples._replace(advantage=found[:, None] * samples.mask)


def grpo_loss(model: Decoder, batch: Samples, options: argparse.Namespace) -> tuple[Tensor, dict[str, Tensor]]:
    """The method of --grpo. For the log: how many tokens are clipped, and the KL where there is a reference."""
    log_p, mask = look(model, batch, options.temperature).log_p, batch.mask
    losses = grpo(log_p, batch.old, mask, batch.advantage[:, 0], options.epsilon, options.epsilon_high, options.beta,
                  batch.reference)
    loss = (weights(mask, options.normaliser, options.max_new_tokens) * losses).sum()
    return loss, {"loss": loss.detach()} | of_tokens(log_p.detach(), batch, options)


def of_tokens(log_p: Tensor, batch: Samples, options: argparse.Namespace) -> dict[str, Tensor]:
    """What both methods say of tokens, as sums to be divided like the loss: the share that is clipped, the KL."""
    each = weights(batch.mask, "dapo" if by_tokens(options) else "grpo", options.max_new_tokens)
    ratio = torch.exp(log_p - batch.old)
    outside = torch.where(batch.advantage > 0, ratio > 1 + options.epsilon_high, ratio < 1 - options.epsilon)
    found = {"clipped": outside.float()}
    if options.beta:
        found["kl"] = k3(log_p, batch.reference)
    return {name: (each * value).sum() for name, value in found.items()}
