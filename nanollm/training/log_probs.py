"""log p(answer | prompt): what preference losses are functions of.

    log p(y | x) = Σ_t log p(y_t | x, y_<t)             a sum over the targets of a sequence
    log p(y_t)   = l_y − logsumexp(l)                   l = the head's logits, soft-capped where it has a soft cap, and
                                                        divided by the temperature where tokens were drawn at one

The logits of all answers would be the largest tensor of a step: PIECE of them at most are in memory, and the backward
pass makes them again, a piece at a time. Only targets have logits: prompts and padding cost nothing here.

Shapes: B sequences, T tokens, D width, V vocabulary, n targets in all.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from nanollm.model import Decoder, Head
from nanollm.training.cross_entropy import PIECE


class LogProbs(NamedTuple):
    """Of B answers."""
    total: Tensor               # (B,) float32: log p of the whole answer
    tokens: Tensor              # (B,) float32: how many it has

    @property
    def mean(self) -> Tensor:
        """(B,) log p of a token of it, on average."""
        return self.total / self.tokens


def answer_log_probs(model: Decoder, tokens: Tensor, targets: Tensor) -> LogProbs:
    """tokens (B, T), targets (B, T) with −100 where nothing is judged. Padding stands at the end of a sequence."""
    judged = targets >= 0
    each = torch.zeros(targets.shape, device=tokens.device)
    each[judged] = target_log_probs(model.head, model.hidden(tokens)[judged], targets[judged])
    return LogProbs(each.sum(1), judged.sum(1).float())


def target_log_probs(head: Head, hidden: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """hidden (n, D), targets (n,) → log p of each target (n,), float32."""
    x, weight = head.product(hidden)
    size = max(1, PIECE // len(weight))
    pieces = [checkpoint(piece, x[at : at + size], weight, targets[at : at + size], head.softcap, temperature,
                         use_reentrant=False) for at in range(0, len(x), size)]
    return torch.cat(pieces)


def piece(x: Tensor, weight: Tensor, targets: Tensor, softcap: float | None, temperature: float) -> Tensor:
    """`target_log_probs` of a few rows, with all their logits: x (m, D'), weight (V, D')."""
    logits = F.linear(x, weight).float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.log_softmax(logits / temperature, -1).gather(-1, targets[:, None])[:, 0]
