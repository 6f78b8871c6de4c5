"""From logits to the next token.

    greedy          the largest logit                                                   temperature 0
    temperature τ   p = softmax(logits / τ): below 1 sharper, above 1 flatter
    top-k           only the k most likely tokens stay                                  Fan et al. 2018
    top-p           only the fewest tokens whose probabilities reach p stay             Holtzman et al. 2019, 1904.09751
    min-p           only tokens at least min_p times as likely as the likeliest stay    Nguyen et al. 2024, 2407.01082

The filters apply in that order, after the temperature; each keeps at least one token.
Shapes: B batch, V vocabulary.
"""

import torch
from torch import Tensor


def sample(logits: Tensor, temperature: float = 0.0, top_k: int | None = None, top_p: float | None = None,
           min_p: float | None = None, generator: torch.Generator | None = None) -> Tensor:
    """Logits (B, V) → tokens (B,) int64. The generator makes the draw repeatable; greedy needs none."""
    if temperature == 0:
        return logits.float().argmax(-1)        # in bfloat16 torch's argmax on a CPU takes four times as long
    kept = keep_likely(logits.float() / temperature, top_k, top_p, min_p)
    return torch.multinomial(kept.softmax(-1), 1, generator=generator)[:, 0]


def keep_likely(logits: Tensor, top_k: int | None = None, top_p: float | None = None,
                min_p: float | None = None) -> Tensor:
    """Logits (B, V) with −∞ at the tokens that the filters drop."""
    if top_k is not None:
        smallest = logits.topk(min(top_k, logits.shape[-1]), -1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p is not None:
        ordered, index = logits.sort(-1)                                        # least likely first, the likeliest last
        dropped = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
        dropped[:, -1] = False
        logits = logits.masked_fill(dropped.scatter(-1, index, dropped), -torch.inf)
    if min_p is not None:
        p = logits.softmax(-1)
        logits = logits.masked_fill(p < min_p * p.amax(-1, keepdim=True), -torch.inf)
    return logits
