"""Learning from preferences: losses on log-probabilities of two answers to a prompt x, y_w that won and y_l that lost.

With the log-ratio of the model to the reference model, which is what it was before the first step, a reward is implied:

    ρ(y) = log π(y|x) − log π_ref(y|x)        r(y) = β ρ(y)        Δ = ρ(y_w) − ρ(y_l)

    dpo      −(1−ε) log σ(βΔ) − ε log σ(−βΔ)         Rafailov et al. 2023 (arXiv 2305.18290) eq. 7; ε, the share of
                                                     labels that may be wrong: Mitchell 2023, "A note on DPO with noisy
                                                     preferences", eq. 4
    robust   (−(1−ε) log σ(βΔ) + ε log σ(−βΔ)) / (1−2ε)            Chowdhury et al. 2024 (arXiv 2403.00409) §3
    hinge    max(0, 1 − βΔ)                          Zhao et al. 2023 (arXiv 2305.10425) §2
    ipo      (ρ(y_w)/|y_w| − ρ(y_l)/|y_l| − 1/2β)²   Azar et al. 2023 (arXiv 2310.12036) eq. 17, per token: see below
    kto      λ_D (1 − σ(r(y) − βz)) of a good answer, λ_U (1 − σ(βz − r(y))) of a bad one
             z = max(0, mean of ρ(y′)), y′ being answers to other prompts
                                                     Ethayarajh et al. 2024 (arXiv 2402.01306) eq. 7-8

Two methods need no reference model. They take the mean over tokens, log p(y) = 1/|y| log π(y|x):

    orpo     −log p(y_w) − β log σ(log odds(y_w) − log odds(y_l))  Hong et al. 2024 (arXiv 2403.07691) eq. 6-7, β is λ
             log odds = log p − log(1 − p)
    simpo    −log σ(β (log p(y_w) − log p(y_l)) − γ)               Meng et al. 2024 (arXiv 2405.14734) eq. 6

What people get wrong: log π is a *sum* over the tokens of the answer in dpo, hinge and kto, and a mean in orpo and
simpo. IPO's paper has sums; trl, on the word of its authors, has means, and so have we. ORPO's first term is of the
answer, as in the paper; trl takes it over the prompt too.

Every loss is a function of log-probabilities, (B,) in and (B,) out; the trainer divides the sum by the rows of a step.
"""

import argparse

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from nanollm.data.preferences import PairBatch
from nanollm.model import Decoder
from nanollm.training.log_probs import LogProbs, answer_log_probs

# --beta, where it is not given: that of trl; of SimPO the paper's
BETA = {"dpo": 0.1, "robust": 0.1, "hinge": 0.1, "ipo": 0.1, "kto": 0.1, "orpo": 0.1, "simpo": 2.0}
WITHOUT_REFERENCE = ("orpo", "simpo")


# ---- the losses: float32 (B,) in and out

def dpo(delta: Tensor, beta: float, smoothing: float = 0.0) -> Tensor:
    """delta: Δ."""
    return -(1 - smoothing) * F.logsigmoid(beta * delta) - smoothing * F.logsigmoid(-beta * delta)


def robust(delta: Tensor, beta: float, smoothing: float) -> Tensor:
    """delta: Δ. Over labels of which the share `smoothing` is wrong, its mean is the loss of DPO on right ones."""
    right, wrong = F.logsigmoid(beta * delta), F.logsigmoid(-beta * delta)
    return (-(1 - smoothing) * right + smoothing * wrong) / (1 - 2 * smoothing)


def hinge(delta: Tensor, beta: float) -> Tensor:
    """delta: Δ."""
    return F.relu(1 - beta * delta)


def ipo(delta: Tensor, beta: float) -> Tensor:
    """delta: ρ(y_w)/|y_w| − ρ(y_l)/|y_l|, which is to become 1/2β."""
    return (delta - 1 / (2 * beta)).square()


