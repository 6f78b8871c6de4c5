"""What training minimises, as sums over tokens: the trainer divides by the tokens of the whole step.

    L  =  1/n Σ_t [ −log p(y_t) + z · (log Z_t)² ]  +  b · balance          n = targets of the step, over micro-batches and ranks

    log p(y) = x_y − log Z,     log Z = logsumexp(x)            z-loss keeps log Z near 0: Chowdhery et al. 2022 (arXiv 2204.02311) §5
    balance  = mean over layers of  E · Σ_e f_e P_e             Fedus et al. 2021 (arXiv 2101.03961) eq. 4
               f_e  share of the tokens whose choices include expert e,   P_e  mean probability of e (of sigmoids: their share of the sum)

A mean of means is not the mean: rows with few targets would weigh as much as rows with many. Sums over n are the same number however
the step is cut into ranks and micro-batches. So is balance here: f, through which no gradient flows, is that of *the step before*, a
price of each expert that all micro-batches of a step are charged alike (known only when the step ends, it could not be its own).

Shapes: B batch, T tokens, D width, V vocabulary, N tokens in all, E experts.
"""

import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from nanollm.layers.moe import MoE, Routed, probabilities
from nanollm.model import Head
from nanollm.ops import accelerated

MOST = 2**28            # logits held at once. More are computed in pieces, and again for the gradient: V is 100,000 and more today
RECENT = 128            # steps that a spike is measured against


def token_loss(head: Head, hidden: Tensor, targets: Tensor, z: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """`linear_cross_entropy` of hidden (B, T, D) and targets (B, T)."""
    return linear_cross_entropy(*head.product(hidden.flatten(0, 1)), targets.flatten(), z, head.softcap)


@accelerated
def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, z: float = 0.0, softcap: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """hidden (n, D), weight (V, D), targets (n,) int64 with −100 for none → three float32 sums over the targets: −log p(y) + z (log Z)²,
    to be differentiated, and −log p(y) and (log Z)² by themselves, to be read. softcap: as attention.py has it, on the logits."""
    def sums(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = F.linear(x, weight).float()                                    # (n, V)
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        nats = F.cross_entropy(logits, y, reduction="none")                     # 0 where there is no target
        with torch.set_grad_enabled(z > 0 and torch.is_grad_enabled()):         # without z-loss log Z is only looked at
            squares = ((nats + logits.gather(-1, y.clamp(min=0)[:, None])[:, 0]).square() * (y >= 0)).sum()     # log Z = x_y − log p(y)
        return nats.sum() + z * squares, nats.detach().sum(), squares.detach()

    if len(hidden) <= (size := max(1, MOST // len(weight))):
        return sums(hidden, targets)
    parts = [checkpoint(sums, *piece, use_reentrant=False) for piece in zip(hidden.split(size), targets.split(size))]
    return tuple(sum(part) for part in zip(*parts))


class Balance:
    """The load-balance loss of every MoE layer, and the counts behind it. Without such layers everything is 0.
    shares is what a checkpoint must keep: one row of f a layer, as plain numbers."""

    def __init__(self, model: nn.Module) -> None:
        self.layers = [module for module in model.modules() if isinstance(module, MoE)]
        self.shares = [[m.config.top_k / m.config.experts] * m.config.experts for m in self.layers]     # at first all cost the same
        self.chosen, self.probability, self.tokens = [], [], 0

    def loss(self, routed: list[Routed], real: Tensor | None) -> Tensor:
        """Sum over tokens of the balance of this micro-batch. routed: what the router said, a layer; real (N,): False is padding."""
        loss = routed[0].logits.new_zeros((), dtype=torch.float32)
        self.chosen = self.chosen or [torch.zeros(r.logits.shape[-1], dtype=torch.float64, device=r.logits.device) for r in routed]
        self.probability = self.probability or [torch.zeros_like(c) for c in self.chosen]
        for i, (layer, (logits, _, chosen), price) in enumerate(zip(self.layers, routed, self.shares)):
            p, choice = probabilities(logits, layer.config), F.one_hot(chosen, logits.shape[-1]).sum(-2)          # (N, E)
            if real is not None:
                p, choice = p * real[:, None], choice * real[:, None]
            loss = loss + p.shape[-1] * (torch.tensor(price, device=p.device) * p.sum(0)).sum() / len(self.layers)
            self.chosen[i] += choice.sum(0)
            self.probability[i] += p.detach().sum(0)
        self.tokens += len(routed[0].logits) if real is None else int(real.sum())
        return loss

    def close(self, total: Callable[..., list[float]]) -> float:
        """End a step: sum the counts over ranks, set the prices of the next one, and return what the balance was (eq. 4)."""
        if not self.layers:
            return 0.0
        sums = iter(total(self.tokens, *(float(x) for row in (*self.chosen, *self.probability) for x in row.tolist())))
        tokens = next(sums)
        chosen, probability = ([[next(sums) / tokens for _ in row] for row in rows] for rows in (self.chosen, self.probability))
        self.shares, self.chosen, self.probability, self.tokens = chosen, [], [], 0
        return sum(len(f) * sum(a * b for a, b in zip(f, p)) for f, p in zip(chosen, probability)) / len(chosen)


def spike(recent: Sequence[tuple[float, float]], loss: float, norm: float, sigma: float) -> bool:
    """Whether loss or gradient norm lie more than `sigma` standard deviations (0: any) above their mean over the recent steps."""
    if not sigma or len(recent) < RECENT // 4:
        return False
    return any(value > statistics.fmean(past) + sigma * statistics.pstdev(past) for value, past in zip((loss, norm), zip(*recent)))
