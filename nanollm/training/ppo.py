"""PPO for a decoder: a value for each token says what reward is still to come, and steps are kept small by clipping.

    r_t  = −β (log π_old(y_t) − log π_ref(y_t)),  + R at the last token    Ouyang et al. 2022 (arXiv 2203.02155) eq. 2
    δ_t  = r_t + γ V_{t+1} − V_t
    A_t  = δ_t + γλ A_{t+1}                       GAE: Schulman et al. 2015 (arXiv 1506.02438) eq. 16
    G_t  = A_t + V_t                              what the value of t is to become

    policy     −min(w_t A_t, clip(w_t, 1 − ε, 1 + ε) A_t)     Schulman et al. 2017 (arXiv 1707.06347) eq. 7;
                                                             `clipped` of grpo.py
    value      ½ max((V − G)², (V_old + clip(V − V_old, −ε, ε) − G)²)

V_{t+1} behind the last token is 0 where nothing more is to come. In the trainer that is always so, also behind an
answer that was cut at the longest length: R is the reward of the answer as it stands, and it is paid there. With the
value in its place, as for a game that is interrupted, a cut answer would be worth R + V, and V would learn to be R + V:
it grows, and what is learnt is to be cut. That is the first of the usual mistakes; the others are a KL that is computed
from the new model (it is part of the reward, so a constant), and advantages that are whitened with the padding.

Shapes: B answers, T tokens of the longest.
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from nanollm.init import zero
from nanollm.model import Decoder
from nanollm.training.grpo import clipped, of_tokens
from nanollm.training.reward import Score
from nanollm.training.rollouts import Samples, look


def token_rewards(reward: Tensor, log_p: Tensor, reference: Tensor, mask: Tensor, beta: float) -> Tensor:
    """R (B,), log π_old and log π_ref (B, T) → r (B, T): the KL at every token, R at the last. 0 where mask is."""
    rewards = -beta * (log_p - reference) * mask
    last = mask.sum(1).long() - 1
    return rewards.scatter_add(1, last[:, None], reward[:, None])


def gae(rewards: Tensor, values: Tensor, mask: Tensor, after: Tensor, gamma: float = 1.0,
        lam: float = 0.95) -> tuple[Tensor, Tensor]:
    """r, V, mask (B, T), after (B,) = V behind the last token, 0 where the answer ended → A, G (B, T), 0 where mask is.
    """
    found, following, advantage = torch.zeros_like(values), after, torch.zeros_like(after)
    for t in reversed(range(values.shape[1])):
        real = mask[:, t].bool()
        delta = rewards[:, t] + gamma * following - values[:, t]
        advantage = torch.where(real, delta + gamma * lam * advantage, advantage)
        following = torch.where(real, values[:, t], following)
        found[:, t] = torch.where(real, advantage, 0.0)
    return found, (found + values) * mask


def whitened(advantage: Tensor, mask: Tensor, total: Callable[..., list[float]] = lambda *sums: [*sums]) -> Tensor:
    """A (B, T) with mean 0 and variance 1 over all tokens of mask, 0 elsewhere. total: sums over ranks."""
    real = advantage[mask.bool()].double()
    count, first, second = total(len(real), real.sum().item(), real.square().sum().item())
    mean = first / count
    variance = max(0.0, second - count * mean**2) / max(count - 1, 1)
    return (advantage - mean) / (variance + 1e-8) ** 0.5 * mask


def value_loss(value: Tensor, old: Tensor, aim: Tensor, clip: float) -> Tensor:
    """V, V_old, G (B, T) → (B, T). The worse of two, so that a value does not move by more than `clip` for a gain."""
    near = old + (value - old).clamp(-clip, clip)
    return 0.5 * torch.max((value - aim).square(), (near - aim).square())


# ---- as a method of the trainer: see rollouts.py

class Value(Score):
    """V_t = v · h_t, h_t what the head reads at the token before t. It begins as 0: no reward is expected yet."""
    INIT = {"weight": zero}


def add_value(model: Decoder) -> Decoder:
    """Give a decoder a Value as `model.value`, in place, unless it has one, and return it."""
    if not hasattr(model, "value"):
        with model.embed.weight.device:
            model.value = Value(model.config.dim)
        if not model.value.weight.is_meta:
            torch.nn.init.zeros_(model.value.weight)
    return model


def judge(samples: Samples, rewards: Tensor, total: Callable[..., list[float]],
          options: argparse.Namespace) -> Samples:
    """Samples with the advantage of each token, and what its value is to become. rewards (N,)."""
    mask = samples.mask
    reward = token_rewards(rewards, samples.old, samples.reference, mask, options.beta)
    advantage, aims = gae(reward, samples.values, mask, torch.zeros_like(rewards), lam=options.gae_lambda)
    return samples._replace(advantage=whitened(advantage, mask, total), aims=aims)


def ppo_loss(model: Decoder, batch: Samples, options: argparse.Namespace) -> tuple[Tensor, dict[str, Tensor]]:
    """The method of --ppo: a mean over tokens. For the log also both parts of the loss."""
    seen, mask = look(model, batch, options.temperature), batch.mask
    policy = (clipped(seen.log_p, batch.old, batch.advantage, options.epsilon, options.epsilon_high) * mask).sum()
    value = (value_loss(seen.values, batch.values, batch.aims, options.epsilon) * mask).sum()
    loss = policy + options.value_weight * value
    said = {"loss": loss.detach(), "policy_loss": policy.detach(), "value_loss": value.detach()}
    return loss, said | of_tokens(seen.log_p.detach(), batch, options)