def orpo(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """chosen, rejected: log p of each, a mean over its tokens, below 0."""
    ratio = F.logsigmoid(log_odds(chosen) - log_odds(rejected))
    return -chosen - beta * ratio


def log_odds(log_p: Tensor) -> Tensor:
    """log p − log(1 − p) from log p: with expm1 where p is close to 1, with log1p where it is close to 0."""
    near_1 = log_p > -0.6931
    high, low = log_p.where(near_1, -1.0), log_p.where(~near_1, -1.0)       # else the other branch's gradient is NaN
    return log_p - torch.where(near_1, torch.log(-torch.expm1(high)), torch.log1p(-torch.exp(low)))


def simpo(chosen: Tensor, rejected: Tensor, beta: float, gamma: float) -> Tensor:
    """chosen, rejected: log p of each, a mean over its tokens."""
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)


def kto(ratio: Tensor, good: Tensor, z: Tensor, beta: float, weights: tuple[float, float]) -> Tensor:
    """ratio: ρ(y); good (B,) bool; z (): no gradient; weights: λ_D, λ_U."""
    above = beta * (ratio - z)
    return torch.where(good, weights[0] * (1 - torch.sigmoid(above)), weights[1] * (1 - torch.sigmoid(-above)))


# ---- as methods of the trainer: see losses.py

def preference_loss(model: Decoder, batch: PairBatch, options: argparse.Namespace) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of --loss on pairs. For the log: log p of each answer, how often the better one has the larger reward,
    and by how much."""
    log_p = answer_log_probs(model, batch.tokens, batch.targets)
    beta = options.beta or BETA[options.loss]
    ratio = LogProbs(log_p.total - batch.reference, log_p.tokens)
    delta, (chosen, rejected) = difference(ratio.total), log_p.mean.chunk(2)
    match options.loss:
        case "dpo":
            losses = dpo(delta, beta, options.label_smoothing)
        case "robust":
            losses = robust(delta, beta, options.label_smoothing)
        case "hinge":
            losses = hinge(delta, beta)
        case "ipo":
            losses = ipo(difference(ratio.mean), beta)
        case "orpo":
            losses = orpo(chosen, rejected, beta)
        case "simpo":
            losses = simpo(chosen, rejected, beta, options.gamma)
    margin = beta * (chosen - rejected if options.loss in WITHOUT_REFERENCE else delta)
    better, worse = log_p.total.chunk(2)
    said = {"loss": losses, "margin": margin, "accuracy": (margin > 0).float(), "chosen_log_p": better,
            "rejected_log_p": worse}
    return losses.sum(), {key: value.detach().sum() for key, value in said.items()}


def label_loss(model: Decoder, batch: PairBatch, options: argparse.Namespace) -> tuple[Tensor, dict[str, Tensor]]:
    """KTO, on answers with a label. z is of this micro-batch, of all ranks: of few rows it is a rough estimate.

    margin of the log: the reward, with a minus where the answer is a bad one."""
    beta, rows = options.beta or BETA["kto"], batch.divisor
    # one pass for both, though the second needs no gradient: a layer of experts is asked once a micro-batch (losses.py)
    ratio, strange = (answer_log_probs(model, batch.tokens, batch.targets).total - batch.reference).chunk(2)
    sums = torch.stack([strange.detach().sum(), strange.new_tensor(float(rows))])
    if dist.is_initialized():
        dist.all_reduce(sums)
    z, good = (sums[0] / sums[1]).clamp(min=0), batch.labels
    losses = kto(ratio, good, z, beta, options.kto_weights)
    signed = beta * torch.where(good, ratio, -ratio)
    said = {"loss": losses, "margin": signed, "accuracy": ((ratio > z) == good).float(), "kl": z.expand(rows)}
    return losses.sum(), {key: value.detach().sum() for key, value in said.items()}


def difference(pairs: Tensor) -> Tensor:
    """(2B,) better answers before worse ones → (B,) the difference in each pair."""
    better, worse = pairs.chunk(2)
    return better - worse


def needs_reference(options: argparse.Namespace) -> bool:
    """Whether the method compares with what the model was."""
    return bool(options.preference) and options.loss not in WITHOUT_REFERENCE
