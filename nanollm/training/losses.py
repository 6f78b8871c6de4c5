"""What training minimises, as sums over tokens: the trainer divides by the tokens of the whole step.

    L  =  1/n Σ_t [ −log p(y_t) + z · (log Z_t)² ]  +  b · balance      n  targets of the step, of all micro-batches

    log p(y) = x_y − log Z,     log Z = logsumexp(x)        z-loss keeps log Z near 0: Chowdhery et al. 2022
                                                            (arXiv 2204.02311) §5
    balance  = mean over layers of  E · Σ_e f_e P_e         Fedus et al. 2021 (arXiv 2101.03961) eq. 4
               f_e  share of the tokens whose choices include expert e
               P_e  mean probability of e (of sigmoids: their share of the sum)

A mean of means is not the mean: rows with few targets would weigh as much as rows with many. Sums over n are the same
number however the step is cut into ranks and micro-batches. So is balance here: f, through which no gradient flows, is
that of *the step before*. The f of a step itself is known only when its last micro-batch is done.

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

MOST = 2**28            # logits held at once. More are computed in pieces, and again for the gradient: V may be 100,000
RECENT = 128            # steps that a spike is measured against


def token_loss(head: Head, hidden: Tensor, targets: Tensor, z: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """`linear_cross_entropy` of hidden (B, T, D) and targets (B, T)."""
    return linear_cross_entropy(*head.product(hidden.flatten(0, 1)), targets.flatten(), z, head.softcap)


@accelerated
def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, z: float = 0.0, softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden (n, D), weight (V, D), targets (n,) int64 with −100 for none → three float32 sums over the targets:
    −log p(y) + z (log Z)², to be differentiated, and −log p(y) and (log Z)² by themselves, to be read. softcap: as
    attention.py has it, on the logits."""
    def sums(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = F.linear(x, weight).float()                                    # (n, V)
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        nats = F.cross_entropy(logits, y, reduction="none")                     # 0 where there is no target
        with torch.set_grad_enabled(z > 0 and torch.is_grad_enabled()):         # without z-loss log Z is only looked at
            log_z = nats + logits.gather(-1, y.clamp(min=0)[:, None])[:, 0]
            squares = (log_z.square() * (y >= 0)).sum()
        return nats.sum() + z * squares, nats.detach().sum(), squares.detach()

    if len(hidden) <= (size := max(1, MOST // len(weight))):
        return sums(hidden, targets)
    pieces = zip(hidden.split(size), targets.split(size), strict=True)
    loss, nats, squares = zip(*(checkpoint(sums, *piece, use_reentrant=False) for piece in pieces), strict=True)
    return torch.stack(loss).sum(), torch.stack(nats).sum(), torch.stack(squares).sum()


class Balance:
    """The load-balance loss of all MoE layers, and the counts behind it. Without such layers all is 0.
    shares is what a checkpoint must keep: a row of f for each layer, as plain numbers."""

    def __init__(self, model: nn.Module) -> None:
        self.layers = [module for module in model.modules() if isinstance(module, MoE)]
        configs = [layer.config for layer in self.layers]
        self.shares = [[moe.top_k / moe.experts] * moe.experts for moe in configs]      # at first all alike
        self.chosen: list[Tensor] = []
        self.probability: list[Tensor] = []
        self.tokens = 0

    def loss(self, routed: list[Routed], real: Tensor | None) -> Tensor:
        """Sum over tokens of the balance of this micro-batch. routed: what the router of each layer gave; real (B, T):
        False for padding."""
        loss = routed[0].logits.new_zeros((), dtype=torch.float32)
        if not self.chosen:
            self.chosen = [torch.zeros(len(f), dtype=torch.float64, device=loss.device) for f in self.shares]
            self.probability = [torch.zeros_like(counts) for counts in self.chosen]
        for i, (layer, (logits, _, chosen), f) in enumerate(zip(self.layers, routed, self.shares, strict=True)):
            p, choice = probabilities(logits, layer.config), F.one_hot(chosen, logits.shape[-1]).sum(-2)    # (N, E)
            if real is not None:
                p, choice = p * real.flatten()[:, None], choice * real.flatten()[:, None]
            loss = loss + len(f) * (torch.tensor(f, device=p.device) * p.sum(0)).sum() / len(self.layers)
            self.chosen[i] += choice.sum(0)
            self.probability[i] += p.detach().sum(0)
        self.tokens += len(routed[0].logits) if real is None else int(real.sum())
        return loss

    def close(self, all_reduce: Callable[..., list[float]]) -> float:
        """End a step: sum the counts over ranks, keep f for the next step, return the balance of this one (eq. 4)."""
        if not self.layers:
            return 0.0
        sums = iter(all_reduce(self.tokens, *(x for row in (*self.chosen, *self.probability) for x in row.tolist())))
        tokens = next(sums)
        shares = [[next(sums) / tokens for _ in row] for row in self.chosen]
        means = [[next(sums) / tokens for _ in row] for row in self.probability]
        self.shares, self.chosen, self.probability, self.tokens = shares, [], [], 0
        layers = zip(shares, means, strict=True)
        return sum(len(f) * sum(a * b for a, b in zip(f, p, strict=True)) for f, p in layers) / len(shares)


def spike(recent: Sequence[tuple[float, float]], loss: float, norm: float, sigma: float) -> bool:
    """Whether loss or gradient norm lie more than `sigma` standard deviations above their mean over the recent steps.
    sigma 0: never."""
    if not sigma or len(recent) < RECENT // 4:
        return False
    pairs = zip((loss, norm), zip(*recent, strict=True), strict=True)
    return any(value > statistics.fmean(past) + sigma * statistics.pstdev(past) for value, past in pairs)
