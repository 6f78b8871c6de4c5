"""What training minimises, as sums over tokens: the trainer divides by the tokens of the whole step.

A training method is a loss and a collator, and the loop knows neither by name:

    loss        (model, batch, options) → the sum to minimise, and sums for the log: `next_token` here
    collator    what makes batches of rows: data/stream.py, data/preferences.py; or answers prompts (rollouts.py). The
                loop asks a batch for .divisor, by which the sums are divided (targets; pairs; answers), for .seen
                (tokens that are no padding), .real and .to(device)

    L  =  1/n Σ_t [ −log p(y_t) + z · (log Z_t)² ]  +  b · balance
                                                n  targets of the step, over all micro-batches and ranks

    log p(y) = x_y − log Z,     log Z = logsumexp(x)            z-loss keeps log Z near 0:
                                                                Chowdhery et al. 2022 (arXiv 2204.02311) §5
    balance  = mean over layers of  E · Σ_e f_e P_e             Fedus et al. 2021 (arXiv 2101.03961) eq. 4
               f_e  share of the tokens whose choices include expert e
               P_e  mean probability of e (with sigmoid scores: their share of the sum over experts)

A mean of means is not the mean: rows with few targets would weigh as much as rows with many. Sums divided by n are the
same number however the step is cut into ranks and micro-batches. The same holds for balance here, because f is taken
from *the step before*: it is a constant, without a gradient, and all micro-batches of a step use the same f. The f of
the step itself is known only when the step ends.

Shapes: B batch, T tokens, D width, V vocabulary, N tokens in all, E experts.
"""

import argparse
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanollm.data.stream import Batch
from nanollm.layers.moe import MoE, Routed, probabilities
from nanollm.model import Decoder, Head
from nanollm.ops import accelerated
from nanollm.training.cross_entropy import LinearCrossEntropy

RECENT = 128            # steps that a spike is measured against
SQUARES = {"log_z"}     # of these the sums are of squares, and the log has the root of the mean

# The first sum has a gradient. The others, by name, are for the log and have none; "loss" is among them.
# The batch is what the collator of the method makes: Batch here.
Loss = Callable[[Decoder, Any, argparse.Namespace], tuple[Tensor, dict[str, Tensor]]]


def next_token(model: Decoder, batch: Batch, options: argparse.Namespace) -> tuple[Tensor, dict[str, Tensor]]:
    """Pre-training and SFT: each token from those before it, as the batch has targets. See the head of the file."""
    hidden = model.hidden(batch.tokens, batch.positions)
    total, nats, squares = token_loss(model.head, hidden, batch.targets, options.z_loss)
    return total, {"loss": nats, "log_z": squares}


def means(sums: dict[str, float], count: float) -> dict[str, float]:
    """The sums of a step as its log has them: divided by its targets."""
    found = {name: total / count for name, total in sums.items()}
    for name in SQUARES & found.keys():
        found[name] = math.sqrt(found[name]) if found[name] >= 0 else math.nan
    return found


def token_loss(head: Head, hidden: Tensor, targets: Tensor, z: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """`linear_cross_entropy` of hidden (B, T, D) and targets (B, T)."""
    return linear_cross_entropy(*head.product(hidden.flatten(0, 1)), targets.flatten(), z, head.softcap)


@accelerated
def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, z: float = 0.0, softcap: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden (n, D), weight (V, D), targets (n,) int64 with −100 for none → three float32 sums over the targets.

    The first, −log p(y) + z (log Z)², has a gradient; −log p(y) and (log Z)² by themselves are for the log.
    softcap: as attention.py has it, on the logits. Never are all logits in memory: see cross_entropy.py.
    """
    total, nats, squares = LinearCrossEntropy.apply(hidden, weight, targets, z, softcap)
    return total, nats, squares


class Balance:
    """The load-balance loss of every MoE layer, and the counts that it is computed from. Without MoE layers it is 0.

    shares   f of the step before, a row of plain numbers for each layer: a checkpoint must keep them
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = [module for module in model.modules() if isinstance(module, MoE)]
        self.shares = [[m.config.top_k / m.config.experts] * m.config.experts for m in self.layers]    # at first, equal
        self.chosen: list[Tensor] = []          # this step so far, (E,) for each layer: tokens that chose each expert
        self.probability: list[Tensor] = []     # and sums of the probability of each expert
        self.tokens = 0

    def loss(self, routed: list[Routed], real: Tensor | None) -> Tensor:
        """The balance of this micro-batch, summed over its tokens.

        routed: the router's output of each layer; real (N,) bool: False is padding.
        """
        loss = routed[0].logits.new_zeros((), dtype=torch.float32)
        if not self.chosen:
            self.chosen = [r.logits.new_zeros(r.logits.shape[-1], dtype=torch.float64) for r in routed]
            self.probability = [torch.zeros_like(c) for c in self.chosen]
        for i, (layer, (logits, _, chosen), f) in enumerate(zip(self.layers, routed, self.shares, strict=True)):
            p = probabilities(logits, layer.config)                             # (N, E)
            choice = F.one_hot(chosen, logits.shape[-1]).sum(-2)                # (N, E)
            if real is not None:
                p, choice = p * real[:, None], choice * real[:, None]
            loss = loss + p.shape[-1] * (torch.tensor(f, device=p.device) * p.sum(0)).sum() / len(self.layers)
            self.chosen[i] += choice.sum(0)
            self.probability[i] += p.detach().sum(0)
        self.tokens += len(routed[0].logits) if real is None else int(real.sum())
        return loss

    def close(self, total: Callable[..., list[float]]) -> float:
        """End a step: sum the counts over ranks, set the shares f for the next step.

        total: `World.all_reduce`. Returns the balance of the step that ends (eq. 4).
        """
        if not self.layers:
            return 0.0
        counts = [float(x) for row in (*self.chosen, *self.probability) for x in row.tolist()]
        sums = iter(total(self.tokens, *counts))
        tokens = next(sums)
        chosen = [[next(sums) / tokens for _ in row] for row in self.chosen]
        probability = [[next(sums) / tokens for _ in row] for row in self.probability]
        self.shares, self.chosen, self.probability, self.tokens = chosen, [], [], 0
        balances = [
            len(f) * sum(a * b for a, b in zip(f, p, strict=True)) for f, p in zip(chosen, probability, strict=True)
        ]
        return sum(balances) / len(balances)


def spike(recent: Sequence[tuple[float, float]], loss: float, norm: float, sigma: float) -> bool:
    """Whether loss or gradient norm lies more than `sigma` standard deviations above its mean over the recent steps.

    recent: (loss, norm) of each. sigma = 0 switches the check off.
    """
    if not sigma or len(recent) < RECENT // 4:
        return False
    return any(
        value > statistics.fmean(past) + sigma * statistics.pstdev(past)
        for value, past in zip((loss, norm), zip(*recent, strict=True), strict=True)
    )
